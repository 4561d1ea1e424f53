"""One engine in this process, without HTTP: what a decode step, a prompt and a picture take, and which part takes
it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from dashinfer_vlm.allocator import keep_freed_memory
from dashinfer_vlm.bench.instruments import instrument, instrumented_loading
from dashinfer_vlm.bench.spans import Part, Spans
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.stage import EncoderStage
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.errors import ConfigError, EngineError
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.request import Item, Output, Request, SamplingParams

__all__ = ["LatencyBench", "Limits", "Phase", "measure_latency"]

_SIZE_PX = 28  # a token of a picture, in all supported models: sizes that need no resize
_NO_HURRY_S = 3600.0
_WARM_UP = "warm-up"  # the first prompt and picture, which count for nothing
_WARM_STEPS = 2  # buffers, and the estimates of the scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyBench:
    """Sizes of the work."""

    engine: EngineConfig
    """`model` is a folder."""
    batch: int = 1
    """Sequences that decode at once."""
    prompt_tokens: int = 512
    output_tokens: int = 32
    """Decode steps that are measured."""
    image_size: tuple[int, int] | None = None
    """Width and height in pixels of a picture to encode; None: none."""
    repeats: int = 3
    """Prompts, and pictures, one after the other."""
    breakdown: bool = False
    seed: int = 0

    def validate(self) -> None:
        """Raise ConfigError for the first value that cannot be measured with."""
        self.engine.validate()
        for name in ("batch", "prompt_tokens", "output_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.breakdown and self.engine.parallel_size > 1:
            raise ConfigError("--breakdown looks into one process; leave --parallel-size out")
        if self.image_size is not None and (
            min(self.image_size) < _SIZE_PX or any(n % _SIZE_PX for n in self.image_size)
        ):
            raise ConfigError(f"--image-size is {self.image_size}; both sides must be multiples of {_SIZE_PX} pixels")


@dataclass(frozen=True, slots=True)
class Phase:
    """One kind of work, per step of decoding, per prompt or per picture."""

    name: str
    num_tokens: int
    """Tokens that one of these makes or takes in."""
    seconds: float
    """Median."""
    parts: dict[str, Part]
    """Means by name, the largest first; empty without a breakdown."""

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Limits:
    """What this machine does on large tensors through torch, for scale."""

    read_gb_s: float
    multiply_gflop_s: float

    @classmethod
    def measured(cls) -> Limits:
        """Sums 512 MiB of float32 and multiplies square float32 matrices, the best of a few times each."""
        column = torch.ones(1 << 27)
        square = torch.rand(2048, 2048)
        read_s = min(_seconds(lambda: column.sum()) for _ in range(4))
        multiply_s = min(_seconds(lambda: square @ square) for _ in range(4))
        return cls(column.nbytes / read_s / 1e9, 2 * 2048**3 / multiply_s / 1e9)


def measure_latency(config: LatencyBench, progress: Callable[[str, int, int], None]) -> list[Phase]:
    """Decode, prefill and, with an image size, encode. `progress` hears of loading as in `load_engine`.

    Raises ConfigError and CheckpointError as loading does.
    """
    config.validate()
    keep_freed_memory()  # as the server's engine does
    cuda = config.engine.device != "cpu" and torch.cuda.is_available()
    spans = Spans(sync=torch.cuda.synchronize if cuda else lambda: None)
    with ExitStack() as stack:
        if config.breakdown:
            stack.enter_context(instrumented_loading(spans))
        engine, _ = load_engine(config.engine, progress)
        if config.breakdown:
            stack.enter_context(instrument(engine, spans))
        driver = _Driver(config, engine, spans)
        phases = [driver.prefill(), driver.decode()]
        return phases if config.image_size is None else [*phases, driver.encode(config.image_size)]


class _Driver:
    """Makes the work and times it; every prompt and picture is a new one."""

    def __init__(self, config: LatencyBench, engine: Engine, spans: Spans) -> None:
        self.config = config
        self.engine = engine
        self.spans = spans
        self.rng = np.random.default_rng(config.seed)
        self.count = itertools.count()

    def prefill(self) -> Phase:
        """Whole prompts to their first token, one after the other."""
        seconds = []
        for number in range(-1, self.config.repeats):
            self._add(max_tokens=1)
            with self.spans.phase("prefill" if number >= 0 else _WARM_UP):
                taken_s = _seconds(self._run_dry)
            seconds += [taken_s] if number >= 0 else []
        return self._phase("prefill", self.config.prompt_tokens, seconds)

    def decode(self) -> Phase:
        """Steps in which every sequence of the batch gets one token."""
        waiting = {self._add(max_tokens=None) for _ in range(self.config.batch)}
        ids = tuple(waiting)
        while waiting:
            waiting -= {output.request_id for output in self._step()}
        for _ in range(_WARM_STEPS):
            self._step()
        with self.spans.phase("decode"):
            seconds = [_seconds(self._step) for _ in range(self.config.output_tokens)]
        for request_id in ids:
            self.engine.abort(request_id)
        self._run_dry()
        return self._phase("decode", self.config.batch, seconds)

    def encode(self, size: tuple[int, int]) -> Phase:
        """Pictures through the whole encoder, one after the other, with no text beside them."""
        vision = read_config(Path(self.config.engine.model)).vision
        if vision is None:
            raise ConfigError("a text model has no encoder to measure; measure without --image-size")
        grid = (1, size[1] // vision.patch_size, size[0] // vision.patch_size)
        num_tokens = math.prod(grid) // vision.merge_size**2
        seconds = []
        for number in range(-1, self.config.repeats):
            patches = self.rng.integers(0, 256, (math.prod(grid), vision.patch_dim), dtype=np.uint8)
            content = self.rng.bytes(32)
            item = Item(kind="image", start=0, num_tokens=num_tokens, content_hash=content, grid=grid, patches=patches)
            with self.spans.phase("encode" if number >= 0 else _WARM_UP):
                taken_s = _seconds(lambda item=item: _encode(self.engine.stage, item))  # type: ignore[misc]
            seconds += [taken_s] if number >= 0 else []
        return self._phase("encode", num_tokens, seconds)

    def _add(self, max_tokens: int | None) -> str:
        ids = self.rng.integers(0, self.engine.limits.vocab_size, self.config.prompt_tokens).tolist()
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        request = Request(id=str(next(self.count)), prompt_ids=ids, params=params)
        self.engine.add(request)
        return request.id

    def _step(self) -> list[Output]:
        with self.spans.span("engine, other"):
            return self.engine.step()

    def _run_dry(self) -> None:
        while self.engine.has_work():
            self._step()

    def _phase(self, name: str, num_tokens: int, seconds: list[float]) -> Phase:
        parts = self.spans.take(name) if self.config.breakdown else {}
        return Phase(name, num_tokens, median(seconds), {key: part / len(seconds) for key, part in parts.items()})


def _encode(stage: EncoderStage, item: Item) -> None:
    stage.request(item)
    while stage.has_work():
        stage.advance(_NO_HURRY_S)
    stage.release(item)
    for reason in stage.take_failures().values():
        raise EngineError(reason)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
