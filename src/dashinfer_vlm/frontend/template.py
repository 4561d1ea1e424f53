"""The model's own chat template, rendered so that a conversation cannot forge a special token.

A rendered template is text in which the template's markers and the user's words look alike. So before rendering, every
special token's text inside a user's string is broken by a sentinel that nobody can guess; after rendering, the special
tokens that are found are the template's own, and the sentinels are dropped from the plain text between them. Tokens
that only mark text (`guard.text_marks`) may be the user's. Text that forges nothing is encoded exactly as
`transformers.apply_chat_template(tokenize=True)` encodes it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dashinfer_vlm.errors import CheckpointError, ConfigError, InvalidRequestError, UnsupportedError
from dashinfer_vlm.frontend.guard import SpecialTokenGuard
from dashinfer_vlm.frontend.messages import Dialogue, Message
from dashinfer_vlm.frontend.params import Next
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.tokenizer_file import read_json

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """Messages to prompt ids."""

    def __init__(self, source: str, tokenizer: Tokenizer, variables: dict[str, str] | None = None) -> None:
        """`variables` are the names of special tokens that the template may use. Raises CheckpointError."""
        self.source = source
        self._tokenizer = tokenizer
        self._variables = variables or {}
        self._guard = SpecialTokenGuard(tokenizer.added, tokenizer.marks)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the chat template does not parse, line {error.lineno}: {error.message}") from error

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer, override: str | None = None) -> ChatTemplate:
        """The template in the file `override`, else the folder's; raises ConfigError or CheckpointError."""
        source = _read_override(override) if override else _find_template(folder)
        return cls(source, tokenizer, _named_tokens(folder))

    def encode(self, dialogue: Dialogue, most: int | None = None, then: Next = "answer") -> list[int]:
        """Prompt ids up to where the model goes on, one placeholder per item; `then` says with what.

        Raises InvalidRequestError when the template refuses the messages, ContextLengthError for more than `most` ids.
        """
        messages = dialogue.messages
        self._check_tools(messages)
        sentinel, end = _unguessable(), _unguessable()
        turns = [self._guard.break_tokens(message.for_template(), sentinel) for message in messages]
        if then == "continuation":
            _mark_end(messages[-1], turns[-1], end)
        try:
            text = self._template.render(messages=turns, add_generation_prompt=then == "answer", **self._variables)
        except jinja2.TemplateError as error:
            reason = str(error.message).replace(sentinel, "")
            raise InvalidRequestError(
                f"the chat template refuses these messages: {reason}", param="messages"
            ) from error
        return self._encode(_cut(text, end) if then == "continuation" else text, sentinel, most)

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


def _unguessable() -> str:
    """No user can write it, and no template looks for its characters."""
    return f"\ue000{secrets.token_hex(8)}\ue001"


def _mark_end(message: Message, turn: dict[str, Any], end: str) -> None:
    """Write `end` and a blank behind the text of `turn`, which is `message` as the template sees it."""
    content = turn["content"]
    if message.tool_calls or (isinstance(content, list) and not (content and content[-1]["type"] == "text")):
        raise InvalidRequestError("continue_final_message needs a last message that ends in text", param="messages")
    if isinstance(content, list):
        content[-1]["text"] += f"{end} "
    else:
        turn["content"] = f"{content}{end} "


def _cut(text: str, end: str) -> str:
    """What stands before `end`; a template that has trimmed the blank behind it trims those before it too."""
    before, found, after = text.rpartition(end)
    if not found:
        raise InvalidRequestError("the chat template leaves the last message's text out", param="messages")
    return before if after.startswith(" ") else before.rstrip()


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
