"""Every kind of linear layer gives the same numbers, and the backend picks the right one."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.kernels import cpu_ops, cuda
from dashinfer_vlm.layers import backend as backends
from dashinfer_vlm.layers import fp8, onednn
from dashinfer_vlm.layers.activation import EPILOGUES, Epilogue
from dashinfer_vlm.layers.backend import TensorLinear, choose_backend
from dashinfer_vlm.layers.card_backend import float_linears
from dashinfer_vlm.layers.linear import ExpandingLinear, Linear, Matrix, NativeLinear, OneDnnLinear, TorchLinear

CPU = torch.device("cpu")


def matrix(tensor: torch.Tensor) -> Matrix:
    return Matrix("weight", len(tensor), tensor.shape[1], lambda: tensor)


def native(weight: torch.Tensor, bias: torch.Tensor | None, epilogue: Epilogue) -> Linear:
    return NativeLinear(cpu_ops.pack_linear(weight, gate_up=epilogue == "silu_mul"), bias, epilogue)


KINDS: dict[str, tuple[TensorLinear, torch.dtype]] = {
    "torch": (TorchLinear, torch.float32),
    "expanding bfloat16": (ExpandingLinear, torch.bfloat16),
    "expanding float16": (ExpandingLinear, torch.float16),
    "native": (native, torch.float32),
    "native bfloat16": (native, torch.bfloat16),
    "oneDNN": (OneDnnLinear, torch.float32),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("shape", [(1, 8, 24), (5, 2050, 33), (0, 8, 24)])
def test_every_linear_layer_gives_the_numbers_of_the_definition(
    kind: str, epilogue: Epilogue, shape: tuple[int, int, int]
) -> None:
    linear_class, dtype = KINDS[kind]
    if linear_class is native and not cpu_ops.available():
        pytest.skip(str(cpu_ops.why_unavailable()))
    torch.manual_seed(0)
    rows, outputs, inputs = shape
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs).to(dtype), torch.randn(outputs)
    if dtype == torch.bfloat16 and linear_class is native and cpu_ops.multiplies_bfloat16():
        x = x.bfloat16().float()  # it rounds by itself
    for b in (bias, None):
        layer = linear_class(weight, b, epilogue)
        expected = EPILOGUES[epilogue](F.linear(x, weight.float(), b))
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
        residual = torch.randn_like(expected)
        before = residual.clone()
        torch.testing.assert_close(layer(x, residual=residual), expected + residual, atol=1e-4, rtol=1e-4)
        assert torch.equal(residual, before)
        wide = torch.full((rows, expected.shape[1] + 3), 7.0)
        given = wide[:, : expected.shape[1]]
        for added in (None, residual):
            assert layer(x, residual=added, out=given).data_ptr() == given.data_ptr()
            assert torch.equal(given, layer(x, residual=added))
        assert (wide[:, expected.shape[1] :] == 7.0).all()
        given.copy_(residual)
        layer(x, residual=given, out=given)
        torch.testing.assert_close(given, expected + residual, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_two_models_that_compute_at_once_do_not_disturb_each_other(kind: str) -> None:
    """As two engines do, each in its thread."""
    linear_class, dtype = KINDS[kind]
    if linear_class is native and not cpu_ops.available():
        pytest.skip(str(cpu_ops.why_unavailable()))
    torch.manual_seed(0)
    x, weights = torch.randn(2, 256), torch.randn(2, 1024, 256).to(dtype)
    layers = [linear_class(weight, None, "none") for weight in weights]
    alone = [layer(x) for layer in layers]

    def compute(number: int) -> bool:
        return all(torch.equal(layers[number](x), alone[number]) for _ in range(50))

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(compute, range(2)))


def without_native_kernels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cpu_ops, "available", lambda: False)
    patch.setattr(cpu_ops, "why_unavailable", lambda: "no compiler")
    backends._tell_once.cache_clear()


def test_a_cpu_without_kernels_computes_in_float32_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_native_kernels(monkeypatch)
    monkeypatch.setattr(onednn, "available", lambda: False)
    with caplog.at_level(logging.WARNING):
        backend = choose_backend(CPU, torch.bfloat16)
    assert (backend.weight_dtype, backend.activation_dtype) == (torch.bfloat16, torch.float32)
    assert isinstance(backend.linear(matrix(torch.randn(4, 4))), ExpandingLinear)
    assert "no compiler" in caplog.text


def test_a_cpu_without_kernels_says_why_also_where_onednn_multiplies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_native_kernels(monkeypatch)
    monkeypatch.setattr(onednn, "available", lambda: True)
    with caplog.at_level(logging.WARNING):
        for _ in ("text", "vision"):
            assert choose_backend(CPU, torch.bfloat16).name == "oneDNN"
    assert caplog.text.count("no compiler") == 1


@pytest.mark.parametrize(
    ("native", "name", "dtype"), [(False, "oneDNN", torch.bfloat16), (True, "native", torch.float32)]
)
def test_a_cpu_that_multiplies_bfloat16_gets_packed_weights_of_the_kernels_that_do_so_too(
    monkeypatch: pytest.MonkeyPatch, native: bool, name: str, dtype: torch.dtype
) -> None:
    if native and not cpu_ops.available():
        pytest.skip(str(cpu_ops.why_unavailable()))
    monkeypatch.setattr(onednn, "available", lambda: True)
    monkeypatch.setattr(backends, "_native_multiplies_bfloat16", lambda: native)
    backend = choose_backend(CPU, torch.bfloat16)
    assert (backend.name.split()[0], backend.activation_dtype) == (name, dtype)


def test_weights_in_float32_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native_kernels(monkeypatch)
    backend = choose_backend(CPU, torch.float32)
    assert isinstance(backend.linear(matrix(torch.randn(4, 4))), TorchLinear)
    assert backend.activation_dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_layer_keeps_nothing_of_the_tensor_it_was_made_from(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and onednn.available():
        pytest.skip("oneDNN rounds activations to bfloat16")
    source, bias = torch.randn(6, 8), torch.randn(6)
    x = torch.randn(3, 8).bfloat16().float()  # as some levels round it
    expected = F.linear(x, source.to(dtype).float(), bias)
    layer = choose_backend(CPU, dtype).linear(matrix(source), bias)
    source.zero_()
    bias.zero_()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_a_card_computes_in_the_weights_own_type() -> None:
    backend = choose_backend(torch.device("cuda"), torch.bfloat16)
    x = torch.randn(3, 8, device="cuda", dtype=torch.bfloat16)
    assert backend.linear(matrix(torch.randn(6, 8)))(x).dtype == torch.bfloat16


def test_a_torch_that_has_renamed_a_private_function_costs_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cpu", object())
    onednn.available.cache_clear()
    try:
        assert not onednn.available()
    finally:
        onednn.available.cache_clear()


def test_8_bit_floats_need_a_card_with_its_kernels_and_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda")
    with pytest.raises(ConfigError, match="fp8 computes on NVIDIA cards; on processors --quant-type a8w8"):
        choose_backend(CPU, torch.bfloat16, "fp8")
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "no triton")
    with pytest.raises(ConfigError, match="fp8 needs the kernels for cards: no triton"):
        choose_backend(card, torch.bfloat16, "fp8")
    monkeypatch.setattr(cuda, "why_unavailable", lambda: None)
    with pytest.raises(ConfigError, match="a8w8 computes on processors; on cards take fp8, a16w8 or a16w4"):
        choose_backend(card, torch.bfloat16, "a8w8")
    with pytest.raises(ConfigError, match="activations in bfloat16, not float16"):
        choose_backend(card, torch.float16, "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"compute capability 8\.9"):
        choose_backend(card, torch.bfloat16, "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(ConfigError, match=r"on an Ada card needs torch 2\.12 or later, not 2\.11\.0\+cu130"):
        choose_backend(card, torch.bfloat16, "fp8")


@pytest.mark.parametrize("shape", [(24, 32), (32, 24)])
def test_a_matrix_that_torch_does_not_multiply_in_8_bit_floats_is_named(shape: tuple[int, int]) -> None:
    make = float_linears(CPU, torch.float32, fp8.REFERENCE)
    found = f"weight is {shape[0]} x {shape[1]}; products of 8-bit floats need multiples of 16"
    with pytest.raises(ConfigError, match=found):
        make(matrix(torch.randn(shape)), None, "none")
