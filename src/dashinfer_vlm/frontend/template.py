"""The model's own chat template, rendered so that a conversation cannot forge a special token.

A rendered template is text in which the template's markers and the user's words look alike. So before rendering, every
special token's text inside a user's string is broken by a sentinel that nobody can guess; after rendering, the special
tokens that are found are the template's own, and the sentinels are dropped from the plain text between them. Tokens
that only mark text (`guard.text_marks`) may be the user's. Text that forges nothing is encoded exactly as
`transformers.apply_chat_template(tokenize=True)` encodes it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from dashinfer_vlm.errors import CheckpointError, ConfigError, InvalidRequestError, UnsupportedError
from dashinfer_vlm.frontend.answer_parser import THINK, THINK_END, AnswerForm
from dashinfer_vlm.frontend.bounded_jinja import BoundedEnvironment, ExhaustedError, bounded
from dashinfer_vlm.frontend.guard import SpecialTokenGuard
from dashinfer_vlm.frontend.hermes import Turn, in_plain_turns
from dashinfer_vlm.frontend.messages import Dialogue, Message
from dashinfer_vlm.frontend.params import Next
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.frontend.xml_calls import PARAMETER
from dashinfer_vlm.tokenizer_file import read_json

_OURS = ("messages", "tools", "add_generation_prompt")
_END_TOKENS = 8
"""Of a prompt, in which an opened or closed reasoning shows."""
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_SECONDS, _SECONDS_PER_CHAR = 0.25, 5e-6
"""Processor time of a rendering: many times what published templates take, even on a slow machine."""
_CHARS_OF_A_DICT = 40
"""A turn or a part without text takes a template as long as so many characters."""
_MAX_REASON = 500


class ChatTemplate:
    """Messages to prompt ids."""

    def __init__(self, source: str, tokenizer: Tokenizer, variables: dict[str, str] | None = None) -> None:
        """`variables` are the names of special tokens that the template may use.

        Raises CheckpointError for a template that does not parse, or that cannot even render a greeting in its bounds.
        """
        self.source = source
        self._tokenizer = tokenizer
        self._variables = variables or {}
        self._guard = SpecialTokenGuard(tokenizer.added, tokenizer.marks)
        try:
            environment = BoundedEnvironment()
            self._template = environment.from_string(source)
            self._known = meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the chat template does not parse, line {error.lineno}: {error.message}") from error
        except RecursionError as error:
            raise CheckpointError("the chat template does not parse: it is nested too deeply") from error
        self._try()

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
            text = self._render(told | fixed)
        except Exception as error:  # noqa: BLE001 - the template is a program of somebody else's
            reason = _shortened(str(error).replace(sentinel, "") or type(error).__name__)
            raise InvalidRequestError(
                f"the chat template refuses these messages: {reason}", param=dialogue.param
            ) from None  # what Jinja makes of a recursion is a thousand lines long
        return self._encode(_cut(text, end) if then == "continuation" else text, sentinel, most)

    def _try(self) -> None:
        greeting = [{"role": "user", "content": "Hello"}]
        try:
            self._render({**self._variables, "messages": greeting, "tools": None, "add_generation_prompt": True})
        except (ExhaustedError, OverflowError, RecursionError) as error:  # the range of a loop overflows
            reason = _shortened(str(error))
            raise CheckpointError(f"the chat template cannot be used: with a message of one word, {reason}") from None
        except Exception:  # noqa: BLE001 - it may want other messages, and says so to whoever sends them
            return

    def _render(self, values: dict[str, Any]) -> str:
        with bounded(_SECONDS + _SECONDS_PER_CHAR * _num_chars(values)):
            return self._template.render(values)

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
            schemas={tool.name: tool.parameters for tool in dialogue.tools} if self._writes_xml else None,
            parallel=dialogue.choice.parallel,
            sure=dialogue.is_sure,
        )

    @property
    def _writes_xml(self) -> bool:
        """Whether the model's calls of tools are XML (`xml_calls`), as the template writes earlier ones."""
        return PARAMETER in self.source

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
        return dict(dialogue.variables) | self._effort(dialogue.effort) | self._thinking(dialogue.thinks)

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

    def _thinking(self, thinks: bool | None) -> dict[str, Any]:
        if thinks is None:
            return {}
        if "enable_thinking" in self._known:
            return {"enable_thinking": thinks}
        if thinks == (THINK in self.source):
            return {}
        what = "always thinks" if THINK in self.source else "does not think"
        raise UnsupportedError(f"thinking: a model with this chat template {what}; leave it out", param="thinking")


def _num_chars(value: Any) -> int:
    """Characters that a template may read, and as much for what holds them."""
    if isinstance(value, list):
        return sum(map(_num_chars, value))
    if isinstance(value, dict):
        return _CHARS_OF_A_DICT + sum(map(_num_chars, value.values()))
    return len(value) if isinstance(value, str) else 1


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}..."


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


def _read_override(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
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
