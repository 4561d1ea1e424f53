"""The interpreter that the other tests run in: what it no longer does in vain."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

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
