"""A grammar as a client sends it, in the form that llguidance reads, and its complaints in words for the client."""

from __future__ import annotations

import re

import llguidance
import msgspec

from dashinfer_vlm.engine.grammars.calls import Calls, calls_in_lark, thought_in_lark
from dashinfer_vlm.request import Grammar

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between the tokens of JSON. Bounded: a model that likes blanks would otherwise write nothing else up to its limit."""
LIMITS = llguidance.LLParserLimits(max_lexer_states=100_000, verbose_errors=False)
"""llguidance's own, but for states: each takes a kilobyte or two, and every sequence has its own."""

_LITERALS = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/')
_MOST_WORDS = 300
_NAMES = {
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "choice": "the choices",
    "calls": "a schema of the tools",
}


def in_library_form(grammar: Grammar, tokenizer: llguidance.LLTokenizer) -> str:
    """What `llguidance.LLMatcher` takes. Raises ValueError with a reason; most of what is wrong shows only there."""
    answer = _answer(grammar, tokenizer)
    if grammar.thought is None:
        return answer
    thought = {"lark_grammar": thought_in_lark(grammar.thought, tokenizer)}
    forms = msgspec.json.decode(answer)["grammars"] if answer.startswith("{") else [{"lark_grammar": answer}]
    return msgspec.json.encode({"grammars": [thought, {**forms[0], "name": "answer"}]}).decode()


def _answer(grammar: Grammar, tokenizer: llguidance.LLTokenizer) -> str:
    match grammar.kind:
        case "json_schema":
            return llguidance.LLMatcher.grammar_from_json_schema(
                grammar.text, defaults={"whitespace_pattern": WHITESPACE}
            )
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
            return calls_in_lark(msgspec.json.decode(grammar.text, type=Calls), tokenizer, WHITESPACE)


def compile_for(tokenizer: llguidance.LLTokenizer, grammar: Grammar) -> llguidance.LLMatcher:
    """At its beginning. Raises ValueError with a reason; without Python's lock but for the translation."""
    matcher = llguidance.LLMatcher(tokenizer, in_library_form(grammar, tokenizer), log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def complaint(grammar: Grammar, reason: str) -> str:
    """The library's reason as a sentence, without its state and its stack."""
    words = re.split(r"\n?<(?:state|backtrace|non-verbose/)>", reason, maxsplit=1)[0].strip()
    shortened = words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]} ..."
    return f"{_NAMES.get(grammar.kind, 'the grammar')} cannot be used: {shortened}"


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()


def _plain(lark: str) -> str:
    """Raises ValueError where special tokens are named: an answer is text, and they are none."""
    if "<" in _LITERALS.sub("", lark):
        raise ValueError("special tokens cannot be part of an answer; write text in quotes")
    return lark
