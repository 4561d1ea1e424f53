"""An answer that is not there in time: one error, and nothing is held any more."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from dashinfer_vlm.errors import DeadlineError, InvalidRequestError, OverloadedError
from dashinfer_vlm.frontend.backlog import QueueLimits
from dashinfer_vlm.frontend.messages import Dialogue, MediaPart
from dashinfer_vlm.frontend.opening import FrontEnd
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.tenants import current_timeout_s
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.media.types import MediaRef
from dashinfer_vlm.request import SamplingParams
from tests.frontend.scripted import ScriptedEngine
from tests.frontend.test_service import PICTURE, Bench, collect

SOON = GenerationParams(timeout_s=0.05)


def is_empty(bench: Bench) -> bool:
    backlog = bench.service.backlog
    return (bench.loader.num_held, bench.service.num_in_flight, backlog.requests.waiting) == (0, 0, 0)


async def test_media_that_take_too_long_end_the_request(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer)
    bench.loader.hangs.add("http://host/picture")
    for ask in (bench.service.chat, bench.service.count):
        with pytest.raises(DeadlineError, match="not complete in the time"):
            await ask(Dialogue([PICTURE]), SOON)
    assert is_empty(bench)


async def test_media_that_came_are_given_back_when_others_take_too_long(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer)
    bench.loader.hangs.add("http://host/slow")
    slow = MediaPart(MediaRef(kind="image", source="http://host/slow", param="messages[0].content[1]"))
    with pytest.raises(DeadlineError):
        await bench.service.chat(Dialogue([replace(PICTURE, content=(*PICTURE.content, slow))]), SOON)
    assert len(bench.loader.loaded) == 1
    assert is_empty(bench)


@pytest.mark.parametrize("pauses_after", [0, 2])
async def test_an_engine_that_takes_too_long_is_told_to_stop(
    folder: Path, tokenizer: Tokenizer, pauses_after: int
) -> None:
    """Also before its first token."""
    bench = Bench(folder, tokenizer, pauses_after=pauses_after)
    generation = await bench.service.chat(Dialogue([PICTURE]), SOON)
    with pytest.raises(DeadlineError):
        await collect(generation)
    await generation.wait_ended()
    assert len(bench.engine.aborted) == 1
    assert is_empty(bench)


async def test_an_answer_in_time_is_left_alone(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer)
    generation = await bench.service.chat(Dialogue([PICTURE]), GenerationParams(timeout_s=60))
    assert (await collect(generation))[:2] == (["hello"], ["stop"])
    assert is_empty(bench)


@pytest.mark.parametrize(("field_s", "header_s"), [(60.0, 0.05), (0.05, 60.0), (None, 0.05)])
async def test_the_shorter_of_two_times_counts(
    folder: Path, tokenizer: Tokenizer, field_s: float | None, header_s: float
) -> None:
    bench = Bench(folder, tokenizer, pauses_after=0)
    current_timeout_s.set(header_s)
    with pytest.raises(DeadlineError):
        await collect(await bench.service.complete(["x"], GenerationParams(timeout_s=field_s)))


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 1e9])
async def test_a_time_that_cannot_be_is_refused(folder: Path, tokenizer: Tokenizer, seconds: float) -> None:
    bench = Bench(folder, tokenizer)
    with pytest.raises(InvalidRequestError, match="must be above 0"):
        await bench.service.complete(["x"], GenerationParams(timeout_s=seconds))
    current_timeout_s.set(seconds)
    with pytest.raises(InvalidRequestError, match="must be above 0"):
        await bench.service.complete(["x"], GenerationParams())
    assert is_empty(bench)


async def test_what_waits_is_bounded_and_makes_room_with_its_first_token(folder: Path, tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(lambda _: tokenizer.encode_text("hello"), pauses_after=0)
    bench = Bench(folder, tokenizer)
    service = FrontEnd.from_folder(folder).service(engine, bench.loader, queue=QueueLimits(tokens=10))
    params = GenerationParams(sampling=SamplingParams(max_tokens=2))
    running = await service.complete([[1] * 8], params)
    with pytest.raises(OverloadedError, match="8 tokens of prompts wait, and with these 5 more"):
        await service.complete([[1] * 5], params)
    with pytest.raises(OverloadedError, match="tokens of prompts wait"):
        await service.chat(Dialogue([PICTURE]), params)
    assert (service.num_in_flight, bench.loader.num_held) == (1, 0)
    engine.resume.set()
    await anext(running)
    assert service.backlog.tokens.waiting == 0
    second = await service.complete([[1] * 5], params)
    await asyncio.gather(collect(running), collect(second))
    assert service.num_in_flight == 0


async def test_what_is_closed_before_its_first_token_waits_no_more(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, pauses_after=0)
    generation = await bench.service.chat(Dialogue([PICTURE]), GenerationParams(n=2))
    backlog = bench.service.backlog
    assert (backlog.requests.waiting, backlog.visual_tokens.waiting, backlog.patches.waiting) == (1, 4, 16)
    generation.close()
    await generation.wait_ended()
    assert is_empty(bench)
