"""Jobs and answers between machines: what is sent arrives, and nothing else gets in."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace

import msgspec
import pytest
import torch

from dashinfer_vlm.encoders.cluster.ray_library import check_head, ray_library
from dashinfer_vlm.encoders.cluster.wire import (
    MessageError,
    pack_embeddings,
    pack_fault,
    pack_pictures,
    unpack_embeddings,
    unpack_pictures,
)
from dashinfer_vlm.encoders.elsewhere.wire import Picture, TensorFile
from dashinfer_vlm.encoders.shared.embedding_bytes import EmbeddingBytes
from dashinfer_vlm.errors import CheckpointError, ConfigError
from dashinfer_vlm.shared_array import SharedArray

PATCH_DIM = 6
PACKING = EmbeddingBytes(model_id=b"m" * 32, num_columns=8, dtype=torch.bfloat16)


def picture(number: int, num_tokens: int = 1) -> tuple[Picture, torch.Tensor]:
    patches = torch.randint(0, 256, (num_tokens * 4, PATCH_DIM), dtype=torch.uint8)
    file = TensorFile("uint8", tuple(patches.shape), SharedArray("elsewhere", (patches.numel(),), "|u1"))
    return Picture(file, (1, 2, 2 * num_tokens), bytes([number]) * 32, num_tokens), patches


def job(*numbers: int, packing: EmbeddingBytes = PACKING) -> bytes:
    pictures = [picture(number) for number in numbers]
    return pack_pictures([p for p, _ in pictures], [rows for _, rows in pictures], packing)


def test_pictures_arrive_as_they_were_sent() -> None:
    (first, rows), (second, more) = picture(1), picture(2, num_tokens=3)
    got = unpack_pictures(pack_pictures([first, second], [rows, more], PACKING), model_id=b"m" * 32, patch_dim=6)
    assert all(torch.equal(a, b) for a, b in zip(got.patches, [rows, more], strict=True))
    assert got.grids == [first.grid, second.grid]
    assert got.content_hashes == [first.content_hash, second.content_hash]
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04\x95", "cannot be read"),
        (job(1)[:-1], "cannot be read"),
        (job(1, packing=replace(PACKING, model_id=b"x" * 32)), "other weights"),
        (msgspec.msgpack.encode(["job", b"m" * 32, "uint7", []]), "cannot be read"),
        (msgspec.msgpack.encode(["job", b"m" * 32, "float32", [[b"h", [1, 2, 2], [4, 5], bytes(20)]]]), "of shape"),
        (msgspec.msgpack.encode(["job", b"m" * 32, "float32", [[b"h", [1, 2, 3], [4, 6], bytes(24)]]]), "of shape"),
        (msgspec.msgpack.encode(["job", b"m" * 32, "float32", [[b"h", [-2, -2, 1], [4, 6], bytes(24)]]]), "of shape"),
        (msgspec.msgpack.encode(["job", b"m" * 32, "float32", [[b"h", [1, 2, 2], [4, 6], bytes(23)]]]), "23 bytes"),
    ],
)
def test_a_job_that_is_not_for_this_encoder_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(MessageError, match=message):
        unpack_pictures(data, model_id=b"m" * 32, patch_dim=PATCH_DIM)


@pytest.mark.parametrize("num_columns", [8, 8 * (1 + 3)], ids=["merged rows", "with three rows of deepstack each"])
def test_embeddings_arrive_as_they_were_sent(num_columns: int) -> None:
    first, second = picture(1)[0], picture(2, num_tokens=3)[0]
    packing = replace(PACKING, num_columns=num_columns)
    sent = [torch.randn(1, num_columns).bfloat16(), torch.randn(3, num_columns).bfloat16()]
    data = pack_embeddings([first.content_hash, second.content_hash], sent, packing)
    got = unpack_embeddings(data, [first, second], packing)
    assert all(torch.equal(a, b) for a, b in zip(got, sent, strict=True))


@pytest.mark.parametrize("wrong", ["hash", "rows", "columns", "model", "dtype", "count", "cut", "pickle"])
def test_an_answer_to_something_else_is_refused(wrong: str) -> None:
    asked = picture(1, num_tokens=2)[0]
    key = b"?" * 32 if wrong == "hash" else asked.content_hash
    packing = {
        "model": replace(PACKING, model_id=b"x" * 32),
        "dtype": replace(PACKING, dtype=torch.float16),
        "columns": replace(PACKING, num_columns=32),
    }.get(wrong, PACKING)
    rows = torch.zeros(3 if wrong == "rows" else 2, packing.num_columns)
    data = pack_embeddings([key], [rows], packing)
    data = {"cut": data[:-1], "pickle": b"\x80\x04K\x01."}.get(wrong, data)
    pictures = [asked, asked] if wrong == "count" else [asked]
    with pytest.raises(MessageError):
        unpack_embeddings(data, pictures, PACKING)


def test_what_went_wrong_there_is_raised_here() -> None:
    with pytest.raises(CheckpointError, match="tensor x is missing"):
        unpack_embeddings(pack_fault(CheckpointError("tensor x is missing")), [], PACKING)


def test_without_ray_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'dashinfer-vlm\[cluster\]'"):
        ray_library()


def test_an_address_where_nobody_listens_is_known_at_once() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # taken, but it does not listen
        with pytest.raises(ConfigError, match="nothing answers at"):
            check_head(f"127.0.0.1:{bound.getsockname()[1]}")


@pytest.mark.parametrize("address", ["", "host", "host:", ":6379", "host:x"])
def test_an_address_has_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        check_head(address)
