"""What the clients ask. Every body is made before the clock starts, and equal for all targets.

A conversation is the tuple of its turns; a turn is a request body without its model's name. A later turn sends the
earlier ones again, pictures included, with a stand-in of equal length for each answer: the prompts then do not depend
on what a server happened to say.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from dashinfer_vlm.bench.pictures import data_url, draw

__all__ = [
    "WORKLOADS",
    "Conversation",
    "Size",
    "Turn",
    "Work",
    "Workload",
    "WorkloadName",
    "conversations",
    "named",
    "texts",
]

WorkloadName = Literal["text", "single", "multi", "repeat", "docs", "mixed"]
Size: TypeAlias = tuple[int, int]
Turn: TypeAlias = bytes
Conversation: TypeAlias = tuple[Turn, ...]

_WORDS = """the of and to in is you that it he was for on are as with his they at be this have from or one had by word
but not what all were we when your can said there use an each which she do how their if will up
other about out many then them
these so some her would make like him into time has look two more write go see number no way could people my than first
water been call who its now find long down day did get come made may part""".split()  # noqa: SIM905  quotes would hide it
"""Common ones: one token each in every vocabulary, the one of `tools/make_checkpoint.py` included."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of conversation."""

    summary: str
    image_sizes: tuple[Size, ...] = ()
    """Width and height in pixels of the pictures that each turn brings."""
    num_turns: int = 1
    output_tokens: int = 64
    same_images: bool = False
    """Every conversation brings the same pictures."""


WORKLOADS: dict[WorkloadName, Workload] = {
    "text": Workload("words only"),
    "single": Workload("one new picture each", ((448, 448),)),
    "multi": Workload("three turns, a new picture in each, the earlier ones sent again", ((448, 448),), num_turns=3),
    "repeat": Workload("the same picture in every request", ((448, 448),), same_images=True),
    "docs": Workload(
        "three new pictures of at most 1,024 tokens, 2,752 together",
        ((896, 896), (756, 896), (672, 1008)),
        output_tokens=120,
    ),
    "mixed": Workload("streams of words while new large pictures arrive", ((896, 896),)),
}


@dataclass(frozen=True, slots=True)
class Work:
    """A workload with its sizes settled, from which any number of conversations can be made."""

    name: WorkloadName
    workload: Workload
    prompt_words: int
    seed: int

    @property
    def output_tokens(self) -> int:
        return self.workload.output_tokens

    @property
    def num_turns(self) -> int:
        return self.workload.num_turns


def named(
    name: WorkloadName,
    *,
    prompt_words: int,
    seed: int,
    output_tokens: int | None = None,
    image_size: Size | None = None,
) -> Work:
    """The work called `name`; `output_tokens` and `image_size` replace its own where they are given."""
    workload = WORKLOADS[name]
    if output_tokens is not None:
        workload = replace(workload, output_tokens=output_tokens)
    if image_size is not None:
        workload = replace(workload, image_sizes=(image_size,) * len(workload.image_sizes))
    return Work(name, workload, prompt_words, seed)


def conversations(work: Work, count: int, batch: int) -> list[Conversation]:
    """`count` conversations, none like another one of this or of another `batch` of the same seed."""
    return [_conversation(work, (work.seed, zlib.crc32(work.name.encode()), batch, i)) for i in range(count)]


def texts(work: Work, batch: int, client: int) -> Iterator[Turn]:
    """Requests without pictures, as many as are asked for; making one takes microseconds."""
    index = 0
    while True:
        key = (work.seed, zlib.crc32(b"texts"), batch, client, index)
        yield _body(work, [{"role": "user", "content": _words(key, work.prompt_words)}])
        index += 1


def _conversation(work: Work, key: tuple[int, ...]) -> Conversation:
    messages: list[dict[str, Any]] = []
    turns = []
    for turn in range(work.num_turns):
        if turn:
            messages.append({"role": "assistant", "content": _words((*key, turn, 0), work.output_tokens)})
        messages.append({"role": "user", "content": _content(work, (*key, turn, 1))})
        turns.append(_body(work, messages))
    return tuple(turns)


def _content(work: Work, key: tuple[int, ...]) -> str | list[dict[str, Any]]:
    words = _words(key, work.prompt_words)
    if not work.workload.image_sizes:
        return words
    picture_key = (work.seed,) if work.workload.same_images else key
    urls = [_picture(size, (*picture_key, i)) for i, size in enumerate(work.workload.image_sizes)]
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": words}]


def _picture(size: Size, key: tuple[int, ...]) -> str:
    return data_url(draw(size, key), "png" if sum(key) % 2 else "jpeg")  # as clients send both


def _words(key: tuple[int, ...], count: int) -> str:
    return " ".join(random.Random(repr(key)).choices(_WORDS, k=count))


def _body(work: Work, messages: list[dict[str, Any]]) -> Turn:
    """Greedy and of forced length, so that every server does the same work."""
    body = {
        "messages": messages,
        "max_tokens": work.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()
