"""A grammar as a client sends it, in the form that llguidance reads, and its complaints in words for the client."""

from __future__ import annotations

import json
import re
from typing import Any

import llguidance
import msgspec

from dashinfer_vlm.engine.grammars.calls import Calls, calls_in_lark, thought_in_lark
from dashinfer_vlm.engine.grammars.exact import kept_exactly
from dashinfer_vlm.request import Grammar

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between the tokens of JSON. Bounded: a model that likes blanks would otherwise write nothing else up to its limit."""
LIMITS = llguidance.LLParserLimits(max_lexer_states=100_000, verbose_errors=False)
"""llguidance's own, but for states: each takes a kilobyte or two, and every sequence has its own."""

Form = dict[str, Any]
"""One grammar of the library."""


class _Forms(msgspec.Struct):
    grammars: list[dict[str, msgspec.Raw]]


_LITERALS = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/')
_MOST_WORDS = 300
_DEEPEST = 120
"""Levels of a schema that the library always reads."""
_NAMES = {
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "choice": "the choices",
    "calls": "a schema of the tools, or the form of the answer beside them,",
}


def in_library_form(grammar: Grammar, tokenizer: llguidance.LLTokenizer) -> str:
    """What `llguidance.LLMatcher` takes. Raises ValueError with a reason; most of what is wrong shows only there."""
    if grammar.kind != "calls" and grammar.thought is None:
        return _text(grammar)
    forms = _forms(grammar, tokenizer)
    if grammar.thought is not None:
        thought = {"lark_grammar": thought_in_lark(grammar.thought, tokenizer)}
        forms = [thought, {**forms[0], "name": "answer"}, *forms[1:]]
    return msgspec.json.encode({"grammars": forms}).decode()


def _forms(grammar: Grammar, tokenizer: llguidance.LLTokenizer) -> list[Form]:
    """The form of an answer, and the one that it names."""
    if grammar.kind != "calls":
        return [_form(grammar)]
    calls = msgspec.json.decode(grammar.text, type=Calls)
    exact = [msgspec.structs.replace(call, schema=kept_exactly(call.schema)) for call in calls.forms]
    calls = msgspec.structs.replace(calls, forms=exact)
    form: Form = {"lark_grammar": calls_in_lark(calls, tokenizer, WHITESPACE)}
    return [form, {**_form(calls.content), "name": "content"}] if calls.content else [form]


def _form(grammar: Grammar) -> Form:
    """Of an answer without calls."""
    text = _text(grammar)
    if text.startswith("{"):
        return dict(msgspec.json.decode(text, type=_Forms).grammars[0])
    return {"lark_grammar": text}


def _of_schema(text: str) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})


def _text(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema":
            form = _of_schema(grammar.text)
            schema = json.loads(grammar.text)
            exact = kept_exactly(schema)
            return form if exact == schema else _of_schema(json.dumps(exact))
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            texts = msgspec.json.decode(grammar.text, type=list[str])
            if not texts:
                raise ValueError("there are none")
            return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(_quoted, texts)))
        case "grammar":
            return _plain(llguidance.grammar_from("grammar", grammar.text))
        case "calls":
            raise AssertionError(grammar)


def compile_for(tokenizer: llguidance.LLTokenizer, grammar: Grammar) -> llguidance.LLMatcher:
    """At its beginning. Raises ValueError with a reason; without Python's lock but for the translation."""
    matcher = llguidance.LLMatcher(tokenizer, in_library_form(grammar, tokenizer), log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def complaint(grammar: Grammar, reason: str) -> str:
    """The library's reason as a sentence, without its state and its stack; without lines of a grammar that the client
    did not write."""
    words = re.split(r"\n?<(?:state|backtrace|non-verbose/)>", reason, maxsplit=1)[0].strip()
    if grammar.kind != "grammar":
        words = re.sub(r"^at \d+\(\d+\): |\n +\d+ \|.*", "", words, flags=re.DOTALL)
    if "recursion limit exceeded" in words:
        words = f"it is nested too deep; objects and arrays may be {_DEEPEST} levels deep"
    shortened = words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]} ..."
    return f"{_NAMES.get(grammar.kind, 'the grammar')} cannot be used: {shortened}"


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()


def _plain(lark: str) -> str:
    """Raises ValueError where special tokens are named: an answer is text, and they are none."""
    if "<" in _LITERALS.sub("", lark):
        raise ValueError("special tokens cannot be part of an answer; write text in quotes")
    return lark
