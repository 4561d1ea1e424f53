"""The layers that stand on the card's kernels, and when they are chosen."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

triton = pytest.importorskip("triton")

from dashinfer_vlm.kernels import cuda
from dashinfer_vlm.layers.activation import EPILOGUES, Epilogue
from dashinfer_vlm.layers.backend import choose_backend
from dashinfer_vlm.layers.cuda import OPS, CudaHead, CudaLinear, CudaPatches
from dashinfer_vlm.layers.linear import Matrix, TorchLinear
from dashinfer_vlm.layers.ops import REFERENCE
from dashinfer_vlm.layers.patches import TorchPatches
from tests.kernels.cuda.numbers import DEVICE, error

CARD = torch.device("cuda")


@pytest.fixture(autouse=True)
def _ask_again() -> Iterator[None]:
    cuda.why_unavailable.cache_clear()
    yield
    cuda.why_unavailable.cache_clear()


def matrix(tensor: torch.Tensor) -> Matrix:
    return Matrix("weight", len(tensor), tensor.shape[1], lambda: tensor, is_kept=True)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_layer_gives_the_numbers_of_the_definition(epilogue: Epilogue, has_bias: bool) -> None:
    x, weight, bias = (torch.randn(*shape, device=DEVICE) for shape in ((5, 33), (258, 33), (258,)))
    layer = CudaLinear(weight, bias if has_bias else None, epilogue)
    want = EPILOGUES[epilogue](F.linear(x, weight, bias if has_bias else None))
    assert error(layer(x), want) < 1e-5
    residual = torch.randn_like(want)
    before = residual.clone()
    assert error(layer(x, residual=residual), want + residual) < 1e-5
    assert torch.equal(residual, before)
    wide = torch.full((5, want.shape[1] + 3), 7.0, device=DEVICE)
    given = wide[:, :-3]
    assert error(layer(x, out=given), want) < 1e-5
    assert layer(x, residual=residual, out=given).data_ptr() == given.data_ptr()
    assert error(given, want + residual) < 1e-5
    assert (wide[:, -3:] == 7).all()
    assert error(layer(x, residual=residual, out=residual), want + before) < 1e-5


def test_a_head_of_float32_weights() -> None:
    x, weight = torch.randn(3, 16, device=DEVICE), torch.randn(50, 16, device=DEVICE)
    assert error(CudaHead(weight, None, "none")(x), x @ weight.t()) < 1e-5


@pytest.mark.gpu  # torch has this product for cards alone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_of_16_bits_sums_into_float32(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 256, device=DEVICE).to(dtype), torch.randn(500, 256, device=DEVICE).to(dtype)
    logits = CudaHead(weight, None, "none")(x)
    assert logits.dtype == torch.float32
    assert error(logits, x.double() @ weight.double().t()) < 1e-5


@pytest.mark.parametrize(("num_rows", "depth", "size"), [(5, 150, 48), (129, 64, 130), (8200, 24, 8), (0, 64, 8)])
def test_patches_are_embedded_from_their_bytes(num_rows: int, depth: int, size: int) -> None:
    patches = torch.randint(0, 256, (num_rows, depth + 1), dtype=torch.uint8, device=DEVICE)[:, :-1]
    weight, bias = torch.randn(size, depth, device=DEVICE), torch.randn(size, device=DEVICE)
    want = TorchPatches(weight.double(), bias.double()).bias + patches.double() @ weight.double().t()
    assert error(CudaPatches(weight, bias)(patches), want) < 2e-5


def test_a_card_gets_the_kernels() -> None:
    backend = choose_backend(CARD, torch.bfloat16)
    assert backend.ops is OPS
    assert isinstance(backend.make_linear(matrix(torch.zeros(4, 4)), None, "none"), CudaLinear)
    assert isinstance(backend.make_patches(torch.zeros(4, 4), torch.zeros(4)), CudaPatches)
    assert isinstance(backend.head(matrix(torch.zeros(4, 4))), CudaHead)


def test_patches_of_a_float32_model_keep_all_bits() -> None:
    backend = choose_backend(CARD, torch.float32)
    assert isinstance(backend.make_patches(torch.zeros(4, 4), torch.zeros(4)), TorchPatches)


def test_the_switch_turns_the_kernels_off_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DASHINFER_KERNELS", "reference")
    with caplog.at_level(logging.WARNING):
        backend = choose_backend(CARD, torch.bfloat16)
    assert backend.ops is REFERENCE
    assert isinstance(backend.make_linear(matrix(torch.zeros(4, 4)), None, "none"), TorchLinear)
    assert "no kernels for the card: DASHINFER_KERNELS=reference" in caplog.text


def test_compiled_kernels_are_kept_for_the_next_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "to be restored")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    choose_backend(CARD, torch.bfloat16)
    assert triton.knobs.cache.dir == str(tmp_path / "dashinfer-vlm" / "triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    cuda.why_unavailable.cache_clear()
    choose_backend(CARD, torch.bfloat16)
    assert triton.knobs.cache.dir == "/elsewhere"


def test_a_card_whose_machine_cannot_build_the_starter_computes_with_torch_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Driver:
        @property
        def active(self) -> Any:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton.runtime, "driver", Driver())
    with caplog.at_level(logging.WARNING):
        assert choose_backend(CARD, torch.bfloat16).ops is REFERENCE
    assert "triton cannot build what starts them (Failed to find C compiler); it needs gcc" in caplog.text


@pytest.mark.parametrize("missing", ["triton", "triton.knobs"])
def test_a_card_without_triton_or_with_an_old_one_computes_with_torch_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with caplog.at_level(logging.WARNING):
        assert choose_backend(CARD, torch.float16).ops is REFERENCE
    assert "triton cannot be imported" in caplog.text
