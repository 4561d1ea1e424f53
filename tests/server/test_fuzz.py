"""Whatever is sent, the answer is an answer or an error object, and never the server's fault."""

from __future__ import annotations

from typing import Any

import httpx
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from dashinfer_vlm.server.protocol import ChatBody, CompletionBody
from dashinfer_vlm.server.responses.body import ResponseBody

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
urls = st.fixed_dictionaries({"url": st.just("x") | values}, optional={"detail": values, "max_pixels": values})
part_values = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["text", "image_url", "video_url", "image", "video", "input_text", "input_image", "output_text"]
        )
        | values
    },
    optional={
        "text": values,
        "image_url": urls | values,
        "video_url": urls,
        "image": values,
        "video": values,
        "fps": values,
        "num_frames": values,
        "detail": values,
    },
)
message_values = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool"]) | values},
    optional={
        "content": st.text() | st.lists(part_values | values, max_size=3) | values,
        "tool_calls": values,
        "name": values,
    },
)


def bodies(model: type[BaseModel], required: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A good body but for up to two fields that hold anything."""
    good = st.fixed_dictionaries(required)
    wrong = st.dictionaries(st.sampled_from(sorted(model.model_fields)), values, max_size=2)
    return st.builds(lambda first, second: first | second, good, wrong)


def check(reply: httpx.Response) -> None:
    if reply.status_code == 200:
        assert '"error":{' not in reply.text
    else:
        assert reply.status_code in (400, 404, 422)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@given(body=bodies(ChatBody, {"messages": st.lists(message_values, max_size=3)}))
def test_any_chat_body_is_answered_or_refused(shared: httpx.Client, body: dict[str, Any]) -> None:
    check(shared.post("/v1/chat/completions", json=body))


@given(body=bodies(CompletionBody, {"prompt": st.text(min_size=1, max_size=5) | values}))
def test_any_completion_body_is_answered_or_refused(shared: httpx.Client, body: dict[str, Any]) -> None:
    check(shared.post("/v1/completions", json=body))


item_values = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "item_reference"]),
        "role": st.sampled_from(["user", "system", "assistant"]) | values,
        "content": st.text() | st.lists(part_values | values, max_size=3) | values,
        "call_id": values,
        "arguments": values,
        "output": values,
        "summary": values,
        "id": values,
    },
)


@given(body=bodies(ResponseBody, {"input": st.text(min_size=1) | st.lists(item_values | values, max_size=3) | values}))
def test_any_response_body_is_answered_or_refused(shared: httpx.Client, body: dict[str, Any]) -> None:
    check(shared.post("/v1/responses", json=body))
