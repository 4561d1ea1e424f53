"""What a request must satisfy before it is accepted: every check that needs no model call."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import (
    ConfigError,
    ContextLengthError,
    InvalidRequestError,
    MediaTooLargeError,
    UnsupportedError,
)
from dashinfer_vlm.models.base import KVCache, Model
from dashinfer_vlm.models.settings import resolve_max_model_len
from dashinfer_vlm.request import Item, Request

_MOST_POSITION = 2**31
_MOST_ID = 2**63
"""Positions and placeholders are below these; larger ones would not fit the arrays that all requests of a step
share."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request is held against."""

    max_model_len: int
    vocab_size: int
    hidden_size: int
    embedding_size: int
    """Columns of an item's rows; ready-made embeddings may also have `hidden_size` of them."""
    max_item_patches: int
    """What the encoder has memory for; 0 without an encoder."""
    has_head: bool
    """Whether there are logits to choose tokens by."""

    @classmethod
    def of(cls, model: Model, kv: KVCache, config: EngineConfig, *, max_item_patches: int) -> Limits:
        """Raises ConfigError when the context is longer than the model's or does not fit the KV cache."""
        max_model_len = resolve_max_model_len(model.text.max_position_embeddings, config)
        capacity = kv.num_blocks * kv.block_size
        if capacity < max_model_len:
            raise ConfigError(
                f"the KV cache holds {capacity} tokens, fewer than one request of {max_model_len}; "
                "raise --kv-cache-gib or lower --max-model-len"
            )
        text = model.text
        sizes = (text.vocab_size, text.hidden_size, model.embedding_size)
        return cls(max_model_len, *sizes, max_item_patches, text.has_head)


def check_request(request: Request, limits: Limits) -> int:
    """How many tokens the request may produce; raises InvalidRequestError or ContextLengthError."""
    request.params.validate(limits.vocab_size)
    if not request.wants_vector and not limits.has_head:
        raise UnsupportedError("the model has no head to write with: it was published for vectors, or for scores")
    num_prompt = len(request.prompt_ids)
    if not num_prompt:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    room = limits.max_model_len - num_prompt
    if room < 1:
        raise ContextLengthError(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, the prompt has "
            f"{num_prompt}; shorten it or start with --max-model-len.",
            param="messages",
        )
    max_tokens = request.params.max_tokens
    if max_tokens is not None and max_tokens > room:
        raise ContextLengthError(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, the prompt has "
            f"{num_prompt} and max_tokens asks for {max_tokens} more; ask for at most {room}.",
            param="max_tokens",
        )
    _check_ids(request, limits)
    _check_positions(request)
    if request.params.prompt_logprobs is not None:
        _check_words(request.prompt_ids, 0, num_prompt, limits.vocab_size)  # placeholders have log probabilities too
    return room if max_tokens is None else max_tokens


def _check_ids(request: Request, limits: Limits) -> None:
    """Items lie in order, inside the prompt, without overlap; every other id is a word of the vocabulary."""
    end = 0
    _check_parts(request.items)
    for item in request.items:
        _check_item(item, limits)
        if item.start < end or item.start + item.num_tokens > len(request.prompt_ids):
            raise InvalidRequestError(
                f"an item covers tokens {item.start} to {item.start + item.num_tokens}; items must follow each other "
                f"inside the prompt of {len(request.prompt_ids)} tokens"
            )
        _check_words(request.prompt_ids, end, item.start, limits.vocab_size)
        end = item.start + item.num_tokens
        placeholders = request.prompt_ids[item.start : end]
        if placeholders and (min(placeholders) < 0 or max(placeholders) >= _MOST_ID):
            raise InvalidRequestError("a placeholder of an item is not from 0 to 2**63 - 1", param="prompt")
    _check_words(request.prompt_ids, end, len(request.prompt_ids), limits.vocab_size)


def _check_words(ids: list[int], start: int, stop: int, vocab_size: int) -> None:
    words = ids[start:stop]
    if words and (min(words) < 0 or max(words) >= vocab_size):
        index = next(i for i in range(start, stop) if not 0 <= ids[i] < vocab_size)
        raise InvalidRequestError(
            f"token {index} of the prompt is {ids[index]}; the vocabulary has {vocab_size} ids", param="prompt"
        )


def _check_parts(items: tuple[Item, ...]) -> None:
    """The parts of an item follow each other, whole and in order: the last one stands for the encoder's work."""
    content, next_row = b"", 0
    for item in items:
        if item.first_row != next_row or (next_row and item.content_hash != content):
            raise InvalidRequestError(f"an item begins with row {item.first_row} of its embedding, not {next_row}")
        if item.first_row + item.num_tokens > item.num_rows:
            raise InvalidRequestError(f"an item has more placeholders than its embedding's {item.num_rows} rows")
        content, next_row = item.content_hash, 0 if item.is_last_part else item.first_row + item.num_tokens
    if next_row:
        raise InvalidRequestError(f"the last item ends with row {next_row} of {items[-1].num_rows}")


def _check_item(item: Item, limits: Limits) -> None:
    if item.num_tokens < 1:
        raise InvalidRequestError(f"an item stands for {item.num_tokens} tokens; it needs at least 1")
    if (item.patches is None) == (item.embedding is None):
        raise InvalidRequestError("an item needs either patches or an embedding")
    if item.embedding is not None:
        _check_embedding(item.num_rows, tuple(item.embedding.shape), limits)
    if item.patches is not None and not limits.max_item_patches:
        raise InvalidRequestError(f"the model takes no {item.kind} input")
    if item.patches is not None and item.grid is None:
        raise InvalidRequestError("an item with patches needs its grid")
    if item.grid is not None and item.patches is not None and math.prod(item.grid) > limits.max_item_patches:
        raise MediaTooLargeError(
            f"an item has {math.prod(item.grid)} patches; the encoder has memory for {limits.max_item_patches}; "
            "send a smaller one"
        )


def _check_embedding(num_tokens: int, shape: tuple[int, ...], limits: Limits) -> None:
    widths = sorted({limits.hidden_size, limits.embedding_size})
    if shape not in [(num_tokens, width) for width in widths]:
        wanted = " or ".join(str((num_tokens, width)) for width in widths)
        raise InvalidRequestError(f"an embedding has shape {shape}; the model and the item's grid ask for {wanted}")


def _check_positions(request: Request) -> None:
    if request.positions is None:
        return
    expected = 3 * len(request.prompt_ids)
    if request.positions.numel() != expected or request.positions.shape[0] != 3:
        raise InvalidRequestError(
            f"positions have shape {tuple(request.positions.shape)}; expected (3, {len(request.prompt_ids)})",
            param="positions",
        )
    if int(request.positions.min()) < 0 or int(request.positions.max()) >= _MOST_POSITION:
        raise InvalidRequestError("positions must be from 0 to 2**31 - 1", param="positions")
