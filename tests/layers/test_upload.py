"""Weights on their way to a device, in pieces through two buffers."""

from __future__ import annotations

import pytest
import torch

from dashinfer_vlm.layers import backend, card_backend
from dashinfer_vlm.layers.upload import Upload

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(1, 3), (7, 33), (64,), (5, 2, 3, 4), (9, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_arrives_is_what_was_sent_in_pieces_of_any_size(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    upload = Upload(CPU, buffer_bytes=300)
    sent = [torch.randn(shape) for _ in range(5)]
    got = [upload(tensor, dtype) for tensor in sent]
    assert all(torch.equal(there, tensor.to(dtype)) for there, tensor in zip(got, sent, strict=True))


def test_columns_of_a_matrix_are_sent_without_a_copy_of_it() -> None:
    matrix = torch.randn(40, 12)
    assert torch.equal(Upload(CPU, buffer_bytes=100)(matrix[:, 4:8], torch.float32), matrix[:, 4:8])


def test_an_own_copy_does_not_follow_its_source() -> None:
    matrix = torch.randn(4, 4)
    there = Upload(CPU)(matrix, torch.float32)
    matrix.fill_(0)
    assert there.abs().sum() > 0


def test_weights_for_a_card_take_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.knobs", reason="no triton that can be used")
    sent = []
    monkeypatch.setattr(backend, "upload_to", lambda device: lambda tensor, dtype: sent.append((device, dtype)))
    card = card_backend.on_card(torch.device("cuda"), torch.bfloat16)
    card.weight(torch.zeros(2, 2))
    assert sent == [(torch.device("cuda"), torch.bfloat16)]
