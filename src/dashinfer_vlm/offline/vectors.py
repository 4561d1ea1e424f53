"""Vectors for a caller in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.answers import collect_vectors
from dashinfer_vlm.frontend.generation import Generation
from dashinfer_vlm.frontend.messages import Dialogue
from dashinfer_vlm.frontend.params import DEFAULT_PARAMS
from dashinfer_vlm.frontend.service import Service
from dashinfer_vlm.frontend.vectors import check_dimensions, unit_vector
from dashinfer_vlm.offline.background import gather
from dashinfer_vlm.offline.inputs import Conversation, Prompt, as_sequence, is_conversation, text_or_ids, to_messages

Vectors: TypeAlias = NDArray[np.float32]
"""One in each row."""


async def vectors_of(
    service: Service, inputs: Sequence[Prompt | Conversation], dimensions: int | None, at_once: int
) -> Vectors:
    """[inputs, dimensions], as many side by side as `at_once`. Raises what is wrong with the first that fails."""
    if isinstance(inputs, str):
        raise InvalidRequestError("inputs is a str; pass a list", param="inputs")
    hidden_size, gate = service.engine.info.hidden_size, asyncio.Semaphore(at_once)
    check_dimensions(dimensions, hidden_size)

    async def one(each: Prompt | Conversation) -> Vectors:
        async with gate:
            (state,) = await collect_vectors(await _begin(service, each))
            return unit_vector(state, dimensions)

    found = await gather([one(each) for each in as_sequence(inputs, "inputs")])
    return np.array(found, np.float32).reshape(len(found), dimensions or hidden_size)


async def _begin(service: Service, each: Prompt | Conversation) -> Generation:
    """A text is no conversation here: not every model that gives vectors is asked by one."""
    if isinstance(each, str) or not is_conversation(cast(Conversation, each)):
        return await service.embed([text_or_ids(cast(Prompt, each))], DEFAULT_PARAMS)
    bounds = service.prompts.loader.pixel_bounds
    messages = await asyncio.to_thread(to_messages, cast(Conversation, each), bounds)
    return await service.embed(Dialogue(messages), DEFAULT_PARAMS)
