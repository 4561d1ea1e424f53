"""A Qwen3-VL with random weights behind the real command: each kind of medium over HTTP, counted and answered as
offline."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from PIL import Image

from dashinfer_vlm import VLM, SamplingParams
from tests.conftest import CheckpointMaker
from tests.e2e.serving import Server
from tests.e2e.test_nothing_twice import ENCODES, TIMEOUT_S, metrics
from tests.media.film_maker import film
from tests.tokens import FIRST_SPECIAL, VOCAB

NUM_TOKENS = 12
TEXT_ALONE = dict.fromkeys(range(FIRST_SPECIAL, VOCAB), -100.0)
"""A random model may say nothing but tokens that show no text."""
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logit_bias=TEXT_ALONE)
FLAGS: dict[str, Any] = {"dtype": "float32", "kv_cache_gib": 0.05, "max_model_len": 4096, "threads": 1}


def png(width: int, height: int, seed: int) -> str:
    """Noise, as a data URL."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def mp4(num_frames: int, rate: float) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(film(num_frames, rate=rate, size=(140, 64))).decode()}"


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def question(*parts: dict[str, Any] | str) -> dict[str, Any]:
    written = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": written}


FRAMES = {"type": "video", "video": [png(96, 64, seed) for seed in range(5)], "fps": 2.0}
FILM = {"type": "video_url", "video_url": {"url": mp4(30, 10.0)}}
CASES = {
    "words": question("Who are you?"),
    "an image": question(picture(png(300, 260, 1)), "What is this?"),
    "three images": question(*(picture(png(280 + 40 * i, 320, i)) for i in range(3)), "Which is the largest?"),
    "a film": question(FILM, "What happens?"),
    "a list of frames": question(FRAMES, "What moves?"),
    "a film and an image": question("Is ", picture(png(300, 260, 1)), " part of ", FILM, "?"),
}


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen3_vl")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    flags = [text for name, value in FLAGS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    server = Server("--model", str(folder), "--port", "0", *flags)
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.address}/v1", api_key="EMPTY", max_retries=0, timeout=TIMEOUT_S) as client:
        yield client


@pytest.fixture(scope="module")
def vlm(folder: Path) -> Iterator[VLM]:
    with VLM(folder, progress=False, **FLAGS) as vlm:
        yield vlm


def ask(client: OpenAI, *messages: Any) -> ChatCompletion:
    return client.chat.completions.create(
        model="model",
        messages=messages,
        max_completion_tokens=NUM_TOKENS,
        temperature=0,
        logit_bias=dict.fromkeys(map(str, TEXT_ALONE), -100),
        extra_body={"ignore_eos": True},
    )


def said(answer: ChatCompletion) -> str:
    assert answer.choices[0].message.content
    return answer.choices[0].message.content


def counted(answer: ChatCompletion) -> tuple[int, int]:
    """Tokens of the prompt, and those of them that were cached."""
    assert answer.usage
    assert answer.usage.completion_tokens == NUM_TOKENS
    assert answer.usage.prompt_tokens_details
    return answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens or 0


@pytest.mark.parametrize("name", CASES)
def test_each_kind_of_medium_is_counted_and_answered_as_offline(client: OpenAI, vlm: VLM, name: str) -> None:
    answer, offline = ask(client, CASES[name]), vlm.chat([CASES[name]], GREEDY)
    assert said(answer) == offline.text
    assert counted(answer)[0] == offline.usage.num_prompt_tokens


def test_a_second_turn_finds_the_first_with_its_film_in_the_cache(client: OpenAI, vlm: VLM, server: Server) -> None:
    first = question("Two turns. ", {"type": "video_url", "video_url": {"url": mp4(40, 8.0)}}, "What happens?")
    answer = ask(client, first)
    num_tokens, _ = counted(answer)
    encoded = metrics(server)[ENCODES]
    turns = (first, {"role": "assistant", "content": said(answer)}, question("And then?"))
    second = ask(client, *turns)
    assert num_tokens // 2 < counted(second)[1] < counted(second)[0]
    assert metrics(server)[ENCODES] == encoded
    assert said(second) == vlm.chat(turns, GREEDY).text
