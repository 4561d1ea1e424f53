"""The vision encoder alone: one machine turns conversations into ids and embeddings, another one answers them.

    with Encoder("Qwen/Qwen2-VL-2B-Instruct") as encoder:
        prompt = encoder.encode([{"role": "user", "content": [Image.open("cat.jpg"), "What is this?"]}])

`prompt` then goes to wherever the language model runs, into `allspark.MultiMediaInfo`, for example.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dashinfer_vlm.config import EngineConfig, MediaConfig
from dashinfer_vlm.engine.host.mapping import map_tensor
from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.messages import Dialogue
from dashinfer_vlm.frontend.open_loader import open_loader
from dashinfer_vlm.frontend.opening import FrontEnd
from dashinfer_vlm.frontend.prompt import Prompt, PromptBuilder
from dashinfer_vlm.hub import resolve
from dashinfer_vlm.kernels.threads import engine_cores, engine_threads, set_threads, stay_on
from dashinfer_vlm.models.base import VisionEncoder
from dashinfer_vlm.models.config import CheckpointConfig, read_config
from dashinfer_vlm.models.loading import load_encoder
from dashinfer_vlm.models.mrope import part_grid
from dashinfer_vlm.offline.background import BackgroundLoop
from dashinfer_vlm.offline.inputs import Conversation, to_messages
from dashinfer_vlm.offline.options import configs
from dashinfer_vlm.request import Grid, Item
from dashinfer_vlm.shared_array import SharedArray

__all__ = ["EncodedPrompt", "Encoder"]

_SLICES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """All that a language model needs of a conversation."""

    ids: list[int]
    """The prompt, with every item's placeholders in place."""
    placeholders: list[int]
    """Per run of placeholders the token that it repeats; it is as long in `ids` as its embedding. A picture is one run;
    a video is one, or with Qwen3-VL one for each of its temporal steps."""
    embeddings: list[torch.Tensor]
    """Per run [tokens, embedding size], in the order of the prompt, on the encoder's device."""
    grids: list[Grid]
    """Per run frames, rows and columns, in patches before merging."""
    positions: torch.Tensor
    """int32 [3, 1, S]: M-RoPE positions of `ids`."""


class Encoder:
    """A loaded vision encoder. Close it, or use it as a context manager."""

    def __init__(self, model: str | Path = "", *, chat_template: str | None = None, **options: Any) -> None:
        """Load the ViT of `model`, and nothing of its language model; arguments and errors are those of `VLM`."""
        engine_config, media_config = configs({"model": str(model), **options})
        engine_config = resolve(engine_config)
        cores = engine_cores(engine_config)
        set_threads(engine_threads(engine_config), cores)
        stay_on(cores)
        self._checkpoint = read_config(Path(engine_config.model))
        self._encoder = load_encoder(engine_config)
        with ExitStack() as stack:
            self._loop = BackgroundLoop()
            stack.callback(self._loop.close)
            self._prompts = self._loop.run(
                _open_prompts(self._checkpoint, engine_config, media_config, chat_template, stack, self._loop)
            )
            self._resources = stack.pop_all()

    def encode(self, messages: Conversation) -> EncodedPrompt:
        """Render, fetch, cut and encode one conversation; raises what `VLM.chat` raises for it."""
        return self._loop.run(self._encode(messages))

    async def aencode(self, messages: Conversation) -> EncodedPrompt:
        """`encode` for callers with an event loop."""
        return await self._loop.arun(self._encode(messages))

    def close(self) -> None:
        """End the decoding processes and free the encoder; idempotent, and nothing in a process that was forked."""
        if os.getpid() == self._loop.pid:
            self._resources.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _encode(self, conversation: Conversation) -> EncodedPrompt:
        messages = await asyncio.to_thread(to_messages, conversation, self._prompts.loader.pixel_bounds)
        prompt = await self._prompts.chat(Dialogue(messages))
        try:
            return await asyncio.to_thread(self._run, prompt)
        finally:
            prompt.release()

    def _run(self, prompt: Prompt) -> EncodedPrompt:
        whole = [item for item in prompt.items if item.is_last_part]
        patches, grids = [_patches(item) for item in whole], [_grid(item) for item in whole]
        made = _embed(self._encoder, patches, grids) if whole else []
        return EncodedPrompt(
            ids=prompt.ids,
            placeholders=[prompt.ids[item.start] for item in prompt.items],
            embeddings=_rows_of_runs(prompt.items, made),
            grids=[part_grid(item, self._checkpoint.merge_size) for item in prompt.items],
            positions=_positions(len(prompt.ids), prompt.items, self._checkpoint),
        )


async def _open_prompts(
    checkpoint: CheckpointConfig,
    engine: EngineConfig,
    media: MediaConfig,
    chat_template: str | None,
    stack: ExitStack,
    loop: BackgroundLoop,
) -> PromptBuilder:
    """In the loop that the loader will belong to."""
    front_end = FrontEnd.from_folder(checkpoint.folder, chat_template)
    loader = open_loader(checkpoint.folder, engine, media)
    stack.callback(lambda: loop.run(loader.close()))
    text = checkpoint.text
    return front_end.prompts(
        loader,
        max_model_len=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        max_items=media.max_items,
    )


def _rows_of_runs(items: Sequence[Item], embeddings: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For each run its rows of the item that it is a part of."""
    firsts = accumulate(int(item.first_row == 0) for item in items)
    whole = (embeddings[number - 1] for number in firsts)
    return [rows[i.first_row : i.first_row + i.num_tokens] for i, rows in zip(items, whole, strict=True)]


def _embed(encoder: VisionEncoder, patches: Sequence[torch.Tensor], grids: Sequence[Grid]) -> list[torch.Tensor]:
    """All slices at once: nobody else wants the device meanwhile."""
    with torch.inference_mode():
        state = encoder.begin(patches, grids)
        while not state.done:
            encoder.run(state, _SLICES)
        return encoder.finish(state)


def _grid(item: Item) -> Grid:
    assert item.grid is not None, item
    return item.grid


def _patches(item: Item) -> torch.Tensor:
    if item.embedding is not None:
        raise InvalidRequestError("the conversation holds an image that is encoded already", param="messages")
    assert isinstance(item.patches, SharedArray), item
    return map_tensor(item.patches)


def _positions(num_tokens: int, items: Sequence[Item], checkpoint: CheckpointConfig) -> torch.Tensor:
    positions, _ = checkpoint.family.positions(checkpoint, num_tokens, items)
    return torch.from_numpy(positions).to(torch.int32).reshape(3, 1, -1)
