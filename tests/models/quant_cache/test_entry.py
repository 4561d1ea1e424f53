"""A file of packed weights gives back what was put in, and says so when it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.cpu_ops import PackedWeight
from dashinfer_vlm.models.quant_cache import Entry, UnusableError, write_entry

Weights = dict[str, PackedWeight]


@pytest.fixture
def path(weights: Weights, tmp_path: Path) -> Path:
    path = tmp_path / "entry.safetensors"
    write_entry(path, "mine", weights)
    return path


def read_all(path: Path, weights: Weights) -> Weights:
    entry = Entry.open(path, "mine")
    try:
        return {name: entry.read(name, weight.shape) for name, weight in weights.items()}
    finally:
        entry.close()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_what_is_read_multiplies_like_what_was_written(path: Path, weights: Weights, num_threads: int) -> None:
    before = cpu_ops.num_threads()
    cpu_ops.set_num_threads(num_threads)
    try:
        found = read_all(path, weights)
    finally:
        cpu_ops.set_num_threads(before)
    for name, weight in weights.items():
        x, epilogue = torch.randn(3, weight.depth), "silu_mul" if weight.gate_up else "none"
        assert found[name].shape == weight.shape
        assert bytes(found[name].panels) == bytes(weight.panels)
        expected = cpu_ops.linear(x, weight, epilogue=epilogue)  # type: ignore[arg-type]
        assert torch.equal(cpu_ops.linear(x, found[name], epilogue=epilogue), expected)  # type: ignore[arg-type]


def test_other_tools_can_look_at_the_file(path: Path, weights: Weights) -> None:
    tensors = load_file(path)
    assert {name: bytes(t.numpy().data) for name, t in tensors.items()} == {
        name: bytes(weight.panels) for name, weight in weights.items()
    }


def test_a_file_is_never_written_over(path: Path, weights: Weights) -> None:
    with pytest.raises(FileExistsError):
        write_entry(path, "mine", weights)


def test_every_changed_byte_is_found(path: Path, weights: Weights) -> None:
    whole = path.read_bytes()
    for place in range(0, len(whole), 211):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = read_all(path, weights)
        except UnusableError:
            continue
        # what does not matter may change: the order of keys, a space, the name of a type that nobody reads
        assert {n: bytes(w.panels) for n, w in found.items()} == {n: bytes(w.panels) for n, w in weights.items()}, place


def test_a_changed_weight_is_named(path: Path, weights: Weights) -> None:
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UnusableError, match="e is damaged"):
        read_all(path, weights)


@pytest.mark.parametrize("size", [0, 7, 8, 60, 900, -1000, -1])
def test_a_file_that_was_cut_off_is_found(path: Path, weights: Weights, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UnusableError):
        read_all(path, weights)


def test_bytes_too_many_are_found(path: Path, weights: Weights) -> None:
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(UnusableError, match="bytes of weights"):
        read_all(path, weights)


def test_a_file_that_shrinks_while_it_is_read_is_found(path: Path, weights: Weights) -> None:
    entry = Entry.open(path, "mine")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UnusableError, match="ends too early"):
        entry.read("e", weights["e"].shape)
    entry.close()


def test_weights_of_another_identity_are_refused(path: Path) -> None:
    with pytest.raises(UnusableError, match="other weights"):
        Entry.open(path, "yours")


def test_weights_of_another_shape_are_refused(path: Path, weights: Weights) -> None:
    entry = Entry.open(path, "mine")
    for name, shape in (("a", replace(weights["a"].shape, num_rows=71)), ("z", weights["a"].shape)):
        with pytest.raises(UnusableError, match=f"{name} is not in it as"):
            entry.read(name, shape)
    entry.close()


def test_two_swapped_weights_of_one_shape_are_found(tmp_path: Path) -> None:
    if not cpu_ops.available():
        pytest.skip(str(cpu_ops.why_unavailable()))
    weights = {name: cpu_ops.pack_linear_int8(torch.randn(16, 32)) for name in "ab"}
    path, size = tmp_path / "entry.safetensors", weights["a"].num_bytes
    write_entry(path, "mine", weights)
    whole = path.read_bytes()
    path.write_bytes(whole[: -2 * size] + whole[-size:] + whole[-2 * size : -size])
    with pytest.raises(UnusableError, match="is damaged"):
        read_all(path, weights)
