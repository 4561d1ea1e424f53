"""The requests are equal for all targets, of forced length, and bring pictures that no server has seen."""

from __future__ import annotations

import base64
import io
import json
from itertools import islice
from typing import Any

import pytest
from PIL import Image

from dashinfer_vlm.bench.workloads import WORKLOADS, Work, WorkloadName, conversations, named, texts


def work(name: WorkloadName, seed: int = 5) -> Work:
    return named(name, prompt_words=32, seed=seed)


def urls(body: bytes) -> list[str]:
    parts = [part for m in json.loads(body)["messages"] if isinstance(m["content"], list) for part in m["content"]]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_the_same_seed_gives_the_same_bytes_and_another_one_gives_others() -> None:
    assert conversations(work("single"), 2, 1) == conversations(work("single"), 2, 1)
    assert conversations(work("single"), 2, 1) != conversations(work("single", seed=6), 2, 1)


@pytest.mark.parametrize("name", ["single", "multi", "docs", "mixed"])
def test_no_picture_comes_twice_but_where_a_turn_sends_it_again(name: WorkloadName) -> None:
    first, second = conversations(work(name), 2, 1), conversations(work(name), 1, 3)
    last_turns = [conversation[-1] for conversation in (*first, *second)]
    seen = [url for body in last_turns for url in urls(body)]

    assert len(set(seen)) == len(seen) == 3 * len(WORKLOADS[name].image_sizes) * WORKLOADS[name].num_turns


def test_a_later_turn_sends_the_earlier_ones_again() -> None:
    (turns,) = conversations(work("multi"), 1, 0)
    messages: list[list[dict[str, Any]]] = [json.loads(turn)["messages"] for turn in turns]

    assert [len(m) for m in messages] == [1, 3, 5]
    assert messages[2][:3] == messages[1]
    assert [len(urls(turn)) for turn in turns] == [1, 2, 3]
    assert len(messages[2][1]["content"].split()) == 64  # the stand-in for the answer


def test_repeat_brings_one_picture_under_different_words() -> None:
    bodies = [turn for (turn,) in conversations(work("repeat"), 3, 0) + conversations(work("repeat"), 3, 1)]

    assert len({url for body in bodies for url in urls(body)}) == 1
    assert len(set(bodies)) == 6


def test_docs_ask_for_three_pictures_of_at_most_1024_tokens_and_120_tokens_of_answer() -> None:
    ((body,),) = conversations(work("docs"), 1, 0)
    tokens = [picture(url).width // 28 * (picture(url).height // 28) for url in urls(body)]

    assert tokens == [1024, 864, 864]
    assert json.loads(body)["max_tokens"] == 120


def test_the_length_of_every_answer_is_forced_and_counted_by_the_server() -> None:
    ((body,),) = conversations(work("text"), 1, 0)
    asked = json.loads(body)

    assert {"ignore_eos": True, "temperature": 0, "max_tokens": 64, "stream": True}.items() <= asked.items()
    assert asked["stream_options"] == {"include_usage": True}
    assert len(asked["messages"][0]["content"].split()) == 32


def test_sizes_can_be_set() -> None:
    sized = named("docs", prompt_words=3, seed=0, output_tokens=9, image_size=(56, 84))
    ((body,),) = conversations(sized, 1, 0)

    assert [picture(url).size for url in urls(body)] == [(56, 84)] * 3
    assert json.loads(body)["max_tokens"] == 9


def test_streams_of_different_clients_and_rounds_have_no_text_in_common() -> None:
    streams = [texts(work("mixed"), batch, client) for batch in (0, 1) for client in (0, 1)]
    bodies = [body for stream in streams for body in islice(stream, 5)]

    assert len(set(bodies)) == 20
    assert not any(urls(body) for body in bodies)


def test_both_formats_are_sent() -> None:
    kinds = {url.partition(";")[0] for (turn,) in conversations(work("single"), 8, 0) for url in urls(turn)}

    assert kinds == {"data:image/png", "data:image/jpeg"}
