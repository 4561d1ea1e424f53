"""What clients of all kinds send: each kind is a function that makes a request from random numbers."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

from PIL import Image
from tests.media.film_maker import film

from trust.answers import Asked

__all__ = ["KINDS", "Kind"]

Kind = Callable[[Random], Asked]

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
WORDS = "the picture show me long number people water find way day make look two more time down some".split()
SIZES = ((64, 64), (224, 224), (320, 240), (448, 336))
NUM_PICTURES = 400
"""More than the small caches of a soak hold, so that they turn over."""
NUM_FILMS = 24
TOOL = {
    "type": "function",
    "function": {
        "name": "move",
        "parameters": {
            "type": "object",
            "properties": {"shape": {"enum": ["circle", "square"]}, "by": {"type": "integer", "maximum": 99}},
            "required": ["shape", "by"],
            "additionalProperties": False,
        },
    },
}
FORM = {"type": "object", "properties": {"seen": {"type": "boolean"}}, "required": ["seen"]}
FORM |= {"additionalProperties": False}


def words(random: Random) -> str:
    return " ".join(random.choices(WORDS, k=random.randint(1, 120)))


def chat(random: Random, *parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": words(random)}] if parts else words(random)
    sampling = random.choice(({"temperature": 0.0}, {"temperature": 1.0, "top_k": -1, "top_p": 1.0}))
    fields = {"max_tokens": random.randint(1, 60), **sampling, **fields}
    return {"messages": [{"role": "user", "content": content}], **fields}


@cache
def picture(number: int) -> dict[str, Any]:
    """Picture `number` of all, as a part of a message."""
    random = Random(number)
    image = Image.effect_noise(random.choice(SIZES), 40).convert("RGB")
    data = io.BytesIO()
    kind = random.choice(("JPEG", "PNG", "WEBP"))
    image.save(data, kind)
    return {"type": "image_url", "image_url": {"url": _url(f"image/{kind.lower()}", data.getvalue())}}


@cache
def video(number: int) -> dict[str, Any]:
    """Film `number` of all: a second or two."""
    data = film(6 + number, rate=8.0, size=(140, 64))
    return {"type": "video_url", "video_url": {"url": _url("video/mp4", data)}}


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _text(random: Random) -> Asked:
    return Asked(CHAT, chat(random))


def _stream(random: Random) -> Asked:
    return Asked(CHAT, chat(random, stream=True, stream_options={"include_usage": True}))


def _picture(random: Random) -> Asked:
    parts = [picture(random.randrange(NUM_PICTURES)) for _ in range(random.choice((1, 1, 1, 3)))]
    return Asked(CHAT, chat(random, *parts, stream=random.random() < 0.5))


def _film(random: Random) -> Asked:
    return Asked(CHAT, chat(random, video(random.randrange(NUM_FILMS)), stream=random.random() < 0.5))


def _leaves(random: Random) -> Asked:
    asked = chat(random, stream=True, max_tokens=200, ignore_eos=True)
    return Asked(CHAT, asked, leave_after=random.choice((0, 1, 5, 30)))


def _leaves_a_picture(random: Random) -> Asked:
    asked = chat(random, picture(random.randrange(NUM_PICTURES)), stream=True, max_tokens=200, ignore_eos=True)
    return Asked(CHAT, asked, leave_after=random.choice((0, 2)))


def _several(random: Random) -> Asked:
    n = random.randint(2, 5)
    return Asked(CHAT, chat(random, n=n, temperature=1.0, stream=random.random() < 0.5), num_choices=n)


def _stops(random: Random) -> Asked:
    return Asked(CHAT, chat(random, stop=["the", "a", " of"], stream=random.random() < 0.5, min_tokens=1))


def _log_probabilities(random: Random) -> Asked:
    return Asked(CHAT, chat(random, logprobs=True, top_logprobs=5, stream=random.random() < 0.5))


def _completion(random: Random) -> Asked:
    fields = {"max_tokens": 20, "logprobs": 3, "presence_penalty": 0.5}
    return Asked(TEXT, {"prompt": [words(random), words(random)], **fields}, num_choices=2)


def _tools(random: Random) -> Asked:
    choice = {"type": "function", "function": {"name": "move"}}
    stream = random.random() < 0.5
    return Asked(CHAT, chat(random, tools=[TOOL], tool_choice=choice, max_tokens=400, stream=stream))


def _structured(random: Random) -> Asked:
    form = {"type": "json_schema", "json_schema": {"name": "seen", "schema": FORM, "strict": True}}
    return Asked(CHAT, chat(random, response_format=form, max_tokens=300, stream=random.random() < 0.5))


def _response(random: Random) -> Asked:
    return Asked(RESPONSES, {"input": words(random), "max_output_tokens": 30, "stream": random.random() < 0.5})


def _message(random: Random) -> Asked:
    body = {"messages": [{"role": "user", "content": words(random)}], "max_tokens": 30}
    return Asked(MESSAGES, {**body, "stream": random.random() < 0.5})


def _wrong(random: Random) -> Asked:
    """Input that no server should take."""
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgoAAAA"}}
    inside = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}
    return random.choice(
        [
            Asked(CHAT, b"{"),
            Asked(CHAT, b"\xff\x00"),
            Asked(CHAT, chat(random, temperature=-1)),
            Asked(CHAT, chat(random, no_such_field=1)),
            Asked(CHAT, chat(random, model="another")),
            Asked(CHAT, chat(random, broken)),
            Asked(CHAT, chat(random, inside)),
            Asked(CHAT, chat(random, {"type": "text", "text": "word " * 40_000})),
            Asked(CHAT, chat(random, response_format={"type": "json_schema", "json_schema": {"name": "x"}})),
            Asked(TEXT, {"prompt": []}),
            Asked(TEXT, {"prompt": [99_999_999]}),
            Asked(RESPONSES, {"input": "x", "previous_response_id": "resp_none"}),
        ]
    )


KINDS: dict[str, tuple[Kind, int]] = {
    "text": (_text, 4),
    "stream": (_stream, 6),
    "picture": (_picture, 4),
    "video": (_film, 2),
    "client leaves": (_leaves, 3),
    "client leaves a picture": (_leaves_a_picture, 1),
    "several answers": (_several, 2),
    "stop strings": (_stops, 2),
    "log probabilities": (_log_probabilities, 2),
    "completion": (_completion, 2),
    "tools": (_tools, 1),
    "structured": (_structured, 1),
    "response": (_response, 2),
    "message": (_message, 2),
    "wrong input": (_wrong, 3),
}
"""Each with its share of the requests."""
