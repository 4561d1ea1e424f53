"""What every route needs, in one object that `create_app` makes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from hashlib import sha256

import dashinfer_vlm
from dashinfer_vlm.config import ServerConfig
from dashinfer_vlm.frontend.service import Service
from dashinfer_vlm.server.errors import HttpError
from dashinfer_vlm.server.reading import BodyReader
from dashinfer_vlm.server.replies import Head

ANY_MODEL = "model"
"""The name that the documented client example sends; it always means the model that is served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    service: Service
    config: ServerConfig
    bodies: BodyReader
    started_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that clients may call the model by; the first is the one that answers carry."""
        return self.config.served_model_name or (self.service.engine.info.model,)

    def head(self, prefix: str, asked: str | None) -> Head:
        """The head of an answer by the model that was `asked` for; raises like `model_name`."""
        return Head.new(prefix, self.model_name(asked), self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """Of this version with this model as it was loaded."""
        info = self.service.engine.info
        facts = (dashinfer_vlm.__version__, info.model, info.device, info.precision, info.kv_dtype, info.lora or "")
        return "fp_" + sha256("\0".join(facts).encode()).hexdigest()[:10]

    def model_name(self, asked: str | None) -> str:
        """The name to answer with; raises HttpError 404 for a model that is not served."""
        accepted = (*self.model_names, self.service.engine.info.model)
        if asked in accepted:
            return asked
        if asked is None or asked == ANY_MODEL:
            return self.model_names[0]
        raise HttpError(
            404,
            "model_not_found",
            f"the model {asked[:200]!r} is not served here; this server has {', '.join(self.model_names)}",
            param="model",
        )
