"""Numbers about an encoder stage; free of torch, since every process may read them."""

from __future__ import annotations

import msgspec

__all__ = ["StageStats"]


class StageStats(msgspec.Struct, kw_only=True):
    """What a stage has done since its start (`..._total`), and how it is doing; zero where a stage has no such
    thing."""

    num_items_encoded_total: int = 0
    num_items_encoded_elsewhere_total: int = 0
    """... of them by vision workers, here or on other machines."""
    num_patches_encoded_total: int = 0
    num_encoder_failures_total: int = 0
    """Items that were given up."""
    num_encoder_retries_total: int = 0
    """Items that were tried again, after a batch had failed or its encoder had died."""
    num_encoder_restarts_total: int = 0
    """Vision workers that were started in place of another one."""
    num_encoders: int = 0
    """Vision workers that are ready, here or on other machines."""
    encoder_seconds_total: float = 0.0
    """Time of all encoders together."""
    embedding_hits_total: int = 0
    embedding_misses_total: int = 0
    embedding_bytes: int = 0
    shared_cache_hits_total: int = 0
    shared_cache_misses_total: int = 0
    """Embeddings that were asked for and not delivered: missing, unusable, late, or Redis was away."""
    shared_cache_read_bytes_total: int = 0
    shared_cache_written_bytes_total: int = 0
    shared_cache_errors_total: int = 0
    """Commands to Redis that failed, and values that could not be used."""
    shared_cache_dropped_total: int = 0
    """Embeddings that were not written, since Redis was away or slow."""
