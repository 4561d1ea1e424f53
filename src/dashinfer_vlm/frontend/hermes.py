"""Tools for chat templates that know none: turns in the form that Qwen's own agent library writes.

The words are those of Qwen-Agent (qwen_agent/llm/fncall_prompts/nous_fncall_prompt.py) and of the chat templates that
Qwen2.5 and Qwen3 were published with, so that a model sees what it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

Turn = dict[str, Any]
"""A message as templates are given it."""

_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
_DEFAULT_SYSTEM = "You are a helpful assistant."
"""Of Qwen2-VL's and Qwen2.5-VL's templates, where no system turn is sent."""


def in_plain_turns(turns: Sequence[Turn], tools: Sequence[dict[str, Any]]) -> list[Turn]:
    """`turns` without tool calls and tool turns, and with `tools` told in the system turn.

    Special tokens that are a caller's words must have been broken already: the tags that this adds are meant.
    """
    plain: list[Turn] = []
    for is_result, run in groupby(turns, key=lambda turn: turn["role"] == "tool"):
        some = list(run)
        plain += [_results(some)] if is_result else map(_with_calls, some)
    return _with_tools(plain, tools) if tools else plain


def _with_tools(turns: list[Turn], tools: Sequence[dict[str, Any]]) -> list[Turn]:
    told = _TOOLS.format(tools="\n".join(_json(tool) for tool in tools))
    if not turns or turns[0]["role"] != "system":
        return [{"role": "system", "content": f"{_DEFAULT_SYSTEM}\n\n{told}"}, *turns]
    return [{**turns[0], "content": _joined(turns[0]["content"], f"\n\n{told}")}, *turns[1:]]


def _with_calls(turn: Turn) -> Turn:
    calls = [call["function"] for call in turn.get("tool_calls", ())]
    if not calls:
        return turn
    told = "\n".join(f"<tool_call>\n{_json(call)}\n</tool_call>" for call in calls)
    content = turn["content"]
    rest = {name: value for name, value in turn.items() if name != "tool_calls"}
    return {**rest, "content": _joined(content, f"\n{told}" if content else told)}


def _results(turns: list[Turn]) -> Turn:
    """One user's turn with what all tools of a run have said, pictures where they stood."""
    content: str | list[Turn] = ""
    for i, turn in enumerate(turns):
        content = _joined(content, "\n<tool_response>\n" if i else "<tool_response>\n")
        content = _joined(_joined(content, turn["content"]), "\n</tool_response>")
    return {"role": "user", "content": content}


def _joined(first: str | list[Turn], second: str | list[Turn]) -> str | list[Turn]:
    if isinstance(first, str) and isinstance(second, str):
        return first + second
    return [*_parts(first), *_parts(second)]


def _parts(content: str | list[Turn]) -> list[Turn]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
