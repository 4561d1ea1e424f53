"""What a model folder says about the engine's settings, for who has no torch: a server asks before any weight is
loaded."""

from __future__ import annotations

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.models.config import CheckpointConfig
from dashinfer_vlm.option import flag

__all__ = [
    "DEFAULT_MAX_MODEL_LEN",
    "check_settings",
    "refuse_vision_options",
    "resolve_max_model_len",
    "weight_type",
]

DEFAULT_MAX_MODEL_LEN = 32000
"""The documented default of --max_length; a model with a shorter context keeps its own."""


def check_settings(checkpoint: CheckpointConfig, config: EngineConfig) -> None:
    """Raise ConfigError for a setting that this model cannot have, on whatever machine."""
    resolve_max_model_len(checkpoint.text.max_position_embeddings, config)
    if checkpoint.vision is None:
        refuse_vision_options(checkpoint, config)


def resolve_max_model_len(context: int, config: EngineConfig) -> int:
    """The configured length, or the model's context up to the documented default; never above the model's."""
    if config.max_model_len is None:
        return min(context, DEFAULT_MAX_MODEL_LEN)
    if config.max_model_len > context:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}, the model's context is {context}; lower it or leave it out"
        )
    return config.max_model_len


def weight_type(checkpoint: CheckpointConfig, config: EngineConfig) -> str:
    """The configured type of weights that are not quantised, or the checkpoint's, as torch calls it."""
    return checkpoint.dtype if config.dtype == "auto" else config.dtype


def refuse_vision_options(checkpoint: CheckpointConfig, config: EngineConfig) -> None:
    """Raise ConfigError for a setting that has no effect without a vision encoder."""
    unset = {"vision_engine": "native", "vision_quant_type": "none", "vision_workers": 0, "vision_cache": None}
    for name, value in unset.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{flag(name)} is set, but {checkpoint.architecture} is a text model without a vision encoder; "
                "start without it"
            )
