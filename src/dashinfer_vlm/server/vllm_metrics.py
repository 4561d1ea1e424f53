"""What we count, under vLLM's names and with its labels and buckets, so that dashboards, alerts and autoscalers made
for it work here: those of vLLM 0.33 that mean something in this server (docs/deployment.md has the table)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.frontend.observer import AnswerReport, CallReport
from dashinfer_vlm.media.types import MediaCounters
from dashinfer_vlm.server.token_metrics import TokenMetrics

_LABELS = ("model_name", "engine")
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_NUM_ANSWERS = (1, 2, 5, 10, 20)
_REASONS = {"tool_calls": "stop", "timeout": "abort"}
"""Ours that vLLM does not have."""


def _used(stats: EngineStats) -> float:
    return 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0


_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("num_requests_running", "Requests that are prefilled or decode.", lambda s: s.num_running),
    ("num_requests_waiting", "Requests that wait for a place in the engine.", lambda s: s.num_waiting),
    ("kv_cache_usage_perc", "Share of the KV cache that is held; 1 is all of it.", _used),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("prompt_tokens", "Tokens of prompts.", lambda s: s.num_prompt_tokens_total),
    ("prompt_tokens_cached", "Those that were found in the prefix cache.", lambda s: s.num_cached_tokens_total),
    ("prefix_cache_queries", "Tokens that were looked for in the prefix cache.", lambda s: s.num_prompt_tokens_total),
    ("prefix_cache_hits", "Tokens that were found there.", lambda s: s.num_cached_tokens_total),
    ("generation_tokens", "Tokens that were generated.", lambda s: s.num_output_tokens_total),
    ("num_preemptions", "Requests that had to begin anew.", lambda s: s.num_preemptions_total),
    ("spec_decode_num_draft_tokens", "Tokens that were guessed.", lambda s: s.num_draft_tokens_total),
    ("spec_decode_num_accepted_tokens", "Guesses that were right.", lambda s: s.num_accepted_draft_tokens_total),
)


class VllmMetrics:
    """Told of calls and of states; a collector of what follows from states."""

    def __init__(self, registry: CollectorRegistry, model_name: str, info: EngineInfo, gaps: TokenMetrics) -> None:
        """`gaps` know the seconds between tokens, with all of vLLM's buckets and maybe more."""
        self._registry = registry
        self._values = (model_name, "0")
        self._info = info
        self._gaps = gaps
        self._engine: EngineStats | None = None
        self._media = MediaCounters()
        tokens = _counts(info.max_model_len)
        self._first = self._histogram("time_to_first_token_seconds", "To the first token.", _FIRST_TOKEN_S)
        self._whole = self._histogram("e2e_request_latency_seconds", "Of whole requests.", _REQUEST_S)
        self._queue = self._histogram("request_queue_time_seconds", "Until a request first runs.", _REQUEST_S)
        self._prefill = self._histogram("request_prefill_time_seconds", "From there to its first token.", _REQUEST_S)
        self._decode = self._histogram("request_decode_time_seconds", "From there to its last token.", _REQUEST_S)
        self._inference = self._histogram("request_inference_time_seconds", "Prefill and decode.", _REQUEST_S)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Between tokens, the mean of an answer.", _BETWEEN_TOKENS_S
        )
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", tokens)
        self._computed = self._histogram(
            "request_prefill_kv_computed_tokens", "Those that were not found in the prefix cache.", tokens
        )
        self._generated = self._histogram("request_generation_tokens", "Tokens of an answer.", tokens)
        self._longest = self._histogram(
            "request_max_num_generation_tokens", "Tokens of a request's longest answer.", tokens
        )
        self._max_tokens = self._histogram("request_params_max_tokens", "The parameter max_tokens.", tokens)
        self._num_answers = self._histogram("request_params_n", "The parameter n.", _NUM_ANSWERS)
        self._ends = Counter(
            "vllm:request_success", "Answers by how they ended.", [*_LABELS, "finished_reason"], registry=registry
        )
        for reason in ("stop", "length", "abort", "error"):
            self._ends.labels(*self._values, reason)
        registry.register(self)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def ended(self, report: CallReport) -> None:
        self._whole.observe(report.seconds)
        self._prompt.observe(report.num_prompt_tokens)
        self._computed.observe(report.num_prompt_tokens - report.num_cached_tokens)
        self._longest.observe(max(answer.num_tokens for answer in report.answers))
        self._num_answers.observe(report.answers_per_prompt)
        if report.sampling.max_tokens is not None:
            self._max_tokens.observe(report.sampling.max_tokens)
        for answer in report.answers:
            self._answered(answer)

    def update(self, engine: EngineStats | None, media: MediaCounters) -> None:
        """What `collect` tells; None of an engine that does not answer."""
        self._engine, self._media = engine, media

    def collect(self) -> Iterator[Metric]:
        yield self._between_tokens()
        info = self._info
        facts = {"block_size": info.block_size, "num_gpu_blocks": info.num_blocks, "cache_dtype": info.kv_dtype}
        cache = GaugeMetricFamily("vllm:cache_config_info", "Facts about the KV cache.", labels=[*_LABELS, *facts])
        cache.add_metric([*self._values, *map(str, facts.values())], 1)
        yield cache
        hits, misses = self._media.cache_hits, self._media.cache_misses
        yield self._counter("mm_cache_queries", "Pictures and videos that were looked for.", hits + misses)
        yield self._counter("mm_cache_hits", "Those that were found decoded in memory.", hits)
        if (stats := self._engine) is not None:
            for name, words, read in _GAUGES:
                gauge = GaugeMetricFamily(f"vllm:{name}", words, labels=_LABELS)
                gauge.add_metric(self._values, read(stats))
                yield gauge
            yield from (self._counter(name, words, read(stats)) for name, words, read in _COUNTERS)
            yield from self._sources(stats)

    def _answered(self, answer: AnswerReport) -> None:
        self._generated.observe(answer.num_tokens)
        self._ends.labels(*self._values, _REASONS.get(answer.reason, answer.reason)).inc()
        seconds = {span.stage: span.seconds for span in answer.spans}
        if (queue_s := seconds.get("prefill_wait")) is not None:
            self._queue.observe(queue_s)
        if answer.first_token_s is None or answer.last_token_s is None:
            return
        decode_s = answer.last_token_s - answer.first_token_s
        self._decode.observe(decode_s)
        if answer.num_tokens > 1:
            self._per_token.observe(decode_s / (answer.num_tokens - 1))
        if (prefill_s := seconds.get("prefill")) is not None:
            self._prefill.observe(prefill_s)
            self._inference.observe(prefill_s + decode_s)

    def _between_tokens(self) -> HistogramMetricFamily:
        """Ours, which every token is counted in, by vLLM's name and buckets."""
        counts = dict(self._gaps.buckets())
        bounds = [*map(str, _BETWEEN_TOKENS_S), "+Inf"]
        family = HistogramMetricFamily("vllm:inter_token_latency_seconds", "Between two tokens.", labels=_LABELS)
        family.add_metric(self._values, [(bound, counts[bound]) for bound in bounds], self._gaps.seconds)
        return family

    def _sources(self, stats: EngineStats) -> Iterator[CounterMetricFamily]:
        labels, cached = [*_LABELS, "source"], stats.num_cached_tokens_total
        words = "Tokens of prompts by where their KV came from."
        family = CounterMetricFamily("vllm:prompt_tokens_by_source", words, labels=labels)
        family.add_metric([*self._values, "local_compute"], stats.num_prompt_tokens_total - cached)
        family.add_metric([*self._values, "local_cache_hit"], cached)
        yield family
        words = "Those that were found in the prefix cache, by where that is: the device's memory."
        found = CounterMetricFamily("vllm:prompt_tokens_cached_by_source", words, labels=labels)
        found.add_metric([*self._values, "device"], cached)
        yield found

    def _counter(self, name: str, words: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(f"vllm:{name}", words, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"vllm:{name}", words, _LABELS, buckets=buckets, registry=self._registry)
        return made.labels(*self._values)


def _counts(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `most`."""
    return tuple(n * 10**power for power in range(len(str(most))) for n in (1, 2, 5) if n * 10**power <= most)
