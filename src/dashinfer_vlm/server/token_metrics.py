"""What is counted for every token. The counters of `prometheus_client` take a lock each time, since several threads may
write; here the event loop alone writes, and who scrapes reads."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric

__all__ = ["TokenMetrics"]


class TokenMetrics:
    """Collector of the tokens that were sent, and of the seconds between two of them."""

    def __init__(self, prefix: str, bounds: Sequence[float]) -> None:
        """`bounds` of the histogram's buckets, ascending, without infinity."""
        self._prefix = prefix
        self._bounds = [float(bound) for bound in bounds]
        self._counts = [0] * (len(bounds) + 1)
        self._num_tokens = 0
        self.seconds = 0.0
        """Of all gaps."""

    def sent(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens

    def waited(self, num_tokens: int, seconds: float) -> None:
        """So many tokens came at once, so long after the ones before."""
        self._counts[bisect_left(self._bounds, seconds / num_tokens)] += num_tokens
        self.seconds += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """The upper bound of each, and how many gaps are not longer."""
        return list(zip([*map(str, self._bounds), "+Inf"], accumulate(self._counts), strict=True))

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            f"{self._prefix}output_tokens", "Tokens that were sent to clients.", value=self._num_tokens
        )
        yield HistogramMetricFamily(
            f"{self._prefix}inter_token_seconds",
            "Seconds between two tokens of an answer.",
            buckets=self.buckets(),
            sum_value=self.seconds,
        )
