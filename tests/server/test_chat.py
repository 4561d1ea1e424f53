"""Chat completions through the OpenAI client, over a real socket and a scripted engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from dashinfer_vlm.errors import MediaFetchError
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.request import Grammar
from dashinfer_vlm.server.protocol import ChatBody, CompletionBody
from tests.frontend.scripted import ScriptedLoader
from tests.server.conftest import Running, Serve

Client = Callable[..., AsyncOpenAI]
ASK: Any = [{"role": "user", "content": "say it"}]
LOOK: Any = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Are these images different?"},
            {"type": "image_url", "image_url": {"url": "http://host/one.jpg"}},
            {"type": "image_url", "image_url": {"url": "http://host/two.jpg"}},
        ],
    }
]


async def events(running: Running, body: dict[str, Any]) -> list[Any]:
    """The events of a stream as they were sent, `[DONE]` as text."""
    reply = await running.post("/v1/chat/completions", {"messages": ASK, "stream": True} | body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_the_documented_client_example_is_answered(serve: Serve, openai_client: Client) -> None:
    running = await serve("They differ.")
    response = await openai_client(running).chat.completions.create(
        model="model", messages=LOOK, stream=False, max_completion_tokens=1024, temperature=0.1
    )
    choice = response.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "They differ.", "stop")
    assert response.model == "models/scripted"
    request = running.engine.requests[0]
    assert [item.content_hash.strip() for item in request.items] == [b"http://host/one.jpg", b"http://host/two.jpg"]
    assert (request.params.max_tokens, request.params.temperature) == (1024, 0.1)
    assert running.loader.num_held == 0


async def test_the_documented_curl_example_is_answered(serve: Serve) -> None:
    running = await serve("A dog.")
    body = {
        "model": "models/scripted",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Describe the image."},
                    {"type": "image_url", "image_url": {"url": "http://host/one.jpg"}},
                ],
            }
        ],
        "max_completion_tokens": 1024,
        "top_p": 0.5,
        "temperature": 0.1,
        "frequency_penalty": 1.05,
    }
    reply = await running.post("/v1/chat/completions", body)
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"] == "A dog."
    params = running.engine.requests[0].params
    assert (params.top_p, params.frequency_penalty) == (0.5, 1.05)


async def test_what_only_the_engine_understands_reaches_it(serve: Serve) -> None:
    running = await serve("A dog.")
    fields = {"cache_salt": "mine", "allowed_token_ids": [3, 4.0], "guided_choice": ["A dog."]}
    reply = await running.post("/v1/chat/completions", {"messages": LOOK, **fields})
    assert reply.status_code == 200
    request = running.engine.requests[0]
    assert (request.cache_salt, request.params.allowed_token_ids) == ("mine", (3, 4))
    assert request.params.grammar == Grammar("choice", '["A dog."]', "guided_choice")
    refused = await running.post("/v1/chat/completions", {"messages": LOOK, "cache_salt": ""})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "cache_salt")


async def test_usage_counts_prompt_output_and_cached_tokens(serve: Serve, openai_client: Client) -> None:
    running = await serve("qqqqq", engine={"num_cached_tokens": 16})
    usage = (await openai_client(running).chat.completions.create(model="model", messages=LOOK)).usage
    assert usage is not None
    num_prompt = len(running.engine.requests[0].prompt_ids)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (num_prompt, 6, num_prompt + 6)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 16


async def test_a_stream_is_role_then_text_then_reason_then_usage_then_done(serve: Serve) -> None:
    running = await serve("qz")
    told = await events(running, {"stream_options": {"include_usage": True}})
    assert told[-1] == "[DONE]"
    deltas = [event["choices"][0]["delta"] for event in told[:-2]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == "qz"
    assert deltas[-1] == {}
    assert [event["choices"][0]["finish_reason"] for event in told[:-2]] == [None] * (len(deltas) - 1) + ["stop"]
    assert [event["usage"] for event in told[:-2]] == [None] * len(deltas)
    assert told[-2]["choices"] == []
    assert told[-2]["usage"]["completion_tokens"] == 3
    assert len({event["id"] for event in told[:-1]}) == 1


async def test_a_stream_without_include_usage_has_none(serve: Serve) -> None:
    told = await events(await serve("qz"), {})
    assert not any("usage" in event for event in told[:-1])
    assert told[-2]["choices"][0]["finish_reason"] == "stop"


async def test_characters_of_several_tokens_are_never_split(serve: Serve, openai_client: Client) -> None:
    text = "né 😀👍🏽 日本語"
    running = await serve(text)
    stream = await openai_client(running).chat.completions.create(model="model", messages=ASK, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_before_it(serve: Serve, openai_client: Client, stream: bool) -> None:
    running = await serve("one END two")
    client = openai_client(running).chat.completions
    if stream:
        chunks = [c async for c in await client.create(model="model", messages=ASK, stop=["END"], stream=True)]
        text, reason = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = (await client.create(model="model", messages=ASK, stop="END")).choices[0]
        text, reason = choice.message.content or "", choice.finish_reason
    assert (text, reason) == ("one ", "stop")
    await running.engine.idle.wait()
    assert len(running.engine.aborted) == 1


async def test_max_tokens_ends_with_length(serve: Serve, openai_client: Client) -> None:
    client = openai_client(await serve("qqqq"))
    reply = await client.chat.completions.create(model="model", messages=ASK, max_tokens=2)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("qq", "length")


async def test_several_choices_stream_side_by_side(serve: Serve, openai_client: Client) -> None:
    client = openai_client(await serve("abc"))
    texts, roles, reasons = ["", ""], [0, 0], [0, 0]
    async for chunk in await client.chat.completions.create(model="model", messages=ASK, n=2, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
        reasons[choice.index] += choice.finish_reason == "stop"
    assert (texts, roles, reasons) == (["abc", "abc"], [1, 1], [1, 1])


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_come_with_token_bytes_and_alternatives(
    serve: Serve, openai_client: Client, stream: bool
) -> None:
    client = openai_client(await serve("é")).chat.completions
    options: Any = {"model": "model", "messages": ASK, "logprobs": True, "top_logprobs": 2}
    if stream:
        found = [c.choices[0].logprobs async for c in await client.create(stream=True, **options)]
        rows = [row for logprobs in found if logprobs for row in logprobs.content or ()]
    else:
        logprobs = (await client.create(**options)).choices[0].logprobs
        assert logprobs is not None
        rows = logprobs.content or []
    assert bytes(byte for row in rows for byte in row.bytes or ()).decode() == "é"
    assert [row.logprob for row in rows] == [-0.5, -0.5]
    assert [top.logprob for top in rows[0].top_logprobs] == [-0.5, -9999.0]


async def test_sampling_options_reach_the_engine(serve: Serve, openai_client: Client) -> None:
    running = await serve()
    await openai_client(running).chat.completions.create(
        model="model",
        messages=ASK,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"5": -100},
        extra_body={
            "top_k": -1,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "no_repeat_ngram_size": 3,
            "min_tokens": 2,
            "stop_token_ids": [9],
            "ignore_eos": True,
        },
    )
    params = running.engine.requests[0].params
    assert (params.temperature, params.top_p, params.seed, params.top_k, params.min_p) == (0.5, 0.9, 7, 0, 0.05)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (params.logit_bias, params.no_repeat_ngram_size, params.min_tokens) == ({5: -100.0}, 3, 2)
    assert (params.stop_token_ids, params.ignore_eos, params.max_tokens) == ((9,), True, None)


async def test_the_models_generation_config_gives_what_the_request_leaves_open(serve: Serve) -> None:
    running = await serve(defaults={"temperature": 0.01, "top_k": 1})
    await running.post("/v1/chat/completions", {"messages": ASK, "temperature": 0.8})
    params = running.engine.requests[0].params
    assert (params.temperature, params.top_k) == (0.8, 1)


async def test_media_options_reach_the_media_room(serve: Serve) -> None:
    running = await serve()
    content = [
        {"type": "image_url", "image_url": {"url": "a", "min_pixels": 100, "max_pixels": 900}, "uuid": "x"},
        {"type": "image_url", "image_url": {"url": "b", "detail": "low"}},
        {"type": "video_url", "video_url": {"url": "c", "fps": 2}},
        {"type": "video", "video": ["d", "e"], "fps": 0.5},
    ]
    reply = await running.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert reply.status_code == 200, reply.text
    refs = sorted(running.loader.loaded, key=lambda ref: str(ref.param))
    assert [(ref.kind, ref.source, ref.min_pixels, ref.max_pixels, ref.fps) for ref in refs] == [
        ("image", "a", 100, 900, None),
        ("image", "b", None, 512 * 512, None),
        ("video", "c", None, None, 2),
        ("video", ("d", "e"), None, None, 0.5),
    ]
    names = ["image_url.url", "image_url.url", "video_url.url", "video"]
    assert [ref.param for ref in refs] == [f"messages[0].content[{i}].{name}" for i, name in enumerate(names)]


@pytest.mark.parametrize(("bounds", "most"), [((1, 10**7), 512 * 512), ((1, 5000), 5000), ((300_000, 10**7), 300_000)])
async def test_low_detail_is_512_by_512_within_the_servers_bounds(
    serve: Serve, bounds: tuple[int, int], most: int
) -> None:
    running = await serve(loader=ScriptedLoader(pixel_bounds=bounds))
    content = [{"type": "image_url", "image_url": {"url": "a", "detail": "low"}}]
    await running.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert running.loader.loaded[0].max_pixels == most


async def test_an_answer_may_be_sent_back_as_it_came(serve: Serve, openai_client: Client) -> None:
    client = openai_client(await serve())
    answer = (await client.chat.completions.create(model="model", messages=ASK)).choices[0].message
    turns = [*ASK, answer.model_dump(), {"role": "user", "content": "and then?"}]
    assert (await client.chat.completions.create(model="model", messages=turns)).choices[0].finish_reason == "stop"


async def test_a_developer_message_is_a_system_message(serve: Serve, tokenizer: Tokenizer) -> None:
    running = await serve()
    await running.post("/v1/chat/completions", {"messages": [{"role": "developer", "content": "be brief"}, *ASK]})
    prompt = tokenizer.decode(running.engine.requests[0].prompt_ids, skip_special=False)
    assert prompt.startswith("<|im_start|>system\nbe brief<|im_end|>")


async def test_fields_without_effect_are_accepted(serve: Serve) -> None:
    body = {
        "messages": ASK,
        "user": "u",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "store": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "best_of": 1,
        "parallel_tool_calls": True,
    }
    assert (await (await serve()).post("/v1/chat/completions", body)).status_code == 200


async def test_a_trailing_answer_goes_on_and_is_counted_alike(serve: Serve, tokenizer: Tokenizer) -> None:
    running = await serve(" on the mat.")
    body = {"messages": [*ASK, {"role": "assistant", "content": "The cat is"}], "continue_final_message": True}
    reply = (await running.post("/v1/chat/completions", body)).json()
    assert reply["choices"][0]["message"]["content"] == " on the mat."
    prompt = running.engine.requests[0].prompt_ids
    assert tokenizer.decode(prompt, skip_special=False).endswith("<|im_start|>assistant\nThe cat is")
    assert (await running.post("/tokenize", body)).json()["tokens"] == prompt


async def test_a_turn_is_not_opened_without_generation_prompt(serve: Serve, tokenizer: Tokenizer) -> None:
    running = await serve()
    await running.post("/v1/chat/completions", {"messages": ASK, "add_generation_prompt": False})
    assert tokenizer.decode(running.engine.requests[0].prompt_ids, skip_special=False).endswith("say it<|im_end|>\n")


VLLM_DEFAULTS: dict[str, Any] = {
    "frequency_penalty": 0.0, "logit_bias": None, "logprobs": False, "top_logprobs": 0, "max_tokens": None, "n": 1,
    "presence_penalty": 0.0, "response_format": None, "seed": None, "stop": [], "stream": False, "stream_options": None,
    "tools": None, "tool_choice": "none", "reasoning_effort": None, "include_reasoning": True, "use_beam_search": False,
    "length_penalty": 1.0, "stop_token_ids": [], "include_stop_str_in_output": False, "ignore_eos": False,
    "min_tokens": 0, "skip_special_tokens": True, "spaces_between_special_tokens": True, "detokenize": True,
    "truncate_prompt_tokens": None, "prompt_logprobs": None, "allowed_token_ids": None, "bad_words": [], "echo": False,
    "add_special_tokens": False, "documents": None, "chat_template": None, "chat_template_kwargs": None,
    "mm_processor_kwargs": None, "guided_json": None, "structured_outputs": None, "structural_tag": None, "priority": 0,
    "logits_processors": None, "return_tokens_as_token_ids": None, "return_token_ids": None, "cache_salt": None,
    "kv_transfer_params": None, "vllm_xargs": None, "top_k": None, "min_p": None, "best_of": None,
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_field_with_vllms_own_default_changes_nothing(serve: Serve, path: str) -> None:
    running = await serve()
    asked = {"messages": ASK} if "chat" in path else {"prompt": "say it", "max_tokens": None}
    known = ChatBody.model_fields if "chat" in path else CompletionBody.model_fields
    defaults = {name: value for name, value in VLLM_DEFAULTS.items() if name in known}
    if "chat" not in path:
        del defaults["logprobs"]  # a number on this route
    for body in (asked, asked | defaults):
        reply = await running.post(path, body)
        assert reply.status_code == 200, reply.text
    plain, with_defaults = running.engine.requests
    assert (with_defaults.prompt_ids, with_defaults.params) == (plain.prompt_ids, plain.params)


@pytest.mark.parametrize("body", [ChatBody, CompletionBody])
async def test_every_optional_field_may_be_null(serve: Serve, body: type[ChatBody] | type[CompletionBody]) -> None:
    optional = {name: None for name, field in body.model_fields.items() if not field.is_required()}
    running = await serve()
    path, asked = ("chat/completions", {"messages": ASK}) if body is ChatBody else ("completions", {"prompt": "x"})
    reply = await running.post(f"/v1/{path}", asked | optional)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_minus_one_runs_to_the_end_of_the_context(serve: Serve, name: str) -> None:
    running = await serve()
    assert (await running.post("/v1/chat/completions", {"messages": ASK, name: -1})).status_code == 200
    assert running.engine.requests[0].params.max_tokens is None


async def test_integers_may_be_written_as_whole_floats(serve: Serve) -> None:
    running = await serve()
    body = {"messages": ASK, "max_tokens": 16.0, "top_k": 5.0, "seed": 7.0, "n": 1.0, "stop_token_ids": [9.0]}
    body |= {"best_of": 1.0, "priority": 0.0, "length_penalty": 1}
    assert (await running.post("/v1/chat/completions", body)).status_code == 200
    params = running.engine.requests[0].params
    assert (params.max_tokens, params.top_k, params.seed, params.stop_token_ids) == (16, 5, 7, (9,))


async def test_processor_arguments_of_the_request_reach_the_media_room(serve: Serve) -> None:
    running = await serve()
    content = [{"type": "image", "image": "a"}, {"type": "video_url", "video_url": "data:video/jpeg;base64,AA,BB"}]
    kwargs = {"max_pixels": 5000, "fps": [2.0]}
    body = {"messages": [{"role": "user", "content": content}], "mm_processor_kwargs": kwargs}
    assert (await running.post("/v1/chat/completions", body)).status_code == 200
    image, video = sorted(running.loader.loaded, key=lambda ref: ref.kind)
    assert (image.max_pixels, image.fps, video.max_pixels, video.fps) == (5000, None, 5000, 2.0)
    assert video.source == ("data:image/jpeg;base64,AA", "data:image/jpeg;base64,BB")


async def test_eight_clients_stream_at_once(serve: Serve, openai_client: Client) -> None:
    running = await serve("the answer is here", engine={"pauses_after": 1})
    client = openai_client(running)

    async def ask() -> str:
        stream = await client.chat.completions.create(model="model", messages=LOOK, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    asking = [asyncio.create_task(ask()) for _ in range(8)]
    while len(running.engine.running) < 8:
        await asyncio.wait(asking, timeout=0.01)
    running.engine.resume.set()
    assert await asyncio.gather(*asking) == ["the answer is here"] * 8
    assert running.loader.num_held == running.service.num_in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pauses_after", [0, 2])
async def test_a_client_that_leaves_frees_its_request(serve: Serve, stream: bool, pauses_after: int) -> None:
    """After 0 tokens the request is being prefilled, after 2 it streams."""
    running = await serve("hello", engine={"pauses_after": pauses_after})
    async with httpx.AsyncClient(base_url=running.url) as client:
        body = {"messages": LOOK, "stream": stream}
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await running.engine.paused.wait()
        asking.cancel()
    await running.engine.idle.wait()
    assert len(running.engine.aborted) == 1
    await running.service.drain(timeout_s=60)
    assert running.loader.num_held == running.service.num_in_flight == 0


async def test_a_client_that_leaves_while_its_image_is_fetched_frees_its_request(serve: Serve) -> None:
    running = await serve(loader=ScriptedLoader(hangs={"http://host/two.jpg"}))
    async with httpx.AsyncClient(base_url=running.url) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json={"messages": LOOK}))
        await running.loader.hanging.wait()
        asking.cancel()
    await running.service.drain(timeout_s=60)
    assert not running.engine.requests
    assert running.loader.num_held == running.service.num_in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_has_its_status(
    serve: Serve, openai_client: Client, stream: bool
) -> None:
    running = await serve(engine={"failure": "the encoder failed", "fails_after": 0})
    with pytest.raises(openai.InternalServerError, match="the encoder failed") as caught:
        await openai_client(running).chat.completions.create(model="model", messages=ASK, stream=stream)
    assert caught.value.code == "engine_error"


async def test_an_error_in_mid_stream_is_an_event_and_ends_the_stream(serve: Serve, openai_client: Client) -> None:
    running = await serve("hello", engine={"failure": "the encoder failed", "fails_after": 2})
    told = await events(running, {})
    assert told[-1] == {
        "error": {"message": "the encoder failed", "type": "server_error", "param": None, "code": "engine_error"}
    }
    stream = await openai_client(running).chat.completions.create(model="model", messages=ASK, stream=True)
    with pytest.raises(openai.APIError, match="the encoder failed"):
        [chunk async for chunk in stream]


async def test_an_error_in_a_whole_answer_is_never_an_empty_answer(serve: Serve) -> None:
    running = await serve("hello", engine={"failure": "the encoder failed", "fails_after": 2})
    reply = await running.post("/v1/chat/completions", {"messages": ASK})
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine_error")


async def test_a_bad_image_fails_alone(serve: Serve, openai_client: Client) -> None:
    running = await serve("hello", loader=ScriptedLoader(fails={"http://host/one.jpg": MediaFetchError("no answer")}))
    client = openai_client(running).chat.completions
    bad, good = await asyncio.gather(
        client.create(model="model", messages=LOOK),
        client.create(model="model", messages=ASK),
        return_exceptions=True,
    )
    assert isinstance(bad, openai.InternalServerError)
    assert bad.status_code == 502
    assert not isinstance(good, BaseException)
    assert good.choices[0].message.content == "hello"
