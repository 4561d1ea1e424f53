"""Qwen3-VL, encoded apart: embeddings of both widths, a video in several runs, and the tokens of `VLM`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import pad

from allspark import AsStatus, MultiMediaInfo
from dashinfer_vlm import VLM, SamplingParams
from dashinfer_vlm.offline import EncodedPrompt, Encoder
from tests.allspark.conftest import HIDDEN, Answer, Ask, loaded, media, run, running
from tests.conftest import CheckpointMaker

NUM_TOKENS = 12
NUM_DEEPSTACK = 3
LOAD: dict[str, Any] = {"dtype": "float32", "device": "cpu", "threads": 1}
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)


PICTURE = Image.fromarray(noise(256, 288))
VIDEO = {"type": "video", "video": noise(6, 64, 96), "fps": 2.0}
CASES: dict[str, list[Any]] = {
    "an image": [PICTURE, "What is this?"],
    "a video": [VIDEO, "What happens?"],
    "a video and an image": ["Is", VIDEO, "like", PICTURE, "?"],
}


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen3_vl")


@pytest.fixture(scope="module")
def ask(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with running(loaded(folder, tmp_path_factory.mktemp("model"))) as engine:
        yield partial(run, engine)


@pytest.fixture(scope="module")
def vlm(folder: Path) -> Iterator[VLM]:
    with VLM(folder, max_length=1024, kv_cache_gib=0.05, progress=False, **LOAD) as vlm:
        yield vlm


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Iterator[Encoder]:
    with Encoder(folder, **LOAD) as encoder:
        yield encoder


def question(name: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": CASES[name]}]


def info_of(prompt: EncodedPrompt, embeddings: Sequence[torch.Tensor] = (), **extra: Any) -> MultiMediaInfo:
    """The prompt's embeddings, or other ones of its runs, by their placeholders."""
    by_token: dict[int, list[torch.Tensor]] = {}
    for token, rows in zip(prompt.placeholders, embeddings or prompt.embeddings, strict=True):
        by_token.setdefault(token, []).append(rows)
    info = media(str(prompt.placeholders[0]), *by_token.pop(prompt.placeholders[0]), **extra)
    for token, tensors in by_token.items():
        assert info.add_multimedia_content(str(token), tensors) == AsStatus.ALLSPARK_SUCCESS
    return info


def tell(ask: Ask, prompt: EncodedPrompt, info: MultiMediaInfo) -> Answer:
    keys = {"max_length": len(prompt.ids) + NUM_TOKENS, "temperature": 0.0, "early_stopping": False, "logprobs": True}
    return ask(prompt.ids, keys, mm_info=info)


@pytest.mark.parametrize("name", CASES)
def test_what_is_encoded_apart_gives_the_tokens_of_vlm(ask: Ask, vlm: VLM, encoder: Encoder, name: str) -> None:
    prompt, expected = encoder.encode(question(name)), vlm.chat(question(name), GREEDY)
    assert {rows.shape[1] for rows in prompt.embeddings} == {HIDDEN * (1 + NUM_DEEPSTACK)}
    assert len(prompt.embeddings) == {"an image": 1, "a video": 3}.get(name, 4)
    assert len(prompt.ids) == expected.usage.num_prompt_tokens
    by_position = tell(ask, prompt, info_of(prompt, positions=prompt.positions))
    by_grid = tell(ask, prompt, info_of(prompt, grid_thw=np.array(prompt.grids)))
    for answer in (by_position, by_grid):
        assert tuple(answer.ids) == expected.token_ids
        assert answer.logprobs == pytest.approx([row.logprob for row in expected.first.logprobs], abs=1e-5)


def test_a_video_that_came_before_is_found_in_the_cache(ask: Ask, encoder: Encoder) -> None:
    prompt = encoder.encode([{"role": "user", "content": ["Found again:", *CASES["a video"]]}])
    first, second = (tell(ask, prompt, info_of(prompt, positions=prompt.positions)) for _ in range(2))
    assert second.ids == first.ids
    assert second.prefix_cache_len > first.prefix_cache_len
    last = max(i for i, token in enumerate(prompt.ids) if token == prompt.placeholders[0])
    assert second.prefix_cache_len > last - 16


@pytest.mark.parametrize("name", CASES)
def test_embeddings_of_the_hidden_size_add_nothing_to_later_layers(ask: Ask, encoder: Encoder, name: str) -> None:
    prompt = encoder.encode(question(name))
    hidden = [rows[:, :HIDDEN] for rows in prompt.embeddings]
    padded = [pad(rows, (0, HIDDEN * NUM_DEEPSTACK)) for rows in hidden]
    narrow, wide, whole = (
        tell(ask, prompt, info_of(prompt, embeddings, positions=prompt.positions))
        for embeddings in (hidden, padded, prompt.embeddings)
    )
    assert narrow.logprobs == pytest.approx(wide.logprobs, abs=1e-6)
    assert narrow.ids == wide.ids
    assert narrow.logprobs != pytest.approx(whole.logprobs, abs=1e-4)
