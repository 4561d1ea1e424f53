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
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dashinfer_vlm.errors import CheckpointError, ConfigError, InvalidRequestError, UnsupportedError
from dashinfer_vlm.frontend.answer_parser import THINK, THINK_END, AnswerForm
from dashinfer_vlm.frontend.guard import SpecialTokenGuard
from dashinfer_vlm.frontend.hermes import Turn, in_plain_turns
from dashinfer_vlm.frontend.messages import Dialogue, Message
from dashinfer_vlm.frontend.params import Next
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.tokenizer_file import read_json

_OURS = ("messages", "tools", "add_generation_prompt")
_END_TOKENS = 8
"""Of a prompt, in which an opened or closed reasoning shows."""
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
            environment = _environment()
            self._template = environment.from_string(source)
            self._known = meta.find_undeclared_variables(environment.parse(source))
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
        sentinel, end = _unguessable(), _unguessable()
        turns = [self._guard.break_tokens(message.for_template(), sentinel) for message in messages]
        if then == "continuation":
            _mark_end(messages[-1], turns[-1], end)
        told = self._guard.break_tokens(self._variables_of(dialogue), sentinel)
        tools = [self._guard.break_tokens(tool.for_template(), sentinel) for tool in dialogue.tools]
        turns, tools = self._with_tools(turns, tools)
        fixed = {
            **self._variables,
            "messages": turns,
            "tools": tools or None,
            "add_generation_prompt": then == "answer",
        }
        try:
            text = self._template.render(told | fixed)
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

    def answer_form(self, dialogue: Dialogue, ids: Sequence[int]) -> AnswerForm:
        """How answers to `dialogue` are to be read; `ids` are its prompt's, up to where the model goes on."""
        end = self._tokenizer.decode(ids[-_END_TOKENS:], skip_special=False).rstrip()
        thinks = THINK in self.source and not end.endswith(THINK_END)
        return AnswerForm(
            may_think=thinks,
            begins_in_thought=thinks and end.endswith(THINK),
            names=frozenset(dialogue.callable_names),
            parallel=dialogue.choice.parallel,
            sure=dialogue.is_sure,
        )

    def _with_tools(self, turns: list[Turn], tools: list[Turn]) -> tuple[list[Turn], list[Turn]]:
        """Turns and tools as the template understands them."""
        uses_tools = any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns)
        knows_tools = "tools" in self._known if tools else not uses_tools or "tool_calls" in self.source
        return (turns, tools) if knows_tools else (in_plain_turns(turns, tools), [])

    def _variables_of(self, dialogue: Dialogue) -> dict[str, Any]:
        """What a caller tells the template; raises UnsupportedError for what it does not know."""
        for name, value in dialogue.variables.items():
            if name in _OURS or name in self._variables:
                raise InvalidRequestError(
                    f"chat_template_kwargs: {name} is the server's to set", param=f"chat_template_kwargs.{name}"
                )
            if name not in self._known and (name, value) != ("enable_thinking", False):
                raise UnsupportedError(
                    f"chat_template_kwargs: the model's chat template knows no {name!r}; leave it out",
                    param=f"chat_template_kwargs.{name}",
                )
        return dict(dialogue.variables) | self._effort(dialogue.effort)

    def _effort(self, effort: str | None) -> dict[str, Any]:
        if effort is None:
            return {}
        if "reasoning_effort" in self._known:
            return {"reasoning_effort": effort}
        if effort == "none" and ("enable_thinking" in self._known or THINK not in self.source):
            return {"enable_thinking": False}
        raise UnsupportedError(
            f"reasoning_effort: the model's chat template knows no {effort!r}; leave it out", param="reasoning_effort"
        )


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
