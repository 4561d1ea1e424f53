"""The interpreter that the other tests run in: what it no longer does in vain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

from dashinfer_vlm.kernels.cuda import rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted here")


def test_functions_of_a_kernel_leave_the_language_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_through: list[object] = []
    patch = interpreter._patch_builtin

    def counted(package: object, *rest: object) -> None:
        looked_through.append(package)
        patch(package, *rest)

    x, gains = torch.randn(3, 64), torch.randn(64)
    first = rows.rms_norm(x, gains, 1e-6)  # what functions of triton's own find is left patched for good
    monkeypatch.setattr(interpreter, "_patch_builtin", counted)
    assert torch.equal(rows.rms_norm(x, gains, 1e-6), first)
    assert looked_through
    assert len(looked_through) == len(set(map(id, looked_through)))  # once in a launch, whose functions are several


def test_integers_are_not_added_twice() -> None:
    assert not interpreter.interpreter_builder.options.sanitize_overflow


def test_tensors_tell_what_they_would_have_been_told() -> None:
    x = core.tensor(None, core.block_type(tl.float32, [core.constexpr(4), 2]))
    assert (x.type.name, x.type.numel, x.dtype) == ("<['4', '2'], fp32>", 8, tl.float32)
    assert ([n.value for n in x.shape], x.numel.value) == ([4, 2], 8)
    assert x.shape.type.types == [core.constexpr_type(4), core.constexpr_type(2)]
    one = core.tensor(None, tl.int64)
    assert (list(one.shape), one.numel.value) == ([], 1)


def test_numpy_knows_types_of_numbers_and_pointers() -> None:
    for kind in (tl.pointer_type(tl.int8), core.block_type(tl.pointer_type(tl.float32), [2])):
        assert interpreter._get_np_dtype(kind) == np.uint64
    assert interpreter._get_np_dtype(core.block_type(tl.bfloat16, [2])) == interpreter._get_np_dtype(tl.uint16)


def test_blocks_of_another_shape_are_still_refused_and_broadcast() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="must be a power of 2"):
            core.block_type(tl.int8, [3])
    row, column, other = (block(*shape) for shape in ((1, 4), (2, 1), (1, 2)))
    semantic = interpreter.interpreter_semantic
    assert semantic.broadcast_impl_value(row, row) == (row, row)
    assert [x.handle.data.shape for x in semantic.broadcast_impl_value(row, column)] == [(2, 4), (2, 4)]
    with pytest.raises(ValueError, match="incompatible dimensions"):
        semantic.broadcast_impl_value(row, other)


def block(*shape: int) -> core.tensor:
    handle = interpreter.TensorHandle(np.ones(shape, np.float32), tl.float32)
    return core.tensor(handle, core.block_type(tl.float32, list(shape)))
