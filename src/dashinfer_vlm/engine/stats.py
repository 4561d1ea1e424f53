"""Numbers about a running engine, for metrics, logs and tests."""

from __future__ import annotations

from dashinfer_vlm.encoders.stats import StageStats

__all__ = ["EngineStats"]


class EngineStats(StageStats, kw_only=True):
    """Gauges describe now, counters (`..._total`) only grow; the encoder stage's are among them."""

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
    num_restarts_total: int = 0
    """Engine processes that were started in place of a dead one."""
    step_seconds_total: float = 0.0
    """Model calls and the choice of tokens: `prefill`, `sampling` and `decode_seconds_total` together."""
    busy_seconds_total: float = 0.0
    """Time with something to do: steps, the encoder's slices between them, and what the host does around both."""
    prefill_seconds_total: float = 0.0
    sampling_seconds_total: float = 0.0
    """Choice of tokens, where it is timed apart from the model call (`Flight.sampling_seconds`)."""
    decode_seconds_total: dict[int, float] = {}
    """By the number of streams in the step (`times.streams_label`)."""
    decode_steps_total: dict[int, int] = {}
