"""Where the machine's time goes under load, by the server's own counters, and how far that is from the floor.

The engine times its model calls, the choice of tokens and the encoder's slices. A call that holds streams and prompts
is divided by what the scheduler has learnt that each costs (`engine.times`): reading the weights and the streams' rows
count as decode, the tokens of prompts as prefill. What is left of the time in which the engine had something to do is
the host's; the rest is idle.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dashinfer_vlm.bench.floor import Amounts, Floor, Rates, Work
from dashinfer_vlm.bench.readings import Readings
from dashinfer_vlm.stages import STAGES

__all__ = ["Breakdown", "TimePart", "Wait", "amounts", "break_down"]


@dataclass(frozen=True, slots=True)
class TimePart:
    """One kind of the machine's time."""

    name: str
    seconds: float
    num_steps: int | None = None
    floor_s: float | None = None
    """What it would take at the machine's full speed."""
    streams: tuple[TimePart, ...] = ()
    """Of decode: the same by the number of streams in a step, the most first."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A stage that requests pass; those of several requests overlap."""

    num: int
    mean_s: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Of all rounds of one target. The parts add up to `wall_s`, but for an encoder that has processors of its own."""

    wall_s: float
    num_requests: int
    parts: tuple[TimePart, ...]
    waits: dict[str, Wait]
    floor: Floor | None
    """None: the model's folder or the processor's rates are not known here."""

    @property
    def share_of_floor(self) -> float | None:
        """Requests per second, as a share of the floor's."""
        return None if self.floor is None else self.floor.seconds / self.wall_s

    def as_json(self) -> dict[str, Any]:
        """Times in seconds, of all requests together."""
        return {**asdict(self), "share_of_floor": self.share_of_floor}


def break_down(readings: Readings, num_clients: int, work: Work | None, rates: Rates | None) -> Breakdown:
    """`work` is that of the server's model, `rates` are those of its machine; without either there is no floor."""
    of = readings.of
    num_requests = round(of("request_seconds_count"))
    floor = None
    if work is not None and rates is not None and num_requests:
        floor = Floor.of(work, rates, amounts(readings), num_clients)
    floors = (floor.encoder_s, floor.prefill_s, floor.decode_s) if floor else (None, None, None)
    streams = _streams(readings)
    decode_s, prefill_s, sampling_s, encoder_s = (
        sum(part.seconds for part in streams),
        of("engine_prefill_seconds_total"),
        of("engine_sampling_seconds_total"),
        of("engine_encoder_seconds_total"),
    )
    is_elsewhere = readings.num_encoders > 0
    busy_s = of("engine_busy_seconds_total")
    timed_s = decode_s + prefill_s + sampling_s + (0.0 if is_elsewhere else encoder_s)
    parts = (
        TimePart("vision encoder" + (", elsewhere" if is_elsewhere else ""), encoder_s, None, floors[0]),
        TimePart("prompts", prefill_s, None, floors[1]),
        TimePart("decode", decode_s, sum(part.num_steps or 0 for part in streams), floors[2], streams),
        TimePart("choice of tokens", sampling_s),
        TimePart("host", max(0.0, busy_s - timed_s)),
        TimePart("idle", max(0.0, readings.wall_s - busy_s)),
    )
    return Breakdown(readings.wall_s, num_requests, parts, _waits(readings), floor)


def amounts(readings: Readings) -> Amounts:
    """What the requests needed, whatever was computed twice."""
    of = readings.of
    num_answers = sum(readings.by_label("choices_total").values())
    return Amounts(
        num_items=of("engine_num_items_encoded_total"),
        num_patches=of("engine_num_patches_encoded_total"),
        num_prompts=of("request_seconds_count"),
        num_prompt_tokens=of("engine_num_prompt_tokens_total") - of("engine_num_cached_tokens_total"),
        num_decoded=max(0.0, of("engine_num_output_tokens_total") - num_answers),
    )


def _streams(readings: Readings) -> tuple[TimePart, ...]:
    seconds = readings.by_label("engine_decode_seconds_total")
    return tuple(
        TimePart(streams, seconds[streams], round(readings.of("engine_decode_steps_total", streams)))
        for streams in sorted(seconds, key=int, reverse=True)
    )


def _waits(readings: Readings) -> dict[str, Wait]:
    counts = {stage: readings.of("stage_seconds_count", stage) for stage in STAGES}
    return {
        stage: Wait(round(num), readings.of("stage_seconds_sum", stage) / num) for stage, num in counts.items() if num
    }
