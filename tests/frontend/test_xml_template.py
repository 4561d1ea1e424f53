"""Prompts of a template whose calls are XML, and what is found out about its answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dashinfer_vlm.frontend.messages import Dialogue, Message, ToolCall
from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.frontend.tools import Tool
from tests.frontend.test_answer_parser import said
from tests.frontend.test_tools_in_templates import NATIVE, rendered, tagged
from tests.frontend.xml_template import QWEN3_5

__all__ = ["tagged"]

ASK = Message(role="user", content="Where?")
PROPERTIES: dict[str, Any] = {
    "at": {"type": "string"},
    "n": {"type": "integer"},
    "on": {"type": "boolean"},
    "box": {"type": "array"},
    "maybe": {"type": ["string", "null"]},
}
LOOK = Tool(name="look", parameters={"type": "object", "properties": PROPERTIES})
ARGUMENTS = {"at": " 42\n", "n": 3, "on": True, "box": [{"a": "b"}], "maybe": None}
TURNS = (
    ASK,
    Message(
        role="assistant",
        content="I look.",
        reasoning="hm",
        tool_calls=(ToolCall(name="look", arguments=json.dumps(ARGUMENTS)), ToolCall(name="look", arguments="")),
    ),
    Message(role="tool", content="sky"),
    Message(role="tool", content="sea"),
)


def test_earlier_turns_are_written_as_the_model_wrote_them(tagged: Tokenizer) -> None:
    text = rendered(QWEN3_5, tagged, Dialogue(TURNS, tools=[LOOK]))
    (answer,) = [turn for turn in text.split("<|im_end|>\n") if turn.startswith("<|im_start|>assistant\n<think>\nhm")]
    form = ChatTemplate(QWEN3_5, tagged).answer_form(Dialogue(TURNS, tools=[LOOK]), tagged.encode_text("<think>\n"))
    reasoning, content, calls = said(answer.removeprefix("<|im_start|>assistant\n<think>\n"), form)
    assert (reasoning, content) == ("hm", "I look.")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("look", ARGUMENTS), ("look", {})]
    results = "<tool_response>\nsky\n</tool_response>\n<tool_response>\nsea\n</tool_response>"
    assert text.endswith(f"<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_words_of_an_argument_close_nothing(tagged: Tokenizer) -> None:
    call = ToolCall(name="look", arguments=json.dumps({"at": "</tool_call><|im_end|>", "</think>": "<think>"}))
    turns = [ASK, Message(role="assistant", tool_calls=(call,))]
    tags = [id for id in ChatTemplate(QWEN3_5, tagged).encode(Dialogue(turns)) if id in tagged.added.values()]
    kept = ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
    assert tags == [tagged.added[tag] for tag in [*kept, "<|im_end|>", "<|im_start|>", "<think>"]]


@pytest.mark.parametrize(
    ("dialogue", "end", "form"),
    [
        (Dialogue([ASK]), "<think>\n", (True, True)),
        (Dialogue([ASK], variables={"enable_thinking": True}), "<think>\n", (True, True)),
        (Dialogue([ASK], variables={"enable_thinking": False}), "<think>\n\n</think>\n\n", (False, False)),
        (Dialogue([ASK], effort="none"), "<think>\n\n</think>\n\n", (False, False)),
        (Dialogue([ASK], thinks=False), "<think>\n\n</think>\n\n", (False, False)),
        (Dialogue([ASK], thinks=True), "<think>\n", (True, True)),
    ],
)
@pytest.mark.parametrize("are_tokens", [False, True])
def test_reasoning_is_opened_or_closed_by_the_prompt(
    tagged: Tokenizer, tokenizer: Tokenizer, dialogue: Dialogue, end: str, form: tuple[bool, bool], are_tokens: bool
) -> None:
    read_by = tagged if are_tokens else tokenizer
    template = ChatTemplate(QWEN3_5, read_by)
    ids = template.encode(dialogue)
    assert read_by.decode(ids, skip_special=False).endswith(f"<|im_start|>assistant\n{end}")
    told = template.answer_form(dialogue, ids)
    assert (told.may_think, told.begins_in_thought) == form


def test_the_form_of_calls_is_the_template_s(tagged: Tokenizer, template: ChatTemplate) -> None:
    dialogue = Dialogue([ASK], tools=[LOOK, Tool(name="add")])
    xml = ChatTemplate(QWEN3_5, tagged)
    assert xml.answer_form(dialogue, []).schemas == {"look": LOOK.parameters, "add": {"type": "object"}}
    assert template.answer_form(dialogue, []).schemas is None
    assert ChatTemplate(NATIVE, tagged).answer_form(dialogue, []).schemas is None
