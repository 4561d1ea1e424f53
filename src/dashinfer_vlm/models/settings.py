"""What a model folder says about the engine's settings, for who has no torch: a server asks before any weight is
loaded."""

from __future__ import annotations

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.models.config import CheckpointConfig
from dashinfer_vlm.models.family import DRAFTS, Names
from dashinfer_vlm.option import flag

__all__ = [
    "DEFAULT_MAX_MODEL_LEN",
    "check_drafts",
    "check_settings",
    "names_of",
    "refuse_drafts",
    "refuse_vision_options",
    "resolve_max_model_len",
    "weight_type",
]

DEFAULT_MAX_MODEL_LEN = 32000
"""The documented default of --max_length; a model with a shorter context keeps its own."""


def check_settings(checkpoint: CheckpointConfig, config: EngineConfig) -> None:
    """Raise ConfigError for a setting that this model cannot have, on whatever machine."""
    resolve_max_model_len(checkpoint.text.max_position_embeddings, config)
    if config.num_head_guesses and DRAFTS not in checkpoint.family.names.ignored:
        raise _without_drafts(checkpoint)
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


def names_of(checkpoint: CheckpointConfig, config: EngineConfig) -> Names:
    """Of the tensors that this engine reads."""
    names = checkpoint.family.names
    return names.with_drafts() if config.num_head_guesses else names


def refuse_drafts(config: EngineConfig, device: str, num_ranks: int) -> None:
    """Raise ConfigError where the model's own head is to guess and nothing here computes that."""
    if config.num_head_guesses and (device != "cpu" or num_ranks > 1):
        where = "several ranks" if num_ranks > 1 else device
        raise ConfigError(
            f"--speculative-config has method mtp, which computes on one processor, not on {where}; use ngram"
        )


def check_drafts(checkpoint: CheckpointConfig, config: EngineConfig, *, has_head: bool) -> None:
    """Raise ConfigError where the model's own head is to guess and the folder holds none."""
    if config.num_head_guesses and not has_head:
        raise _without_drafts(checkpoint)


def _without_drafts(checkpoint: CheckpointConfig) -> ConfigError:
    return ConfigError(
        f"--speculative-config has method mtp, but {checkpoint.folder} holds no head that guesses ({DRAFTS}*); "
        "use ngram"
    )


def refuse_vision_options(checkpoint: CheckpointConfig, config: EngineConfig) -> None:
    """Raise ConfigError for a setting that has no effect without a vision encoder."""
    unset = {"vision_engine": "native", "vision_quant_type": "none", "vision_workers": 0, "vision_cache": None}
    for name, value in unset.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{flag(name)} is set, but {checkpoint.architecture} is a text model without a vision encoder; "
                "start without it"
            )
