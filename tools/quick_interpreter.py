"""Triton's interpreter without what it does in vain."""

from __future__ import annotations

from dataclasses import replace
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

__all__ = ["leave_out_what_is_in_vain"]


def leave_out_what_is_in_vain() -> None:
    """Takes more than half of its time, and changes no number.

    The language is patched for as long as a kernel runs; the interpreter looks through all of it again for every
    function that is called from there. And integers are added and multiplied a second time in 64 bits, for a check that
    is left out without `debug`, as the compiler leaves it out."""
    patch = interpreter._patch_lang

    def patch_where_needed(fn: FunctionType) -> Any:
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(module.load) for module in (tl, *modules)):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_where_needed
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
