"""Numbers about a running engine, for metrics, logs and tests."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges describe now, counters (`num_..._total`) only grow."""

    num_waiting: int = 0
    num_running: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Blocks that nobody holds; cached prefixes among them count as free."""
    num_steps_total: int = 0
    num_prompt_tokens_total: int = 0
    num_cached_tokens_total: int = 0
    num_computed_tokens_total: int = 0
    num_output_tokens_total: int = 0
    num_draft_tokens_total: int = 0
    """Tokens that were guessed and computed (speculative decoding)."""
    num_accepted_draft_tokens_total: int = 0
    """... of them right: each spared a row of a later step."""
    num_preemptions_total: int = 0
    num_items_encoded_total: int = 0
    num_items_encoded_elsewhere_total: int = 0
    """... of them by vision workers, here or on other machines."""
    num_patches_encoded_total: int = 0
    num_encoder_failures_total: int = 0
    num_encoder_retries_total: int = 0
    """Items that were tried again, after a batch had failed or its encoder had died."""
    num_encoder_restarts_total: int = 0
    """Vision workers that were started in place of another one."""
    num_encoders: int = 0
    """Vision workers that are ready, here or on other machines."""
    embedding_hits_total: int = 0
    embedding_misses_total: int = 0
    embedding_bytes: int = 0
    shared_cache_hits_total: int = 0
    shared_cache_misses_total: int = 0
    shared_cache_read_bytes_total: int = 0
    shared_cache_written_bytes_total: int = 0
    shared_cache_errors_total: int = 0
    """Commands to Redis that failed and values that were no use."""
    shared_cache_dropped_total: int = 0
    """Embeddings that were not written, since Redis was away or slow."""
    step_seconds_total: float = 0.0
    encoder_seconds_total: float = 0.0
