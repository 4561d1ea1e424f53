"""What comes back from the offline API."""

from __future__ import annotations

from dataclasses import dataclass, field

from dashinfer_vlm.errors import DashInferError
from dashinfer_vlm.frontend.answers import Answer
from dashinfer_vlm.frontend.deltas import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All answers to one prompt, or, in a list of results, the error that it met instead."""

    answers: tuple[Answer, ...] = ()
    usage: Usage = field(default_factory=lambda: Usage(0, 0, 0))
    error: DashInferError | None = None

    @property
    def text(self) -> str:
        """Text of the first answer; raises `error` where there is one."""
        return self.first.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first answer; raises `error` where there is one."""
        return self.first.token_ids

    @property
    def first(self) -> Answer:
        if self.error:
            raise self.error
        return self.answers[0]
