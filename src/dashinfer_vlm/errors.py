"""Everything that can go wrong, free of transport; `server/errors.py` holds the one table to HTTP statuses.

DashInferError
├── ConfigError            a flag, an environment variable or a configuration value is wrong (start-up)
├── CheckpointError        a model folder cannot be used (start-up)
├── InvalidRequestError    the caller asked for something impossible; `param` names the field
│   ├── ContextLengthError the prompt does not fit the model's context
│   └── UnsupportedError   a known option that this server does not offer
├── MediaError             an image, video or audio cannot be used
│   ├── MediaRefusedError  the policy forbids fetching or reading it
│   ├── MediaTooLargeError bytes, pixels, frames or seconds over a limit
│   ├── MediaUnavailableError  its host does not hand it out: the URL is wrong
│   ├── MediaFetchError    the host that should deliver it failed
│   └── MediaTimeoutError  ... or did not answer in time
├── DeadlineError          the request's own time is over
├── OverloadedError        no room now; `retry_after_s` says when to try again, `reason` which limit it was
│   ├── RateLimitError     the caller's own limits, not the server's
│   └── UnavailableError   the server shuts down, or waits for another engine
└── EngineError            a failure of ours
    └── EngineDeadError    the engine process is gone
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DashInferError",
    "DeadlineError",
    "EngineDeadError",
    "EngineError",
    "InvalidRequestError",
    "MediaError",
    "MediaFetchError",
    "MediaRefusedError",
    "MediaTimeoutError",
    "MediaTooLargeError",
    "MediaUnavailableError",
    "OverloadedError",
    "RateLimitError",
    "UnavailableError",
    "UnsupportedError",
]


class DashInferError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(DashInferError):
    """A flag, an environment variable or a configuration value is wrong."""


class CheckpointError(DashInferError):
    """A model folder cannot be used."""


class InvalidRequestError(DashInferError):
    """The caller asked for something impossible. `param` names the field that is at fault, where one is."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """The prompt, or the prompt and its outputs, do not fit the model's context."""


class UnsupportedError(InvalidRequestError):
    """A known option that this server does not offer."""


class MediaError(InvalidRequestError):
    """An image, a video or an audio clip cannot be used."""


class MediaRefusedError(MediaError):
    """The policy forbids fetching or reading this medium."""


class MediaTooLargeError(MediaError):
    """Bytes, pixels, frames or seconds are over a limit."""


class MediaUnavailableError(MediaError):
    """The host does not hand out the item, and would not if it were asked again."""


class MediaFetchError(MediaError):
    """The host that should deliver the item failed."""


class MediaTimeoutError(MediaFetchError):
    """The host that should deliver the item did not answer in time."""


class DeadlineError(DashInferError):
    """The answer was not complete in the time that the request gave for it."""


class OverloadedError(DashInferError):
    """No room for another request now; try again in `retry_after_s` seconds. `reason` names the limit in metrics."""

    def __init__(self, message: str, *, reason: str = "busy", retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class RateLimitError(OverloadedError):
    """The caller has used what it may use now."""


class UnavailableError(OverloadedError):
    """This server takes no requests for a while, whoever asks."""


class EngineError(DashInferError):
    """A failure of the engine itself; the request is not at fault."""


class EngineDeadError(EngineError):
    """The engine process is gone."""
