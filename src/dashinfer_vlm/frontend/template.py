"""The model's own chat template, rendered so that a conversation cannot forge a special token.

A rendered template is text in which the template's markers and the user's words look alike. So before rendering, every
special token's text inside a user's string is broken by a sentinel that nobody can guess; after rendering, the special
tokens that are found are the template's own, and the sentinels are dropped from the plain text between them. Text that
forges nothing is encoded exactly as `transformers.apply_chat_template(tokenize=True)` encodes it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dashinfer_vlm.errors import CheckpointError, ConfigError, InvalidRequestError, UnsupportedError
from dashinfer_vlm.frontend.messages import Message
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.tokenizer_file import read_json

_WINDOW_CHARS = 1 << 14
"""Characters that a pattern is looked for in at once: Python's lock is held until such a search is over."""
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """Messages to prompt ids."""

    def __init__(self, source: str, tokenizer: Tokenizer, variables: dict[str, str] | None = None) -> None:
        """`variables` are the names of special tokens that the template may use. Raises CheckpointError."""
        self.source = source
        self._tokenizer = tokenizer
        self._variables = variables or {}
        self._guard = SpecialTokenGuard(tuple(tokenizer.added))
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the chat template does not parse, line {error.lineno}: {error.message}") from error

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer, override: str | None = None) -> ChatTemplate:
        """The template in the file `override`, else the folder's; raises ConfigError or CheckpointError."""
        source = _read_override(override) if override else _find_template(folder)
        return cls(source, tokenizer, _named_tokens(folder))

    def encode(self, messages: Sequence[Message], most: int | None = None) -> list[int]:
        """Prompt ids up to where the assistant speaks next, one placeholder per item.

        Raises InvalidRequestError when the template refuses the messages, ContextLengthError for more than `most` ids.
        """
        self._check_tools(messages)
        sentinel = f"\ue000{secrets.token_hex(8)}\ue001"
        turns = [self._guard.break_tokens(message.for_template(), sentinel) for message in messages]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True, **self._variables)
        except jinja2.TemplateError as error:
            reason = str(error.message).replace(sentinel, "")
            raise InvalidRequestError(
                f"the chat template refuses these messages: {reason}", param="messages"
            ) from error
        return self._encode(text, sentinel, most)

    def _encode(self, text: str, sentinel: str, most: int | None) -> list[int]:
        ids: list[int] = []
        for plain, special in self._guard.split(text):
            if plain := plain.replace(sentinel, ""):
                ids += self._tokenizer.encode_text(plain, most=most)
            if special:
                ids.append(self._tokenizer.added[special])
        return ids

    def _check_tools(self, messages: Sequence[Message]) -> None:
        uses_tools = any(m.tool_calls or m.role == "tool" for m in messages)
        if uses_tools and "tool_calls" not in self.source:
            raise UnsupportedError("the model's chat template knows no tool calls", param="messages")


class SpecialTokenGuard:
    """Finds special tokens in text, and breaks those that a user wrote."""

    def __init__(self, tokens: tuple[str, ...]) -> None:
        short = [token for token in tokens if len(token) < 2]
        if short:
            raise CheckpointError(f"the added tokens {short} have one character and cannot be told from text")
        longest_first = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
        self._any = re.compile(f"({longest_first})") if tokens else None
        self._starts = re.compile(f"(?=(?:{longest_first}))(.)", re.DOTALL) if tokens else None
        self._prefixes = {token[:n] for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def break_tokens(self, value: Any, sentinel: str) -> Any:
        """A copy of the JSON value with no special token in any of its strings, nor one that begins at their end."""
        if isinstance(value, str):
            return self._break_text(value, sentinel)
        if isinstance(value, list):
            return [self.break_tokens(item, sentinel) for item in value]
        if isinstance(value, dict):
            return {self.break_tokens(k, sentinel): self.break_tokens(v, sentinel) for k, v in value.items()}
        return value

    def split(self, text: str) -> list[tuple[str, str]]:
        """Pairs of plain text and the special token after it; the last one's is empty."""
        pieces: list[tuple[str, str]] = []
        begin = 0
        for match in self._matches(self._any, text) if self._any else ():
            pieces.append((text[begin : match.start()], match[0]))
            begin = match.end()
        return [*pieces, (text[begin:], "")]

    def _break_text(self, text: str, sentinel: str) -> str:
        if self._starts is None:
            return text
        cuts = [0, *(match.end() for match in self._matches(self._starts, text)), len(text)]
        text = sentinel.join(text[a:b] for a, b in pairwise(cuts))
        # a template may trim the string before it joins it to the next one, so the blanks at its end do not count
        end = len(text.rstrip())
        lengths = range(1, min(self._longest, end + 1))
        if any(text[end - n : end] in self._prefixes for n in lengths):
            return text[:end] + sentinel + text[end:]
        return text

    def _matches(self, pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
        """Like `finditer`, in windows that other threads run between."""
        at = 0
        while at < len(text):
            end = at + _WINDOW_CHARS
            for match in pattern.finditer(text, at, end + self._longest):
                if match.start() >= end:
                    break
                yield match
                at = match.end()
            at = max(at, end)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no prompt wants."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _read_override(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path} cannot be read: {error}") from error


def _find_template(folder: Path) -> str:
    """`chat_template.jinja`, `chat_template.json`, `tokenizer_config.json`: the order in which publishers moved it."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(template, list):  # several, by name
            template = next((row["template"] for row in template if row["name"] == "default"), None)
        if isinstance(template, str):
            return template
    raise CheckpointError(f"{folder} has no chat template; name a file with --chat-template")


def _named_tokens(folder: Path) -> dict[str, str]:
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    values = {name: config.get(name) for name in _NAMED_TOKENS}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
