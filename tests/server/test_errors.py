"""Every refusal is the OpenAI error object with the right status, and the server serves on."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from dashinfer_vlm import errors
from dashinfer_vlm.config import MediaConfig
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.schema import DEEPEST
from dashinfer_vlm.server.errors import reply_to
from tests.frontend.scripted import ScriptedLoader
from tests.server.conftest import Serve

CHAT = "/v1/chat/completions"
ASK: Any = [{"role": "user", "content": "say it"}]


def picture(**image: Any) -> Any:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://host/one"} | image}]}]


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error object, after checking that it is one and that nothing else is said."""
    body = reply.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


BAD_BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "messages", "messages is missing"),
    ({"messages": []}, "messages", "messages is empty"),
    ({"messages": "hi"}, "messages", "valid array"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "wrong type, number"),
    ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]", "wrong type, number"),
    ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0].type", "as pictures"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].image", "missing"),
    ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "messages[0].content[0].type", "supported are"),
    (
        {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
        "messages[0].content[0].type",
        '{"type": "text", "t',
    ),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type", "audio"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "missing"),
    ({"messages": [{"role": "system", "content": picture()[0]["content"]}]}, "messages[0].content", "system message"),
    ({"messages": picture(url=1)}, "messages[0].content[0].image_url.url", "valid string"),
    ({"messages": picture(max_pixels=0)}, "messages[0].content[0].image_url.max_pixels", "greater than or equal to 1"),
    ({"messages": picture(fps=1)}, "messages[0].content[0].image_url.fps", "not a field that this server knows"),
    ({"messages": ASK, "chat_template_kwargs": {"mood": 1}}, "chat_template_kwargs.mood", "knows no 'mood'"),
    ({"messages": ASK, "reasoning_effort": "much"}, "reasoning_effort", "'none', 'minimal'"),
    ({"messages": ASK, "temperature": -1}, "temperature", "temperature is -1"),
    ({"messages": ASK, "temperature": "hot"}, "temperature", "valid number"),
    ({"messages": ASK, "temperature": True}, "temperature", "valid number"),
    ({"messages": ASK, "top_p": 1.5}, "top_p", "from 0 to 1"),
    ({"messages": ASK, "max_tokens": 0}, "max_tokens", "max_tokens is 0"),
    ({"messages": ASK, "max_tokens": -5}, "max_tokens", "max_tokens is -5"),
    ({"messages": ASK, "max_tokens": 1.5}, "max_tokens", "valid integer"),
    ({"messages": ASK, "max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "send one of them"),
    ({"messages": ASK, "max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0"),
    ({"messages": ASK, "max_completion_tokens": 2, "min_tokens": 5}, "min_tokens", "more than max_completion_tokens 2"),
    ({"messages": ASK, "max_completion_tokens": 5000}, "messages", "lower max_completion_tokens to at most"),
    ({"messages": ASK, "n": 0}, "n", "n is 0"),
    (
        {"messages": ASK, "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "both true",
    ),
    ({"messages": ASK, "n": 10**30}, "n", ""),
    ({"messages": ASK, "stop": [""]}, "stop", "empty"),
    ({"messages": ASK, "seed": 2**64}, "seed", "64 bits"),
    *(
        ({"messages": ASK, name: 2**64}, name, name)
        for name in ("top_k", "max_tokens", "min_tokens", "no_repeat_ngram_size")
    ),
    ({"messages": ASK, "logprobs": True, "top_logprobs": 2**64}, "top_logprobs", "less than or equal to 20"),
    ({"messages": ASK, "seed": 10**30}, "seed", "64 bits"),
    ({"messages": ASK, "stop_token_ids": [2**64]}, "stop_token_ids", "18446744073709551616"),
    ({"messages": ASK, "stop_token_ids": [5] * 1025}, "stop_token_ids", "the limit is 1024"),
    ({"messages": ASK, "logit_bias": {str(2**64): 1}}, "logit_bias", "18446744073709551616"),
    ({"messages": ASK, "logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias", "the limit is 1024"),
    ({"messages": ASK, "logit_bias": {"999999": 1}}, "logit_bias", "999999"),
    ({"messages": ASK, "logit_bias": {"x": 1}}, "logit_bias.x", "valid integer"),
    ({"messages": ASK, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"messages": ASK, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"messages": ASK, "stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"messages": ASK, "min_tokens": 5, "max_tokens": 2}, "min_tokens", "more than max_tokens"),
]


@pytest.mark.parametrize(("body", "param", "told"), BAD_BODIES)
def test_a_bad_request_is_400_and_names_the_field(
    shared: httpx.Client, body: dict[str, Any], param: str, told: str
) -> None:
    reply = shared.post(CHAT, json=body)
    error = error_of(reply)
    assert reply.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert told in error["message"]
    assert shared.post(CHAT, json={"messages": ASK}).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{}]),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["text", "audio"]),
        ("best_of", 2),
        ("store", True),
        ("reasoning_effort", "high"),
        ("prediction", {"type": "content", "content": "x"}),
        ("echo", True),
        ("guided_whitespace_pattern", " "),
        ("nonsense", 1),
    ],
)
def test_an_unsupported_option_is_refused_by_name(shared: httpx.Client, field: str, value: Any) -> None:
    error = error_of(reply := shared.post(CHAT, json={"messages": ASK, field: value}))
    assert (reply.status_code, error["param"], error["code"]) == (400, field, "unsupported")
    assert field in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"messages": [], "messages"',
        b"[" * 100_000,
        b"null",
        b"[]",
        b'{"messages": "\\ud800"}',
    ],
)
def test_a_body_that_is_no_json_object_is_400(shared: httpx.Client, body: bytes) -> None:
    reply = shared.post(CHAT, content=body)
    assert (reply.status_code, error_of(reply)["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
def test_numbers_that_are_not_finite_are_400(shared: httpx.Client, field: str, value: str) -> None:
    content = f'{{"messages": [{{"role": "user", "content": "x"}}], "{field}": {value}}}'
    reply = shared.post(CHAT, content=content)
    assert (reply.status_code, error_of(reply)["param"]) == (400, field)


def test_a_body_that_is_nested_too_deep_is_told_so(shared: httpx.Client) -> None:
    for depth, told in ((DEEPEST, "response_format"), (DEEPEST + 1, "nested too deep: a field may hold 200 levels")):
        body = b'{"response_format": ' + b"[" * depth + b"]" * depth + b"}"
        reply = shared.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert (reply.status_code, told in error_of(reply)["message"]) == (400, True), reply.text


def test_a_body_without_a_content_type_is_read(shared: httpx.Client) -> None:
    reply = shared.post(CHAT, content=b'{"messages": [{"role": "user", "content": "x"}]}')
    assert reply.status_code == 200


async def test_a_body_that_is_too_large_is_413(serve: Serve) -> None:
    running = await serve(max_body_bytes=1000)
    reply = await running.post(CHAT, {"messages": [{"role": "user", "content": "x" * 200_000}]})
    assert (reply.status_code, error_of(reply)["code"]) == (413, "body_too_large")


async def test_a_prompt_that_is_too_long_is_context_length_exceeded(serve: Serve) -> None:
    running = await serve()
    reply = await running.post(CHAT, {"messages": [{"role": "user", "content": "q" * 5000}]})
    error = error_of(reply)
    assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert error["message"].startswith("This model's maximum context length is 4096 tokens. However, your messages")


async def test_more_images_than_the_limit_are_400(serve: Serve) -> None:
    running = await serve(max_items={"image": 0})
    reply = await running.post(CHAT, {"messages": picture()})
    assert (reply.status_code, "the limit is 0" in error_of(reply)["message"]) == (400, True)


async def test_hundreds_of_pictures_are_refused_at_once_while_others_are_served(serve: Serve) -> None:
    """By the bound that holds without a flag; nothing is fetched."""
    running = await serve(max_items=MediaConfig().max_items)
    pictures = [{"type": "image_url", "image_url": {"url": f"http://host/{i}"}} for i in range(800)]
    messages = [{"role": "user", "content": pictures}]
    refusing = asyncio.create_task(running.post(CHAT, {"messages": messages}))
    healths = []
    while not refusing.done():
        healths.append((await running.get("/health")).status_code)
    reply = await refusing
    assert reply.status_code == 400
    assert "800 images, the limit is 128" in error_of(reply)["message"]
    assert "--limit-mm-per-prompt" in error_of(reply)["message"]
    assert set(healths) == {200}
    assert not running.loader.loaded


@pytest.mark.parametrize(
    ("path", "body", "asked"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "n": 128}, 128),
        ("/v1/completions", {"prompt": ["x"] * 20, "n": 10}, 200),
    ],
)
async def test_one_request_cannot_ask_for_more_answers_than_all_together_may(
    serve: Serve, path: str, body: dict[str, Any], asked: int
) -> None:
    running = await serve(config={"max_queued_requests": 100})
    reply = await running.post(path, body)
    assert (reply.status_code, error_of(reply)["param"]) == (400, "n")
    assert f"asks for {asked} answers; the limit for all requests together is 108" in error_of(reply)["message"]
    assert not running.engine.requests


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.MediaError("not an image"), 422, "invalid_media"),
        (errors.MediaRefusedError("private address"), 422, "media_refused"),
        (errors.MediaTooLargeError("too many pixels"), 422, "media_too_large"),
        (errors.MediaUnavailableError("status 404"), 422, "media_unavailable"),
        (errors.MediaFetchError("no answer"), 502, "media_fetch_failed"),
        (errors.MediaTimeoutError("too slow"), 504, "media_timeout"),
    ],
)
async def test_media_errors_have_their_statuses(serve: Serve, error: errors.MediaError, status: int, code: str) -> None:
    error.param = "messages[0].content[0]"
    running = await serve(loader=ScriptedLoader(fails={"http://host/one": error}))
    reply = await running.post(CHAT, {"messages": picture()})
    told = error_of(reply)
    assert (reply.status_code, told["code"], told["message"], told["param"]) == (status, code, str(error), error.param)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.InvalidRequestError("no"), 400, "invalid_value"),
        (errors.ContextLengthError("no"), 400, "context_length_exceeded"),
        (errors.OverloadedError("full", retry_after_s=7), 429, "overloaded"),
        (errors.RateLimitError("enough", retry_after_s=7), 429, "rate_limit_exceeded"),
        (errors.UnavailableError("closing", retry_after_s=7), 503, "overloaded"),
        (errors.EngineDeadError("gone"), 503, "engine_dead"),
        (errors.EngineError("broken"), 500, "engine_error"),
        (OSError(2, "no such file", "/secret/path"), 500, "internal_error"),
    ],
)
async def test_engine_errors_have_their_statuses(serve: Serve, error: Exception, status: int, code: str) -> None:
    running = await serve(engine={"error": error})
    reply = await running.post(CHAT, {"messages": ASK})
    told = error_of(reply)
    assert (reply.status_code, told["code"]) == (status, code)
    assert "secret" not in reply.text
    assert reply.headers.get("retry-after") == ("7" if code in ("overloaded", "rate_limit_exceeded") else None)


async def test_what_nobody_foresaw_is_logged_once_and_answered_as_all_requests_are(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    running = await serve(engine={"error": OSError(2, "no such file")})
    loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error")]
    with ExitStack() as stack:
        for logger in loggers:
            logger.addHandler(caplog.handler)
            stack.callback(logger.removeHandler, caplog.handler)
        reply = await running.post(CHAT, {"messages": ASK}, headers={"x-request-id": "mine"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (500, "mine")
    assert len([record for record in caplog.records if record.exc_info]) == 1


async def test_too_many_requests_are_429_with_retry_after(serve: Serve) -> None:
    running = await serve(config={"max_queued_requests": 0}, engine={"pauses_after": 0})
    full = await running.service.complete(["x"] * 8, GenerationParams())
    reply = await running.post(CHAT, {"messages": ASK})
    assert (reply.status_code, error_of(reply)["code"], reply.headers["retry-after"]) == (429, "overloaded", "1")
    full.close()


async def test_a_dead_engine_is_503_everywhere(serve: Serve) -> None:
    running = await serve()
    running.engine.is_alive = False
    reply = await running.post(CHAT, {"messages": ASK})
    assert (reply.status_code, error_of(reply)["code"]) == (503, "engine_dead")
    for path in ("/health", "/ready"):
        assert (await running.get(path)).status_code == 503


async def test_an_unknown_model_is_404_and_told_what_there_is(serve: Serve) -> None:
    running = await serve(config={"served_model_name": ("mine", "also")})
    reply = await running.post(CHAT, {"messages": ASK, "model": "gpt-9"})
    error = error_of(reply)
    assert (reply.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "mine, also" in error["message"]


@pytest.mark.parametrize("asked", ["mine", "also", "model", "models/scripted", None])
async def test_every_name_of_the_model_is_accepted(serve: Serve, asked: str | None) -> None:
    running = await serve(config={"served_model_name": ("mine", "also")})
    reply = await running.post(CHAT, {"messages": ASK, "model": asked})
    assert reply.status_code == 200
    assert reply.json()["model"] == (asked if asked in ("also", "models/scripted") else "mine")


def test_unknown_routes_and_methods_get_error_objects(shared: httpx.Client) -> None:
    missing, wrong = shared.get("/v1/nothing"), shared.get(CHAT)
    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
    assert (wrong.status_code, error_of(wrong)["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/v1/embeddings", "published for it give vectors"),
        ("/pooling", "/v1/embeddings"),
        ("/v1/audio/transcriptions", "neither hears nor speaks"),
        ("/v1/images/generations", "/v1/chat/completions"),
        ("/v1/moderations", "does not classify"),
        ("/v1/rerank", "published for it score pairs"),
        ("/v2/rerank", "published for it score pairs"),
        ("/rerank", "published for it score pairs"),
        ("/v1/score", "published for it score pairs"),
        ("/score", "published for it score pairs"),
        ("/v1/fine_tuning/jobs/job_1/cancel", "nothing is trained"),
        ("/v1/assistants", "/v1/chat/completions"),
        ("/v1/complete", "/v1/messages"),
        ("/v1/conversations", "previous_response_id"),
        ("/v1/v1/messages", "ends before /v1"),
        ("/chat/completions", "ends in /v1"),
        ("/models", "ends in /v1"),
    ],
)
def test_what_other_servers_have_is_refused_with_a_reason(shared: httpx.Client, path: str, told: str) -> None:
    for reply in (shared.post(path, json={"input": "x"}), shared.get(path)):
        error = error_of(reply)
        assert (reply.status_code, error["code"]) == (404, "not_served")
        assert told in error["message"]


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_of_the_package_has_a_row_that_fits(name: str) -> None:
    kind: type[Exception] = getattr(errors, name)
    reply = reply_to(kind("told"))
    startup = kind in (errors.DashInferError, errors.ConfigError, errors.CheckpointError)
    assert (reply.error.code == "internal_error") == startup
    assert (reply.error.message == "told") != startup


async def test_an_answer_that_is_not_there_in_time_is_504(serve: Serve) -> None:
    running = await serve(engine={"pauses_after": 1})
    for body, headers in (({"timeout": 0.05}, {}), ({}, {"X-Request-Timeout": "0.05"})):
        reply = await running.post(CHAT, {"messages": ASK, **body}, headers=headers)
        assert (reply.status_code, error_of(reply)["code"]) == (504, "deadline_exceeded")
    assert running.service.num_in_flight == 0


async def test_a_stream_that_is_not_complete_in_time_ends_with_an_error_event(serve: Serve) -> None:
    running = await serve(engine={"pauses_after": 1})
    reply = await running.post(CHAT, {"messages": ASK, "stream": True, "timeout": 0.2})
    assert reply.status_code == 200
    assert '"code":"deadline_exceeded"' in reply.text.strip().rsplit("\n\n", 1)[1]
    assert "[DONE]" not in reply.text
    metrics = (await running.get("/metrics")).text
    assert 'dashinfer_choices_total{reason="timeout"} 1.0' in metrics


@pytest.mark.parametrize("header", ["soon", "0", "-1", "nan", "1e300"])
async def test_a_time_that_cannot_be_is_400(serve: Serve, header: str) -> None:
    running = await serve()
    reply = await running.post(CHAT, {"messages": ASK}, headers={"X-Request-Timeout": header})
    assert (reply.status_code, error_of(reply)["param"]) == (400, "x-request-timeout")


async def test_tokens_that_wait_are_bounded_and_counted(serve: Serve) -> None:
    running = await serve(engine={"pauses_after": 0}, config={"max_queued_tokens": 10})
    asking = asyncio.create_task(running.post("/v1/completions", {"prompt": [1] * 10}))
    await running.engine.paused.wait()
    reply = await running.post(CHAT, {"messages": ASK})
    assert (reply.status_code, error_of(reply)["code"]) == (429, "overloaded")
    assert int(reply.headers["retry-after"]) >= 1
    lines = (await running.get("/metrics")).text.splitlines()
    assert "dashinfer_queued_tokens 10.0" in lines
    assert 'dashinfer_refusals_total{reason="queued_tokens"} 1.0' in lines
    running.engine.resume.set()
    assert (await asking).status_code == 200


async def test_an_engine_that_is_started_again_is_worth_waiting_for(serve: Serve) -> None:
    """The process is well, and no requests should come here yet."""
    running = await serve()
    running.engine.comes_back = True
    running.engine.is_alive = False
    reply = await running.post(CHAT, {"messages": ASK})
    assert (reply.status_code, error_of(reply)["code"], reply.headers["retry-after"]) == (503, "overloaded", "30")
    assert [(await running.get(path)).status_code for path in ("/health", "/ready")] == [200, 503]
    running.engine.is_alive = True
    assert (await running.post(CHAT, {"messages": ASK})).status_code == 200
    assert (await running.get("/ready")).status_code == 200
