"""Where the engine's time goes: on streams, on prompts, on choosing tokens, and on all that lies between."""

from __future__ import annotations

import time
from collections import Counter, defaultdict

from dashinfer_vlm.engine.cost import StepCost
from dashinfer_vlm.engine.steps import Plan

__all__ = ["StepTimes", "streams_label"]

_FEW_STREAMS = 8


class StepTimes:
    """Totals since the start, in seconds. The encoder's are its stage's."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.prefill_s = 0.0
        self.sampling_s = 0.0
        self.decode_s: defaultdict[int, float] = defaultdict(float)  # by `streams_label`
        self.decode_steps: Counter[int] = Counter()
        self._since_s: float | None = None  # there has been something to do since then

    def begin(self) -> None:
        """A step begins. The time since the last one counts as busy if there was something left to do."""
        if self._since_s is None:
            self._since_s = time.perf_counter()

    def end(self, *, goes_on: bool) -> None:
        """The step is over; `goes_on` if another one is due."""
        assert self._since_s is not None, "a step ends that has not begun"
        now_s = time.perf_counter()
        self.busy_s += now_s - self._since_s
        self._since_s = now_s if goes_on else None

    def add(self, plan: Plan, seconds: float, sampling_s: float, cost: StepCost) -> None:
        """Divide a step of `seconds` between its streams and its prompts, as `cost` says that they take time; the
        choice of tokens comes off first."""
        streams = [chunk for chunk in plan.chunks if chunk.is_decode]
        num_rows = plan.num_decode_rows
        decode_s, prefill_s = cost.split(seconds - sampling_s, num_rows, plan.num_tokens - num_rows)
        self.sampling_s += sampling_s
        self.prefill_s += prefill_s
        if streams:
            label = streams_label(len(streams))
            self.decode_s[label] += decode_s
            self.decode_steps[label] += 1


def streams_label(num_streams: int) -> int:
    """Up to 8 the number itself, above it the next power of two: few enough for a metric's label."""
    return num_streams if num_streams <= _FEW_STREAMS else 1 << (num_streams - 1).bit_length()
