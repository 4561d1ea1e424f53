"""What is told of answers while they are made: the news of one choice, and the tokens that a call has used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from dashinfer_vlm.frontend.pieces import Piece
from dashinfer_vlm.request import TokenLogprob

__all__ = ["Delta", "EndReason", "Usage"]

_DELTA_BYTES, _ROW_BYTES, _TOP_BYTES = 350, 160, 120
"""What a delta of one token takes, each of its log probabilities, and each token in one; rounded from `tracemalloc`."""
EndReason = Literal["stop", "length", "tool_calls"]


class Delta(msgspec.Struct, frozen=True, kw_only=True, gc=False):  # quick to make: there is one for every token
    """What is new in one choice; the one with `finish_reason` is the choice's last."""

    index: int
    text: str
    """What the model wrote, in complete characters; empty while they are being put together."""
    pieces: tuple[Piece, ...] = ()
    """What that says; may be behind `text`, which may be about to say something else."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token of `token_ids` when asked for; a token may precede its text."""
    finish_reason: EndReason | None = None
    end_ids: tuple[int, ...] = ()
    """The token that ended the choice, where one did; it is not among `token_ids`."""
    prompt_ids: Sequence[int] = ()
    """In the choice's first delta: the prompt."""
    stop: str | None = None
    """The stop string that ended the choice."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        size = _DELTA_BYTES + len(self.text)
        for row in self.logprobs:
            size += _ROW_BYTES + _TOP_BYTES * len(row.top)
        return size

    def merge(self, later: Delta) -> Delta:
        """Both as one; `later` is the next delta of the same choice."""
        return Delta(
            index=self.index,
            text=self.text + later.text,
            pieces=self.pieces + later.pieces,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
            finish_reason=later.finish_reason,
            end_ids=later.end_ids,
            prompt_ids=self.prompt_ids,
            stop=later.stop,
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a call. Each prompt counts once, however many answers were asked of it."""

    num_prompt_tokens: int
    num_output_tokens: int
    """The end-of-sequence token counts, as it was computed."""
    num_cached_tokens: int
    """Prompt tokens that came from the prefix cache, per prompt the most of its choices."""
    num_reasoning_tokens: int = 0
    """Those of the output that are reasoning."""
