"""What a response repeats of its request."""

from __future__ import annotations

import time
from typing import Any

from pydantic import BaseModel

from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.server.responses.body import ResponseBody, ResponseToolBody
from dashinfer_vlm.server.responses.replies import ResponseReply


def begun(body: ResponseBody, params: GenerationParams, *, id: str, model: str, store: bool) -> ResponseReply:
    """A response of which nothing is there yet; `store` is whether it will be kept."""
    return ResponseReply(
        id=id,
        created_at=int(time.time()),
        model=model,
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning={"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        safety_identifier=body.safety_identifier,
        store=store,
        temperature=params.sampling.temperature,
        text=_text(body),
        tool_choice=_sent(body.tool_choice) if isinstance(body.tool_choice, BaseModel) else body.tool_choice or "auto",
        tools=[_tool(tool) for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=params.sampling.top_p,
        user=body.user,
    )


def _text(body: ResponseBody) -> dict[str, Any]:
    form = body.text.format if body.text else None
    return {"format": _sent(form) if form else {"type": "text"}, "verbosity": "medium"}


def _tool(body: ResponseToolBody) -> dict[str, Any]:
    tool = body.tool("tools")
    return _sent(body) | {"parameters": tool.parameters, "strict": tool.strict}


def _sent(body: BaseModel) -> dict[str, Any]:
    return body.model_dump(by_alias=True, exclude_none=True)
