"""An exception on its way to another process or thread."""

from __future__ import annotations

import msgspec

from dashinfer_vlm import errors

__all__ = ["Fault"]


class Fault(msgspec.Struct, frozen=True, array_like=True):
    """An exception on its way to another process or thread."""

    kind: str
    """Name of a class of `dashinfer_vlm.errors`."""
    message: str
    param: str | None = None
    retry_after_s: int = 1
    reason: str = "busy"

    @classmethod
    def of(cls, error: Exception) -> Fault:
        """Errors that this package raises on purpose keep their text; anything else is a failure of the engine."""
        if not isinstance(error, errors.DashInferError):
            return cls("EngineError", f"the engine failed ({type(error).__name__}); its log says more")
        if isinstance(error, errors.OverloadedError):
            return cls(type(error).__name__, str(error), None, error.retry_after_s, error.reason)
        return cls(type(error).__name__, str(error), getattr(error, "param", None))

    def error(self) -> errors.DashInferError:
        kind: type[errors.DashInferError] = getattr(errors, self.kind)
        if issubclass(kind, errors.InvalidRequestError):
            return kind(self.message, param=self.param)
        if issubclass(kind, errors.OverloadedError):
            return kind(self.message, reason=self.reason, retry_after_s=self.retry_after_s)
        return kind(self.message)
