"""What a check finds out, and how fast things are on this device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    seconds: float | None = None
    """Median."""
    floor: float | None = None
    """Seconds that the device's own ceilings allow."""
    bar: float | None = None
    """Largest ratio of seconds to floor that is good enough."""
    error: float | None = None
    """Norm of the difference to the reference over the norm of the reference."""
    allowed: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.seconds is None or not self.floor else self.seconds / self.floor

    @property
    def verdict(self) -> str:
        if self.error is not None and not self.error <= (self.allowed or 0):  # NaN too
            return "WRONG"
        if self.ratio is None or self.bar is None:
            return "ok" if self.error is not None else ""
        return "ok" if self.ratio <= self.bar else "slow"


@dataclass(slots=True)
class Ceilings:
    """What the device reaches in its best cases: the measure of everything else."""

    bytes_per_s: float = float("nan")
    flops_per_s: float = float("nan")
    attention_share: float = 0.7
    """Of the rate of products that attention can reach."""

    def seconds(self, num_bytes: float = 0, flops: float = 0, attention_flops: float = 0) -> float:
        """The larger of the time to move bytes and the time for the arithmetic."""
        work = flops / self.flops_per_s + attention_flops / (self.flops_per_s * self.attention_share)
        return max(num_bytes / self.bytes_per_s, work)


@dataclass(slots=True)
class Setting:
    """How the checks run."""

    device: torch.device
    tiny: bool
    """Sizes that a CPU does in seconds: a rehearsal, not a measurement."""
    ceilings: Ceilings = field(default_factory=Ceilings)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, call: Callable[[], object], *, rounds: int = 20) -> float:
        """Median seconds of `call` on the device, after two calls that warm up; between them the cache is
        overwritten."""
        rounds = 1 if self.tiny else rounds
        for _ in range(0 if self.tiny else 2):
            call()
        if self.device.type != "cuda":
            return _median([_host_seconds(call) for _ in range(rounds)])
        flush = torch.empty(1 << 28, dtype=torch.uint8, device=self.device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for begin, end in events:
            flush.zero_()
            begin.record()
            call()
            end.record()
        self.wait()
        return _median([begin.elapsed_time(end) / 1e3 for begin, end in events])


def _host_seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def table(rows: list[Row]) -> str:
    """For people."""

    def number(value: float | None, scale: float = 1, form: str = ".3f") -> str:
        return "" if value is None else f"{value * scale:{form}}"

    lines = [f"{'name':<44} {'ms':>10} {'floor':>10} {'ratio':>7} {'bar':>5} {'error':>9}  verdict"]
    for row in rows:
        numbers = f"{number(row.seconds, 1e3):>10} {number(row.floor, 1e3):>10} {number(row.ratio, 1, '.2f'):>7}"
        wrong = f"{number(row.bar, 1, '.2f'):>5} {number(row.error, 1, '.1e'):>9}"
        lines.append(f"{row.name:<44} {numbers} {wrong}  {row.verdict} {row.note}".rstrip())
    return "\n".join(lines)
