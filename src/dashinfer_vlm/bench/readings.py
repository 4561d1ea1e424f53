"""What a server of ours says of itself in `/metrics`: read before and after a round, the difference is the round's."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from dashinfer_vlm.bench.target import BenchError, Target

__all__ = ["Reading", "Readings", "read_metrics"]

_OURS = "dashinfer_engine_busy_seconds_total"


@dataclass(frozen=True, slots=True)
class Reading:
    """All samples of one scrape."""

    time_s: float
    values: Mapping[tuple[str, str], float]
    """By name, and by the value of the one label; empty where there is none."""
    facts: Mapping[str, str]
    """The labels of `dashinfer_engine_info`."""


class Readings:
    """What the counters of one server have grown by, over all rounds."""

    def __init__(self, facts: Mapping[str, str]) -> None:
        self.facts = facts
        self.wall_s = 0.0
        self.num_encoders = 0.0
        """Vision workers, at the end of the latest round."""
        self._grown: defaultdict[tuple[str, str], float] = defaultdict(float)

    def add(self, before: Reading, after: Reading) -> None:
        self.wall_s += after.time_s - before.time_s
        self.num_encoders = after.values.get(("dashinfer_engine_num_encoders", ""), 0.0)
        for key, value in after.values.items():
            self._grown[key] += value - before.values.get(key, 0.0)

    def of(self, name: str, label: str = "") -> float:
        """How much `dashinfer_NAME` has grown."""
        return self._grown[f"dashinfer_{name}", label]

    def by_label(self, name: str) -> dict[str, float]:
        """The same for each value of the label, where it is not 0."""
        return {label: x for (of, label), x in self._grown.items() if of == f"dashinfer_{name}" and label and x}


async def read_metrics(http: httpx.AsyncClient, target: Target) -> Reading:
    """Raises BenchError for a server that is not one of ours, or too old a one."""
    url = f"{target.url.removesuffix('/v1')}/metrics"
    try:
        answer = await http.get(url)
        answer.raise_for_status()
        samples = [s for family in text_string_to_metric_families(answer.text) for s in family.samples]
    except (httpx.HTTPError, ValueError) as error:
        raise BenchError(f"{target.name} has no metrics at {url}: {error}") from error
    values = {(s.name, next(iter(s.labels.values()), "")): s.value for s in samples if len(s.labels) <= 1}
    if (_OURS, "") not in values:
        raise BenchError(
            f"{target.name} does not count its engine's seconds at {url}; --breakdown knows DashInfer-VLM's"
        )
    facts = next((s.labels for s in samples if s.name == "dashinfer_engine_info"), {})
    return Reading(time.perf_counter(), values, facts)
