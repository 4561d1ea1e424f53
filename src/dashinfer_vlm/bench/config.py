"""What `bench serve` measures. Values are checked and never adjusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dashinfer_vlm.bench.target import Target
from dashinfer_vlm.bench.workloads import WORKLOADS, Size, Work, WorkloadName, named
from dashinfer_vlm.errors import ConfigError

__all__ = ["ServeBench", "parse_size"]

MAX_IMAGE_SIDE = 8192
"""Pixels. Pictures are made before the first request; a server of ours takes 64 million pixels."""
MAX_SECONDS = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBench:
    """One workload on one or several targets in turn."""

    targets: tuple[Target, ...]
    workload: WorkloadName
    clients: int = 8
    requests: int = 24
    """Of one round, turns counted one by one."""
    rounds: int = 2
    warmup: int | None = None
    """Conversations before the first round of each target; None: one per client."""
    output_tokens: int | None = None
    """None: as the workload says."""
    prompt_words: int = 32
    image_size: Size | None = None
    """Width and height in pixels; None: as the workload says."""
    seconds: float = 60.0
    """Of `mixed`: how long each of its two windows is."""
    every: float = 12.0
    """Of `mixed`: seconds between two pictures."""
    seed: int = 0
    timeout_s: float = 900.0
    """Silence after which a request has failed."""
    api_key: str | None = field(default=None, repr=False)
    pids: Mapping[str, int] = field(default_factory=dict)
    """Target name to process id of its server."""
    breakdown: bool = False
    """Also tell where the time of our servers goes."""
    pause_idle: bool = False
    """Hold all other targets still while one is measured."""

    @property
    def num_conversations(self) -> int:
        return self.requests // WORKLOADS[self.workload].num_turns

    @property
    def num_warmup(self) -> int:
        return self.clients if self.warmup is None else self.warmup

    def work(self) -> Work:
        return named(
            self.workload,
            prompt_words=self.prompt_words,
            seed=self.seed,
            output_tokens=self.output_tokens,
            image_size=self.image_size,
        )

    def validate(self) -> None:
        """Raise ConfigError for the first value that cannot be measured with."""
        self._check_targets()
        for name, value, least in (
            ("--clients", self.clients, 1),
            ("--requests", self.requests, 1),
            ("--rounds", self.rounds, 1),
            ("--warmup", self.num_warmup, 0),
            ("--output-tokens", 2 if self.output_tokens is None else self.output_tokens, 2),
            ("--prompt-words", self.prompt_words, 1),
            ("--image-size", min(self.image_size or (28, 28)), 28),
            ("--every", self.every, 0.1),
            ("--seconds", self.seconds, self.every),
            ("--timeout-s", self.timeout_s, 1),
            ("--seed", self.seed, 0),
        ):
            if not value >= least:  # also false for NaN
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        for name, value, most in (
            ("--image-size", max(self.image_size or (28, 28)), MAX_IMAGE_SIDE),
            ("--seconds", self.seconds, MAX_SECONDS),
        ):
            if value > most:
                raise ConfigError(f"{name} is {value}; it must be at most {most}")
        turns = WORKLOADS[self.workload].num_turns
        if self.requests % turns:
            raise ConfigError(f"--requests is {self.requests}; {self.workload} needs a multiple of its {turns} turns")

    def _check_targets(self) -> None:
        names = [target.name for target in self.targets]
        if not names:
            raise ConfigError("no --target is given; name one, such as ours=http://localhost:8000")
        if len(set(names)) < len(names):
            raise ConfigError(f"two targets have the same name: {', '.join(names)}")
        for name in self.pids:
            if name not in names:
                raise ConfigError(f"--pid names {name!r}; the targets are {', '.join(names)}")
        if self.pause_idle and len(self.pids) < len(names):
            raise ConfigError("--pause-idle needs the --pid of every target")


def parse_size(text: str) -> Size:
    """`448` or `640x480` as width and height; raises ConfigError."""
    width, separator, height = text.partition("x")
    if not width.isdigit() or (separator and not height.isdigit()):
        raise ConfigError(f"--image-size is {text!r}; it must be pixels, such as 448 or 640x480")
    return int(width), int(height or width)
