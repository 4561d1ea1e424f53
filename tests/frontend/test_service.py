from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dashinfer_vlm.errors import (
    CheckpointError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
)
from dashinfer_vlm.frontend import generation as generation_module
from dashinfer_vlm.frontend import service as service_module
from dashinfer_vlm.frontend.backlog import QueueLimits
from dashinfer_vlm.frontend.checkpoint import FrontendConfig
from dashinfer_vlm.frontend.deltas import Delta
from dashinfer_vlm.frontend.generation import Generation
from dashinfer_vlm.frontend.messages import Dialogue, MediaPart, Message, TextPart
from dashinfer_vlm.frontend.opening import FrontEnd
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.media.types import MediaRef
from dashinfer_vlm.request import SamplingParams
from tests.frontend.scripted import ScriptedEngine, ScriptedLoader, info

PICTURE = Message(
    role="user", content=(TextPart("what is it?"), MediaPart(MediaRef(kind="image", source="http://host/picture")))
)


class Bench:
    """A service over a scripted engine that says `text`."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, text: str = "hello", **engine: Any) -> None:
        self.engine = ScriptedEngine(lambda _: tokenizer.encode_text(text), **engine)
        self.loader = ScriptedLoader()
        self.service = FrontEnd.from_folder(folder).service(self.engine, self.loader, queue=QueueLimits(requests=2))


async def collect(generation: Generation) -> tuple[list[str], list[str | None], list[Delta]]:
    texts = [""] * len(generation.choices)
    reasons: list[str | None] = [None] * len(generation.choices)
    deltas: list[Delta] = []
    async for delta in generation:
        assert reasons[delta.index] is None, "news after the end"
        texts[delta.index] += delta.text
        reasons[delta.index] = delta.finish_reason
        deltas.append(delta)
    return texts, reasons, deltas


def params(n: int = 1, stop: tuple[str, ...] = (), include: bool = False, **sampling: Any) -> GenerationParams:
    return GenerationParams(sampling=SamplingParams(**sampling), n=n, stop=stop, include_stop_str_in_output=include)


async def test_an_answer_comes_with_its_usage_and_gives_its_media_back(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, "a 😀!", num_cached_tokens=7)
    generation = await bench.service.chat(Dialogue([PICTURE]), params())
    assert bench.loader.num_held == 1
    texts, reasons, _ = await collect(generation)
    assert (texts, reasons) == (["a 😀!"], ["stop"])
    assert generation.usage.num_prompt_tokens == len(bench.engine.requests[0].prompt_ids)
    assert generation.usage.num_output_tokens == len(tokenizer.encode_text("a 😀!")) + 1
    assert generation.usage.num_cached_tokens == 7
    assert bench.loader.num_held == bench.service.num_in_flight == 0
    assert not bench.engine.aborted


async def test_what_choices_of_one_prompt_share_was_not_there_before(folder: Path, tokenizer: Tokenizer) -> None:
    generation = await Bench(folder, tokenizer, "a").service.chat(Dialogue([PICTURE]), params(n=3))
    await collect(generation)
    for choice, found in zip(generation.choices, (96, 16, 80), strict=True):
        choice.num_cached_tokens = found
    assert generation.usage.num_cached_tokens == 16


async def test_an_answer_that_reaches_max_tokens_ends_with_length(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, "aaaa bbbb")
    generation = await bench.service.complete(["say"], params(max_tokens=3))
    texts, reasons, _ = await collect(generation)
    assert (texts, reasons) == (["aaa"], ["length"])
    assert generation.usage.num_output_tokens == 3


async def test_a_stop_string_ends_the_sequence_in_the_engine(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, "one STOP two")
    generation = await bench.service.chat(Dialogue([PICTURE]), params(stop=("STOP",)))
    texts, reasons, deltas = await collect(generation)
    assert (texts, reasons) == (["one "], ["stop"])
    assert len(bench.engine.aborted) == 1
    assert bench.loader.num_held == 0
    assert generation.usage.num_output_tokens == sum(len(delta.token_ids) for delta in deltas)


async def test_a_stop_string_can_be_kept_in_the_answer(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, "one STOP two")
    texts, _, _ = await collect(await bench.service.complete(["x"], params(stop=("STOP",), include=True)))
    assert texts == ["one STOP"]


@pytest.mark.parametrize(("include", "text"), [(False, "hello"), (True, "hello!")])
async def test_the_text_of_a_stop_token_is_kept_only_on_request(
    folder: Path, tokenizer: Tokenizer, include: bool, text: str
) -> None:
    (stop,) = tokenizer.encode_text("!")
    bench = Bench(folder, tokenizer, stop_token=stop)
    generation = await bench.service.complete(["x"], params(include=include, stop_token_ids=(stop,)))
    assert (await collect(generation))[0] == [text]


async def test_an_unfinished_character_at_the_end_is_a_replacement(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, "😀")
    texts, _, _ = await collect(await bench.service.complete(["x"], params(max_tokens=2)))
    assert texts == ["\ufffd"]


async def test_a_slow_reader_gets_longer_pieces_and_loses_nothing(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, "né 😀 is here")
    generation = await bench.service.complete(["x"], params(logprobs=0))
    await bench.engine.idle.wait()
    texts, reasons, deltas = await collect(generation)
    assert (texts, reasons) == (["né 😀 is here"], ["stop"])
    assert len(deltas) == 1
    assert [row.token_id for row in deltas[0].logprobs] == tokenizer.encode_text("né 😀 is here")


async def test_a_shortcut_is_offered_what_a_reader_waits_for_and_nothing_overtakes(
    folder: Path, tokenizer: Tokenizer
) -> None:
    """Every third delta is not taken by it, and goes to the reader before anything else is offered."""
    text = "word " * 20
    bench = Bench(folder, tokenizer, text)
    generation = await bench.service.complete(["say"], params())
    taken: list[Delta] = []
    all_texts: list[str] = []
    num_offered = 0

    def take(delta: Delta) -> bool:
        nonlocal num_offered
        num_offered += 1
        if num_offered % 3 == 0:
            return False
        taken.append(delta)
        all_texts.append(delta.text)
        return True

    generation.shortcut = take
    read = []
    async for delta in generation:
        read.append(delta)
        all_texts.append(delta.text)
    assert "".join(all_texts) == text
    assert len(taken) > len(read) > 1
    assert generation.usage.num_output_tokens == len(tokenizer.encode_text(text)) + 1


async def test_an_error_of_a_shortcut_ends_its_request_alone(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, "word " * 20)
    broken, other = [await bench.service.complete(["say"], params()) for _ in range(2)]

    def take(delta: Delta) -> bool:
        raise ZeroDivisionError

    broken.shortcut = take
    whole = asyncio.create_task(collect(other))
    with pytest.raises(ZeroDivisionError):
        await collect(broken)
    assert (await whole)[0] == ["word " * 20]


async def test_a_reader_that_does_not_read_ends_its_request(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_module, "MAX_UNREAD_BYTES", 20_000)
    bench = Bench(folder, tokenizer, "word " * 1000)
    generation = await bench.service.complete(["say"], params(logprobs=2))
    first = await anext(generation)
    await generation.wait_ended()
    assert len(bench.engine.aborted) == 1
    with pytest.raises(OverloadedError, match="wait to be read") as refusal:
        await anext(generation)
    assert refusal.value.reason == "unread_answer"
    assert first.text
    assert bench.service.num_in_flight == 0


async def test_a_reader_that_keeps_up_may_read_far_more_than_may_wait(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_module, "MAX_UNREAD_BYTES", 20_000)
    text = "word " * 1000
    bench = Bench(folder, tokenizer, text)
    texts, reasons, _ = await collect(await bench.service.complete(["say"], params(n=2, logprobs=2)))
    assert (texts, reasons) == ([text, text], ["stop", "stop"])


async def test_choices_differ_by_their_seed_and_share_the_prompt(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer)
    generation = await bench.service.chat(Dialogue([PICTURE]), params(n=3, seed=2**63 - 2))
    texts, reasons, _ = await collect(generation)
    assert (texts, reasons) == (["hello"] * 3, ["stop"] * 3)
    assert {request.params.seed for request in bench.engine.requests} == {2**63 - 2, 2**63 - 1, -(2**63)}
    assert generation.usage.num_prompt_tokens == len(bench.engine.requests[0].prompt_ids)
    assert len(bench.loader.loaded) == 1
    assert bench.loader.num_held == 0


async def test_choices_without_a_seed_get_different_ones(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer)
    await collect(await bench.service.complete(["x"], params(n=2)))
    first, second = (request.params.seed for request in bench.engine.requests)
    assert None not in (first, second)
    assert first != second


async def test_one_answer_without_a_seed_leaves_the_seed_to_the_engine(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer)
    await collect(await bench.service.complete(["x"], params()))
    assert bench.engine.requests[0].params.seed is None


async def test_several_prompts_get_their_choices_in_order(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer)
    bench.engine.answer = lambda request: request.prompt_ids
    texts, _, _ = await collect(await bench.service.complete(["a", "b"], params(n=2)))
    assert texts == ["a", "a", "b", "b"]


@pytest.mark.parametrize("where", ["constrained", "Booking"])
async def test_media_and_places_are_given_back_whatever_goes_wrong_before_the_engine_is_asked(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError

    bench = Bench(folder, tokenizer)
    monkeypatch.setattr(service_module, where, broken)
    with pytest.raises(ZeroDivisionError):
        await bench.service.chat(Dialogue([PICTURE]), params())
    assert len(bench.loader.loaded) == 1
    assert bench.loader.num_held == bench.service.num_in_flight == 0


async def test_closing_aborts_in_the_engine_and_gives_the_media_back(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, pauses_after=2)
    generation = await bench.service.chat(Dialogue([PICTURE]), params())
    await bench.engine.paused.wait()
    generation.close()
    await generation.wait_ended()
    assert len(bench.engine.aborted) == 1
    assert bench.loader.num_held == bench.service.num_in_flight == 0


async def test_closing_before_the_first_token_aborts_and_gives_the_media_back(
    folder: Path, tokenizer: Tokenizer
) -> None:
    bench = Bench(folder, tokenizer)
    generation = await bench.service.chat(Dialogue([PICTURE]), params())
    generation.close()
    await generation.wait_ended()
    assert len(bench.engine.aborted) == 1
    assert bench.loader.num_held == bench.service.num_in_flight == 0


async def test_a_refusal_by_the_engine_reaches_the_caller(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, error=InvalidRequestError("no", param="prompt"))
    with pytest.raises(InvalidRequestError, match="no"):
        await collect(await bench.service.chat(Dialogue([PICTURE]), params(n=2)))
    assert bench.loader.num_held == bench.service.num_in_flight == 0


async def test_a_failing_sequence_is_an_error_not_an_end(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, failure="the encoder failed")
    with pytest.raises(EngineError, match="the encoder failed"):
        await collect(await bench.service.chat(Dialogue([PICTURE]), params()))


async def test_an_engine_that_dies_is_told_from_a_sequence_that_fails(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, failure="gone", pauses_after=1)
    generation = await bench.service.chat(Dialogue([PICTURE]), params())
    await bench.engine.paused.wait()
    bench.engine.is_alive = False
    bench.engine.resume.set()
    with pytest.raises(EngineDeadError):
        await collect(generation)
    with pytest.raises(EngineDeadError):
        await bench.service.chat(Dialogue([PICTURE]), params())


async def test_more_requests_than_may_wait_are_refused_and_room_comes_back(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, pauses_after=1, info=info(max_num_seqs=2))
    running = [await bench.service.complete(["x"], params(n=2)) for _ in range(2)]
    with pytest.raises(OverloadedError, match="4 requests are in flight, the limit is 4"):
        await bench.service.complete(["x"], params())
    bench.engine.resume.set()
    for generation in running:
        await collect(generation)
    await collect(await bench.service.complete(["x"], params()))


async def test_a_request_that_fails_early_frees_its_place(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer)
    with pytest.raises(InvalidRequestError):
        await bench.service.chat(Dialogue([]), params())
    assert bench.service.num_in_flight == 0


async def test_draining_lets_running_answers_end(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, pauses_after=1)
    generation = await bench.service.chat(Dialogue([PICTURE]), params())
    draining = asyncio.ensure_future(bench.service.drain(timeout_s=60))
    await bench.engine.paused.wait()
    assert not bench.service.ready
    with pytest.raises(OverloadedError, match="shutting down"):
        await bench.service.chat(Dialogue([PICTURE]), params())
    bench.engine.resume.set()
    assert (await collect(generation))[0] == ["hello"]
    await draining


async def test_draining_ends_what_waits_for_its_media_and_says_so(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer)
    bench.loader.hangs.add("http://host/picture")
    asking = [
        asyncio.ensure_future(ask(Dialogue([PICTURE]), params())) for ask in (bench.service.chat, bench.service.count)
    ]
    await bench.loader.hanging.wait()
    await bench.service.drain(timeout_s=0)
    for each in asking:
        with pytest.raises(OverloadedError, match="shutting down"):
            await asyncio.wait_for(each, 60)
    assert bench.service.num_in_flight == 0


async def test_draining_aborts_what_does_not_end_and_says_so(folder: Path, tokenizer: Tokenizer) -> None:
    bench = Bench(folder, tokenizer, pauses_after=1)
    generation = await bench.service.chat(Dialogue([PICTURE]), params())
    await bench.engine.paused.wait()
    await bench.service.drain(timeout_s=0)
    with pytest.raises(OverloadedError, match="shutting down"):
        await collect(generation)
    assert len(bench.engine.aborted) == 1
    assert bench.loader.num_held == 0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (params(n=0), "n is 0; it must be from 1 to 128"),
        (params(stop=("",)), "empty string"),
        (params(stop=("a",) * 65), "65 strings; the limit is 64"),
        (params(seed=2**63), "64 bits"),
        (params(temperature=float("nan")), "temperature is nan"),
        (params(top_p=-0.1), "top_p is -0.1"),
    ],
)
async def test_parameters_out_of_range_are_refused(
    folder: Path, tokenizer: Tokenizer, wrong: GenerationParams, told: str
) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        await Bench(folder, tokenizer).service.chat(Dialogue([PICTURE]), wrong)


@pytest.mark.parametrize(
    ("said", "told"),
    [({"temperature": -3}, "temperature is -3"), ({"top_p": "high"}, "Expected `float`"), ({"top_k": 2.5}, "top_k")],
)
def test_sampling_defaults_that_no_request_could_ask_for_are_the_checkpoints_mistake(
    folder: Path, tmp_path: Path, said: dict[str, Any], told: str
) -> None:
    for path in folder.glob("*config.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **said}))
    with pytest.raises(CheckpointError, match=f"generation_config.json: .*{told}"):
        FrontendConfig.from_folder(tmp_path)


def test_generation_config_gives_the_sampling_defaults(folder: Path, tmp_path: Path) -> None:
    defaults = FrontendConfig.from_folder(folder).sampling_defaults
    assert defaults == {"temperature": 0.01, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.0}
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": 1}))
    assert FrontendConfig.from_folder(tmp_path).sampling_defaults == {"temperature": 0.0}
    (tmp_path / "generation_config.json").unlink()
    assert FrontendConfig.from_folder(tmp_path).sampling_defaults == {}


def test_a_folder_without_a_config_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        FrontendConfig.from_folder(tmp_path)
