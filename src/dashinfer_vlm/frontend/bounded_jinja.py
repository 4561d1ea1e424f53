"""Jinja for chat templates, which come with a model folder and may be wrong or hostile: no Python, and bounds on what
one rendering may compute and make.

Nothing can stop an interpreter from outside, so the template stops itself: every turn of a loop, every call, every
filter and every operation that makes something larger passes a `Meter`. A string or list that would be too large is
refused before it is made. Processor time of the thread counts, not the clock: a busy machine changes no answer.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["BoundedEnvironment", "ExhaustedError", "bounded"]

MAX_CHARS = 64 << 20
"""Characters of one text, entries of one list; more than any context holds."""
MAX_CHARS_MADE = 512 << 20
"""Of all that one rendering makes on its way."""
MAX_WIDTH = 100_000
"""Of what is padded, repeated or indented by a number, as Jinja's own bound of `range`."""
_MAX_BITS = 4096
_TICKS_PER_LOOK = 16
_WIDE, _WIDTH_IN_ARGS = re.compile(r"\d{6,}"), re.compile(r"%[^a-zA-Z]*\*|:[^}]*\{")
_TEXT_MAKERS = frozenset({"string", "tojson", "join", "pprint", "e", "escape", "forceescape", "xmlattr", "format"})
"""Filters whose text may be far longer than the list or the mapping that they are given."""


class ExhaustedError(jinja2.TemplateError):
    """A template computes for too long, or makes too much."""


class Meter:
    """What one rendering has used."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end_s = time.thread_time() + seconds
        self._num_ticks = 0
        self._num_chars = 0

    def tick(self) -> None:
        """Raise ExhaustedError when the time is over."""
        self._num_ticks += 1
        if self._num_ticks % _TICKS_PER_LOOK == 0 and time.thread_time() > self._end_s:
            raise ExhaustedError(f"it computes for more than {self._seconds:.1f} s")

    def take(self, size: int) -> None:
        """Raise ExhaustedError unless something of `size` may be made."""
        self._num_chars += size
        if size > MAX_CHARS or self._num_chars > MAX_CHARS_MADE:
            raise ExhaustedError(
                f"it makes texts of more than {MAX_CHARS if size > MAX_CHARS else MAX_CHARS_MADE} characters"
            )


_meter: ContextVar[Meter] = ContextVar("meter")


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Let templates that are rendered in this block compute for so long."""
    token = _meter.set(Meter(seconds))
    try:
        yield
    finally:
        _meter.reset(token)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of a chat template; what is rendered outside of `bounded` raises LookupError."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols], finalize=_weighed
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _metered(name, each) for name, each in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """The text of a template, a macro or a block."""
        meter, kept = _meter.get(), []
        for piece in pieces:
            meter.take(len(piece))
            kept.append(piece)
        return "".join(kept)

    @staticmethod
    def tick() -> None:
        _meter.get().tick()

    @staticmethod
    def join_texts(values: list[Any]) -> str:
        """`a ~ b`."""
        texts = [str(_weighed(value)) for value in values]
        _meter.get().take(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _meter.get().tick()
        _GROWTH[operator](left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - names of templates' own
        _meter.get().tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_text_call(__obj.__name__, owner, args)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's own `format` of a text, with a bound on widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_text_call("format", value.__self__, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return checked

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(_own("tick"), lineno=loop.lineno))
        return _Joins().visit(tree)  # type: ignore[no-any-return]


class _Joins(jinja2.visitor.NodeTransformer):
    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - the library's naming
        self.generic_visit(node)
        return _own("join_texts", nodes.List(node.nodes))


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _own(method: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)


def _weighed(value: Any) -> Any:
    """`value`, unless its text were too long: a list may hold another one many times."""
    if isinstance(value, list | tuple | dict):
        meter, size, left = _meter.get(), 0, [value]
        while left:
            meter.tick()
            each = left.pop()
            inner = [*each, *each.values()] if isinstance(each, dict) else each
            size += len(inner)
            left += [e for e in inner if isinstance(e, list | tuple | dict)]
            size += sum(len(e) for e in inner if isinstance(e, str))
            if size > MAX_CHARS:
                break
        meter.take(size)
    return value


def _metered(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(filter)  # also Jinja's mark of filters that are given the environment
    def call(*args: Any, **options: Any) -> Any:
        meter = _meter.get()
        meter.tick()
        own = args[1:] if hasattr(filter, "jinja_pass_arg") else args
        if name in _TEXT_MAKERS:
            own = (_weighed(list(own[0]) if isinstance(own[0], Iterator) else own[0]), *own[1:])
            args = (*args[: len(args) - len(own)], *own)
        _check_text_call(name, own[0], (*own[1:], *options.values()))
        made = filter(*args, **options)
        if isinstance(made, str | list | tuple):
            meter.take(len(made))
        return made

    return call


def _check_text_call(name: str, text: Any, args: tuple[Any, ...]) -> None:
    """A method of a text, or the filter of that name."""
    if name not in ("format", "format_map") and any(isinstance(arg, int) and arg > MAX_WIDTH for arg in args):
        raise ExhaustedError(f"{name} is asked for more than {MAX_WIDTH}")
    meter = _meter.get()
    match name, text, args:
        case "replace", str(), (str(old), str(new), *_):
            meter.take(len(text) + text.count(old) * len(new))
        case "join", str(), (each, *_) if isinstance(each, list | tuple):
            meter.take(len(text) * len(each))
        case "join", _, (str(between), *_) if isinstance(text, list | tuple):
            meter.take(len(between) * len(text))
        case "indent" | "wordwrap", str(), _:
            widths = [len(a) if isinstance(a, str) else int(a) for a in args if isinstance(a, int | str)]
            meter.take(
                (text.count("\n") + 1) * max([4, *widths]) if name == "indent" else len(text) * max([1, *widths])
            )
        case "format" | "format_map", str(), _:
            _check_format(text, args)


def _check_times(left: Any, right: Any) -> None:
    for sized, count in ((left, right), (right, left)):
        if isinstance(sized, str | list | tuple) and isinstance(count, int):
            _meter.get().take(len(sized) * max(count, 0))
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))


def _check_bits(num_bits: int) -> None:
    if num_bits > _MAX_BITS:
        raise ExhaustedError(f"it computes numbers of more than {_MAX_BITS} bits")


def _check_format(left: Any, right: Any) -> None:
    values = right if isinstance(right, tuple) else (right,)
    wide = (
        isinstance(left, str) and _WIDTH_IN_ARGS.search(left) and any(type(v) is int and v > MAX_WIDTH for v in values)
    )
    if wide or (isinstance(left, str) and _WIDE.search(left)):
        raise ExhaustedError(f"it formats to a width of more than {MAX_WIDTH}")
    _weighed(right)


def _check_plus(left: Any, right: Any) -> None:
    if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _meter.get().take(len(left) + len(right))


_GROWTH: dict[str, Callable[[Any, Any], None]] = {
    "*": _check_times,
    "**": _check_power,
    "%": _check_format,
    "+": _check_plus,
}


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
