"""What the server says in its log, in uvicorn's format, so that one format holds for all of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from uvicorn.logging import DefaultFormatter

from dashinfer_vlm.log_lines import JsonFormatter, LogFormat

if TYPE_CHECKING:
    from dashinfer_vlm.engine.info import EngineInfo

__all__ = ["announce", "set_up_logging"]

logger = logging.getLogger(__name__)


def set_up_logging(level: str, format: LogFormat = "text") -> None:
    """Log this package from `level` on, and what others say from warnings on: their notes may name a client's media.

    The engine process takes the root's level; its own account of loading would break into the bar.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format == "json" else DefaultFormatter("%(levelprefix)s %(message)s"))
    logging.basicConfig(handlers=[handler], level="WARNING" if level == "info" else level.upper())
    logging.getLogger("dashinfer_vlm").setLevel(level.upper())


def announce(name: str, info: EngineInfo) -> None:
    """A line that says what was loaded, where, as what, and what fits into the KV cache, and lines that say what states
    mean for a model that has them, and which adapter was merged."""
    logger.info(
        "Loaded %s on %s as %s, KV cache as %s: %s blocks of %d tokens hold %s tokens; "
        "%d requests at once, %s tokens each at most",
        name,
        info.device,
        info.precision,
        info.kv_dtype,
        f"{info.num_blocks:,}",
        info.block_size,
        f"{info.num_blocks * info.block_size:,}",
        info.max_num_seqs,
        f"{info.max_model_len:,}",
    )
    if info.lora is not None:
        logger.info("The LoRA adapter in %s is merged into its weights", info.lora)
    if info.state_bytes:
        logger.info(
            "Each request has a state of %.2f MiB; there is room for %s, with those that a prefix cache keeps",
            info.state_bytes / 2**20,
            f"{info.num_states:,}",
        )
