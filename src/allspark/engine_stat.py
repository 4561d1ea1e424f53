"""What an engine tells about a model that runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.models.base import KVCache

__all__ = ["AsEngineStat"]


@dataclass(frozen=True, kw_only=True)
class AsEngineStat:
    """Numbers about a running model. Counters grow from the model's start."""

    model_name: str = ""
    free_token: int = 0
    """Tokens that the KV cache has room for now."""
    total_token: int = 0
    pendding_request: int = 0
    running_request: int = 0
    total_generated_token: int = 0
    total_prefill_token: int = 0
    generate_token_persec: float = 0.0
    """Output tokens per second of computing."""
    process_token_persec: float = 0.0
    """Input and output tokens per second of computing."""
    total_device_memory_pool_size: int = 0
    """Bytes of the KV cache."""
    used_device_memory_pool_size: int = 0
    prefix_cache_hit_token: int = 0
    prefix_cache_miss_token: int = 0
    prefix_cache_hit_rate: float = 0.0
    prefix_cache_miss_rate: float = 0.0

    def dict(self) -> dict[str, Any]:
        return asdict(self)

    def ToString(self) -> str:  # noqa: N802 - the documented name
        return ", ".join(f"{name}: {value}" for name, value in self.dict().items())


def describe(name: str, kv: KVCache, stats: EngineStats) -> AsEngineStat:
    """The documented numbers out of the engine's own."""
    pool_bytes = sum(tensor.nbytes for tensor in (*kv.keys, *kv.values))
    prompt, hit = stats.num_prompt_tokens_total, stats.num_cached_tokens_total
    seconds = stats.step_seconds_total or 1.0
    return AsEngineStat(
        model_name=name,
        free_token=stats.num_free_blocks * kv.block_size,
        total_token=stats.num_blocks * kv.block_size,
        pendding_request=stats.num_waiting,
        running_request=stats.num_running,
        total_generated_token=stats.num_output_tokens_total,
        total_prefill_token=prompt,
        generate_token_persec=stats.num_output_tokens_total / seconds,
        process_token_persec=stats.num_computed_tokens_total / seconds,
        total_device_memory_pool_size=pool_bytes,
        used_device_memory_pool_size=pool_bytes
        * (stats.num_blocks - stats.num_free_blocks)
        // max(stats.num_blocks, 1),
        prefix_cache_hit_token=hit,
        prefix_cache_miss_token=prompt - hit,
        prefix_cache_hit_rate=hit / prompt if prompt else 0.0,
        prefix_cache_miss_rate=(prompt - hit) / prompt if prompt else 0.0,
    )
