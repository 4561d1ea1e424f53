"""What the answers of a batch have cost, as they tell it themselves: those of `/v1/responses` in other words."""

from __future__ import annotations

from dataclasses import astuple

import msgspec

from dashinfer_vlm.frontend.deltas import Usage

__all__ = ["NOTHING", "plus", "usage_of"]

NOTHING = Usage(0, 0, 0)


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


_NONE = _Details()


class _Told(msgspec.Struct):
    prompt_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens: int = 0
    completion_tokens_details: _Details | None = None
    input_tokens: int = 0
    input_tokens_details: _Details | None = None
    output_tokens: int = 0
    output_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    usage: _Told | None = None


def usage_of(answer: bytes) -> Usage:
    """Of the JSON body of an answer; nothing where it tells none."""
    told = msgspec.json.decode(answer, type=_Answer).usage
    if told is None:
        return NOTHING
    prompt = told.prompt_tokens_details or told.input_tokens_details or _NONE
    output = told.completion_tokens_details or told.output_tokens_details or _NONE
    return Usage(
        told.prompt_tokens + told.input_tokens,
        told.completion_tokens + told.output_tokens,
        prompt.cached_tokens,
        output.reasoning_tokens,
    )


def plus(first: Usage, second: Usage) -> Usage:
    """Both together."""
    return Usage(*(a + b for a, b in zip(astuple(first), astuple(second), strict=True)))
