"""Questions about films, over HTTP: a shape that crosses the picture, drawn with seeds and phrasings that training
never used, then encoded as a real film.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
import pytest
from openai import OpenAI

from demo_model.samples import Sample, Studio, sizes_for
from demo_model.scenes import Pixels
from tests.e2e.serving import Server

SEED = 5_100
NUM_FILMS = 12
RATE = 2
"""Frames per second: those that Qwen2-VL looks at, so that it sees every one."""
MIN_TRUE = 0.9


def mp4(frames: Sequence[Pixels]) -> str:
    """H.264 at its usual quality, as a data URL."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=RATE)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return f"data:video/mp4;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def moving(number: int) -> Sample:
    rng = np.random.default_rng((SEED, number))
    return Studio(rng, held_out=True).sample("video", sizes_for(rng, "video", 1.0), 6)


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    """Of a server with the bundled model."""
    server = Server("--port", "0", "--kv-cache-gib", "0.1")
    try:
        with OpenAI(base_url=f"{server.wait_ready()}/v1", api_key="EMPTY", max_retries=0, timeout=120) as client:
            yield client
    finally:
        server.kill()


def ask(client: OpenAI, url: str, text: str) -> str | None:
    content: Any = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": text}]
    messages: Any = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(model="model", messages=messages, temperature=0, max_completion_tokens=40)
    return answer.choices[0].message.content


def test_most_questions_about_films_are_answered_right(client: OpenAI) -> None:
    samples = [moving(i) for i in range(NUM_FILMS)]
    asked = [(mp4(each.pictures), question) for each in samples for question in each.questions]
    wrong = [
        (question.text, question.answer, said)
        for url, question in asked
        if (said := ask(client, url, question.text)) != question.answer
    ]
    assert len({question.answer for _, question in asked}) > NUM_FILMS // 2
    assert len(wrong) <= (1 - MIN_TRUE) * len(asked), wrong
    print(f"{len(asked) - len(wrong)} of {len(asked)} right")  # noqa: T201


def test_a_film_played_backwards_moves_the_other_way(client: OpenAI) -> None:
    ways = {"Up.": "Down.", "Down.": "Up.", "Left.": "Right.", "Right.": "Left."}
    for number in range(4):
        sample = moving(number)
        question = next(each for each in sample.questions if each.answer in ways)
        assert ask(client, mp4(sample.pictures[::-1]), question.text) == ways[question.answer]
