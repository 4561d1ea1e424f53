"""Scores of pairs for a caller in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.answers import collect_vectors
from dashinfer_vlm.frontend.messages import Part, TextPart
from dashinfer_vlm.frontend.params import DEFAULT_PARAMS
from dashinfer_vlm.frontend.scores import Pair, check_side, score_of
from dashinfer_vlm.frontend.service import Service
from dashinfer_vlm.offline.background import gather
from dashinfer_vlm.offline.inputs import as_sequence, to_messages

Side: TypeAlias = "str | Sequence[Any]"
"""A text, or a content: a list of texts, images and parts, as a message has it."""
Scores: TypeAlias = NDArray[np.float32]
"""One of each document."""


async def scores_of(
    service: Service, query: Side, documents: Sequence[Side], instruction: str | None, at_once: int
) -> Scores:
    """[documents], as many side by side as `at_once`. Raises what is wrong with the first that fails."""
    if isinstance(documents, str):
        raise InvalidRequestError("documents is a str; pass a list", param="documents")
    if not isinstance(instruction, str | None):
        raise InvalidRequestError(f"instruction is a {type(instruction).__name__}; pass a str", param="instruction")
    gate, asked = asyncio.Semaphore(at_once), await _read(service, query, "query")

    async def one(document: Side, where: str) -> float:
        async with gate:
            pair = Pair(asked, await _read(service, document, where), where)
            (state,) = await collect_vectors(await service.score([pair], DEFAULT_PARAMS, instruction=instruction))
            return score_of(state)

    listed = as_sequence(documents, "documents")
    found = await gather([one(document, f"documents[{i}]") for i, document in enumerate(listed)])
    return np.array(found, np.float32)


async def _read(service: Service, side: Side, where: str) -> Sequence[Part]:
    bounds, content = service.prompts.loader.pixel_bounds, side if isinstance(side, str) else as_sequence(side, where)
    (message,) = await asyncio.to_thread(to_messages, [{"content": content}], bounds)
    parts = (TextPart(message.content),) if isinstance(message.content, str) else message.content
    check_side(parts, where)
    return parts
