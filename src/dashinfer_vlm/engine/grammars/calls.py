"""The grammar of an answer that calls tools, and of reasoning before any answer, in the Lark that llguidance reads.

Both are about tags. Where a model's vocabulary has one token for a tag, that token is meant; elsewhere the tag's text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from dashinfer_vlm.engine.grammars.xml_arguments import arguments_in_lark
from dashinfer_vlm.request import Grammar

if TYPE_CHECKING:
    import llguidance

__all__ = ["CallForm", "Calls", "calls_in_lark", "thought_in_lark"]

_TEXT = r"/(.|\n)*/"


class CallForm(msgspec.Struct, frozen=True):
    """The call of one tool: `head`, arguments that the JSON schema describes, and `tail`."""

    head: str
    schema: dict[str, Any]
    tail: str
    xml: bool = False
    """Whether the arguments are parameters in XML, not JSON."""


class Calls(msgspec.Struct, frozen=True):
    """What the text of a grammar of the kind "calls" holds, as JSON."""

    begin: str
    """The tag before each call ..."""
    end: str
    """... and behind it."""
    forms: list[CallForm]
    parallel: bool
    """Whether several calls may follow each other, a line end between them."""
    free: bool
    """Whether there may be text before, between and behind calls, or no call at all."""
    marks: list[str]
    """Special tokens that such text may hold."""
    content: Grammar | None = None
    """What the answer is where it calls nothing; then it is either this, whole, or calls alone."""


def calls_in_lark(calls: Calls, tokenizer: llguidance.LLTokenizer, whitespace: str) -> str:
    """`whitespace` is the pattern of what may stand between two parts of JSON. Their content is named `content`."""
    rules = [rule for i, form in enumerate(calls.forms) for rule in _rules(f"tool{i}", form, whitespace)]
    tools = " | ".join(f"tool{i}" for i in range(len(calls.forms)))
    rules.append(f"call: ({tools}) {_tag(calls.end, tokenizer)}")
    if calls.free:
        begin, rules = _text_before(calls.begin, tokenizer), [*rules, *_text_rules(calls.marks, tokenizer)]
        head = "(upto call)* text" if calls.parallel else "upto call | text"
        return "\n".join([f"start: {head}", *begin, *rules])
    begin_tag = _tag(calls.begin, tokenizer)
    more = f' ("\\n" {begin_tag} call)*' if calls.parallel else ""
    content = " | @content" if calls.content else ""
    return "\n".join([f"start: {begin_tag} call{more}{content}", *rules])


def thought_in_lark(thought: tuple[str, str], tokenizer: llguidance.LLTokenizer) -> str:
    """Free text up to the second tag and an empty line, then `@answer`; with a first tag it may be missing as a
    whole."""
    begin, end = thought
    closed = _special(end, tokenizer)
    body = f'{_TEXT} {closed} "\\n\\n"' if closed else "/(.|\\n)*" + _escaped(end) + "\\n\\n/"
    rule = f"thought: {body}" if closed else f"thought[lazy]: {body}"
    start = f"start: ({_tag(begin, tokenizer)} thought)? @answer" if begin else "start: thought @answer"
    return f"{start}\n{rule}"


def _rules(name: str, form: CallForm, whitespace: str) -> list[str]:
    if form.xml:
        arguments = f"{name}_arguments"
        rules = arguments_in_lark(arguments, form.schema, whitespace)
        return [f"{name}: {_json(form.head)} {arguments} {_json(form.tail)}", *rules]
    schema = {"type": "object", "x-guidance": {"whitespace_pattern": whitespace}, **form.schema}
    return [f"{name}: {_json(form.head)} %json {_json(schema)} {_json(form.tail)}"]


def _text_before(tag: str, tokenizer: llguidance.LLTokenizer) -> list[str]:
    if special := _special(tag, tokenizer):
        return [f"upto: text {special}"]
    return [f"upto[lazy]: {_TEXT[:-1]}{_escaped(tag)}/"]


def _text_rules(marks: Iterable[str], tokenizer: llguidance.LLTokenizer) -> list[str]:
    special = [token for mark in marks if (token := _special(mark, tokenizer))]
    return [f"text: ({' | '.join(['TEXT', *special])})*", r"TEXT: /(.|\n)+/"]


def _tag(text: str, tokenizer: llguidance.LLTokenizer) -> str:
    return _special(text, tokenizer) or _json(text)


def _special(text: str, tokenizer: llguidance.LLTokenizer) -> str | None:
    ids = tokenizer.tokenize_str(text, parse_special=True)
    return f"<[{ids[0]}]>" if len(ids) == 1 and tokenizer.is_special_token(ids[0]) else None


def _escaped(text: str) -> str:
    """As a part of a regular expression between slashes; tags have no other characters that mean something there."""
    return text.replace("/", r"\/")


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
