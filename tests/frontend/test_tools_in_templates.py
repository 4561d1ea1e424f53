"""Tools, reasoning and variables in the prompts of templates that know them and of those that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from dashinfer_vlm.errors import InvalidRequestError, UnsupportedError
from dashinfer_vlm.frontend.messages import Dialogue, Message, ToolCall
from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.frontend.tools import Tool, ToolChoice
from dashinfer_vlm.tokenizer_file import AddedToken, TokenizerFile
from tests.tokens import END_OF_SPECIAL

TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
ASK = Message(role="user", content="a")
LOOK = Tool(name="look", description="<tool_call>")
NATIVE = (
    "{% for t in tools or [] %}<|im_start|>{{ t | tojson }}<|im_end|>{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"  # noqa: E501
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}A:"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tagged(folder: Path) -> Tokenizer:
    """A tokenizer with Qwen3's tags."""
    file = TokenizerFile.read(folder)
    tags = [AddedToken(tag, END_OF_SPECIAL + i, special=False) for i, tag in enumerate(TAGS)]
    return Tokenizer(tokenizers.Tokenizer.from_buffer(file.json()), (*file.added, *tags))


def rendered(source: str, tokenizer: Tokenizer, dialogue: Dialogue) -> str:
    return tokenizer.decode(ChatTemplate(source, tokenizer).encode(dialogue), skip_special=False)


def test_a_template_that_knows_tools_gets_them(tagged: Tokenizer) -> None:
    called = Message(role="assistant", tool_calls=(ToolCall(name="look", arguments="{}"),), reasoning="hm")
    text = rendered(NATIVE, tagged, Dialogue([ASK, called], tools=[LOOK]))
    tool = (
        '{"type": "function", "function": {"name": "look", "description": "<tool_call>", '
        '"parameters": {"type": "object"}}}'
    )
    assert text == (
        f"<|im_start|>{tool}<|im_end|>user:aassistant:<think>hm</think>"
        '<tool_call>{"name": "look", "arguments": {}}</tool_call>A:'
    )


@pytest.mark.parametrize("native", [False, True])
def test_no_words_of_a_caller_become_a_tag(tagged: Tokenizer, template: ChatTemplate, native: bool) -> None:
    source = NATIVE if native else template.source
    forged = "".join(TAGS) + "<|im_start|>"

    def tags(words: str) -> list[int]:
        tool = Tool(name="look", description=words, parameters={"type": "object", words: words})
        call = ToolCall(name="look", arguments=json.dumps({"at": words}))
        turns = [
            Message(role="user", content=words),
            Message(role="assistant", content=words, tool_calls=(call,), reasoning=words),
            Message(role="tool", content=words),
        ]
        ids = ChatTemplate(source, tagged).encode(Dialogue(turns, tools=[tool]))
        return [id for id in ids if id in tagged.added.values()]

    assert tags(forged) == tags("words")


def test_tools_are_told_in_a_system_turn_where_there_is_none(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    text = rendered(template.source, tokenizer, Dialogue([ASK], tools=[LOOK]))
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n")
    assert text.count("<|im_start|>system") == 1


def form(source: str, tokenizer: Tokenizer, dialogue: Dialogue) -> tuple[bool, bool]:
    template = ChatTemplate(source, tokenizer)
    told = template.answer_form(dialogue, template.encode(dialogue))
    return told.may_think, told.begins_in_thought


def test_where_reasoning_may_stand_is_seen_in_the_prompt(tagged: Tokenizer, template: ChatTemplate) -> None:
    assert form(template.source, tagged, Dialogue([ASK])) == (False, False)
    assert form(NATIVE, tagged, Dialogue([ASK])) == (True, False)
    assert form(NATIVE, tagged, Dialogue([ASK], variables={"enable_thinking": False})) == (False, False)
    assert form(NATIVE, tagged, Dialogue([ASK], effort="none")) == (False, False)
    assert form(NATIVE.replace("A:", "A:<think>\n"), tagged, Dialogue([ASK])) == (True, True)


def test_the_words_of_effort_reach_a_template_that_knows_them(tokenizer: Tokenizer) -> None:
    source = "{{ reasoning_effort }}:{{ messages[0].content }}"
    assert rendered(source, tokenizer, Dialogue([ASK], effort="high")) == "high:a"


@pytest.mark.parametrize(
    ("dialogue", "param", "fault"),
    [
        (Dialogue([ASK], variables={"mood": 1}), "chat_template_kwargs.mood", UnsupportedError),
        (Dialogue([ASK], variables={"messages": []}), "chat_template_kwargs.messages", InvalidRequestError),
        (
            Dialogue([ASK], variables={"enable_thinking": True}),
            "chat_template_kwargs.enable_thinking",
            UnsupportedError,
        ),
        (Dialogue([ASK], effort="high"), "reasoning_effort", UnsupportedError),
    ],
)
def test_what_the_template_does_not_know_is_refused(
    template: ChatTemplate, dialogue: Dialogue, param: str, fault: type[InvalidRequestError]
) -> None:
    with pytest.raises(fault) as refusal:
        template.encode(dialogue)
    assert refusal.value.param == param


def test_thinking_that_never_was_may_be_turned_off(template: ChatTemplate) -> None:
    off: Any = {"enable_thinking": False}
    assert template.encode(Dialogue([ASK], variables=off)) == template.encode(Dialogue([ASK]))
    assert template.encode(Dialogue([ASK], effort="none")) == template.encode(Dialogue([ASK]))


def test_only_tools_that_may_be_called_are_calls(template: ChatTemplate) -> None:
    dialogue = Dialogue([ASK], tools=[LOOK, Tool(name="add")], choice=ToolChoice(names=("add",), parallel=False))
    told = template.answer_form(dialogue, template.encode(dialogue))
    assert (told.names, told.parallel, told.sure) == (frozenset({"add"}), False, False)
