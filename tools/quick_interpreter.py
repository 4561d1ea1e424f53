"""Triton's interpreter without what it does in vain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

__all__ = ["leave_out_what_is_in_vain"]


def leave_out_what_is_in_vain() -> None:
    """Takes more than three quarters of its time, and changes no number."""
    _look_through_the_language_once()
    _compute_once()
    _describe_when_asked()
    _check_shapes_once()
    _broadcast_where_needed()


def _look_through_the_language_once() -> None:
    """It is patched for as long as a kernel runs, and would be looked through again for every function that is called
    from there."""
    patch = interpreter._patch_lang

    def patch_where_needed(fn: FunctionType) -> Any:
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(core.is_builtin(module.load) for module in (tl, *modules)):
            return patch(fn)
        return interpreter._LangPatchScope()

    def patch_attribute(owner: Any, name: str, member: Callable[..., Any], builder: Any, scope: Any) -> None:
        told = {"_semantic": interpreter.interpreter_semantic}
        scope.set_attr(owner, name, lambda *args, **options: member(*args, **(options | told)))

    interpreter._patch_lang = patch_where_needed
    interpreter._patch_attr = patch_attribute


def _compute_once() -> None:
    """Integers are added and multiplied a second time in 64 bits, for a check that is left out without `debug`, as the
    compiler leaves it out. Numpy's name of a type is looked for in a dictionary that is made for it, and what is no
    constant is compared with every kind of them."""
    builder, unwrap = interpreter.interpreter_builder, core._unwrap_if_constexpr
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    of_pointer, of_number = interpreter._get_np_dtype(tl.pointer_type(tl.int8)), cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda kind: of_pointer if kind.scalar.is_ptr() else of_number(kind.scalar)
    core._unwrap_if_constexpr = lambda x: x if type(x) in (core.tensor, int, core.dtype) else unwrap(x)


def _describe_when_asked() -> None:
    """Shapes in the language's own numbers, types of tuples and names of types are made for every tensor, and read of
    few."""

    def begin_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar

    def begin_tuple(self: Any, args: Sequence[Any], type: Any = None) -> None:
        self.values = list(args)
        if type is not None:
            self.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)

    core.tensor.__init__, core.tuple.__init__ = begin_tensor, begin_tuple
    _when_asked(core.tensor, "shape", lambda x: core.tuple([core.constexpr(n) for n in getattr(x.type, "shape", ())]))
    _when_asked(core.tensor, "numel", lambda x: core.constexpr(getattr(x.type, "numel", 1)))
    _when_asked(core.tuple, "type", lambda x: core._type_for_tuple_values(x.values))


def _when_asked(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """An attribute that is made when it is first read, where nobody has set it."""
    attribute = cached_property(make)
    attribute.__set_name__(owner, name)
    setattr(owner, name, attribute)


def _check_shapes_once() -> None:
    """And not for every block that has one."""
    begin = core.block_type.__init__

    @cache
    def checked(*shape: int) -> Any:
        block = object.__new__(core.block_type)
        begin(block, tl.int8, list(shape))
        return block

    def begin_block(self: Any, element_ty: Any, shape: Sequence[Any]) -> None:
        block = checked(*(n.value if isinstance(n, core.constexpr) else n for n in shape))
        self.element_ty, self.shape, self.numel = element_ty, block.shape, block.numel

    core.block_type.__init__ = begin_block
    _when_asked(core.block_type, "name", lambda x: f"<{x.shape}, {x.element_ty}>")


def _broadcast_where_needed() -> None:
    """Two of one shape, or without any, stay as they are."""
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_others(self: Any, left: Any, right: Any) -> Any:
        if getattr(left.type, "shape", None) is getattr(right.type, "shape", None):
            return left, right
        return broadcast(self, left, right)

    TritonSemantic.broadcast_impl_value = broadcast_others
