"""Prompts that are cut to a length that their sender names, as in vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dashinfer_vlm.errors import InvalidRequestError

__all__ = ["Truncation", "TruncationSide"]

TruncationSide = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Truncation:
    """A prompt keeps `num_tokens` of its tokens, images and videos counted as one each; -1: as many as leave room for
    the answer."""

    num_tokens: int
    side: TruncationSide = "left"
    """Where tokens are taken away: on the left, so that the last ones stay, or on the right."""

    def cut(self, ids: Sequence[int], max_model_len: int, max_tokens: int | None) -> list[int]:
        """`ids`, shorter where they are longer. Raises InvalidRequestError for a length that does not fit the context
        together with an answer of `max_tokens`, or of one token where that is None."""
        room = max(0, max_model_len - (max_tokens or 1))
        if self.num_tokens != -1 and not 1 <= self.num_tokens <= room:
            raise InvalidRequestError(
                f"truncate_prompt_tokens is {self.num_tokens}; it must be from 1 to {room}, which leaves room for the "
                "answer, or -1 for as many as fit",
                param="truncate_prompt_tokens",
            )
        num_kept = room if self.num_tokens == -1 else self.num_tokens
        if len(ids) <= num_kept:
            return list(ids)
        return list(ids[len(ids) - num_kept :] if self.side == "left" else ids[:num_kept])
