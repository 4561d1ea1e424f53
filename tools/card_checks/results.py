"""How checks run, and how fast things are on this device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from card_checks.rows import Row

Check = tuple[str, Callable[[], Row]]
"""A name, and what is done for it; what a phase is made of."""


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
    """Where the checks run."""

    device: torch.device
    tiny: bool
    """Sizes that a CPU does in seconds: a rehearsal, not a measurement."""
    ceilings: Ceilings = field(default_factory=Ceilings)

    @property
    def multiplies_floats_of_8_bits(self) -> bool:
        return self.device.type != "cuda" or torch.cuda.get_device_capability(self.device) >= (8, 9)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, call: Callable[[], object], *, rounds: int = 20, as_graph: bool = False) -> float:
        """Median seconds of `call` on the device, after two calls that warm up; between them the cache is overwritten.
        With `as_graph` what it starts is captured and replayed: the host's part is left out."""
        rounds = 1 if self.tiny else rounds
        for _ in range(0 if self.tiny else 2):
            call()
        if self.device.type != "cuda":
            return _median([_host_seconds(call) for _ in range(rounds)])
        if as_graph:
            call = self.captured(call)
        flush = torch.empty(1 << 28, dtype=torch.uint8, device=self.device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for begin, end in events:
            flush.zero_()
            begin.record()
            call()
            end.record()
        self.wait()
        return _median([begin.elapsed_time(end) / 1e3 for begin, end in events])

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """What replays the launches of `call`; on a processor `call` itself."""
        if self.device.type != "cuda":
            return call
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


def _host_seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))
