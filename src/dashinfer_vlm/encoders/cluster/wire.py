"""What travels between an engine and an encoder on another machine: bytes that are checked before they are used.

Pictures come with their grid, shape and content hash and the identity of the engine's ViT; embeddings go back in the
form of `vision.embedding_bytes`, whose header is compared with what was asked for. Ray moves them as plain `bytes`;
nothing here is ever unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from dashinfer_vlm.encoders.elsewhere.wire import Picture, TensorDtype, dtype_name
from dashinfer_vlm.encoders.shared.embedding_bytes import EmbeddingBytes, EmbeddingFormatError
from dashinfer_vlm.errors import EngineError
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.request import Grid

__all__ = [
    "MessageError",
    "Pictures",
    "pack_embeddings",
    "pack_fault",
    "pack_pictures",
    "unpack_embeddings",
    "unpack_pictures",
]


class MessageError(EngineError):
    """Bytes from another machine that are not what they should be."""


class _Picture(msgspec.Struct, frozen=True, array_like=True):
    content_hash: bytes
    grid: Grid
    shape: tuple[int, int]
    patches: bytes


class _Job(msgspec.Struct, frozen=True, array_like=True, tag="job"):
    model_id: bytes
    dtype: TensorDtype
    """Of the embeddings that are wanted."""
    pictures: tuple[_Picture, ...]


class _Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    embeddings: tuple[bytes, ...]


class _Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    fault: Fault


_job_decoder: msgspec.msgpack.Decoder[_Job] = msgspec.msgpack.Decoder(_Job)
_reply_decoder: msgspec.msgpack.Decoder[_Done | _Failed] = msgspec.msgpack.Decoder(_Done | _Failed)


@dataclass(frozen=True, slots=True)
class Pictures:
    """A job as the encoder sees it: uint8 [P_i, patch_dim] each."""

    patches: list[torch.Tensor]
    grids: list[Grid]
    content_hashes: list[bytes]
    dtype: torch.dtype


def pack_pictures(pictures: Sequence[Picture], patches: Sequence[torch.Tensor], packing: EmbeddingBytes) -> bytes:
    """The job that asks for embeddings of uint8 [P_i, patch_dim] as `packing` unpacks them."""
    packed = tuple(
        _Picture(picture.content_hash, picture.grid, (rows.shape[0], rows.shape[1]), rows.numpy().tobytes())
        for picture, rows in zip(pictures, patches, strict=True)
    )
    return msgspec.msgpack.encode(_Job(packing.model_id, dtype_name(packing.dtype), packed))


def unpack_pictures(data: bytes, *, model_id: bytes, patch_dim: int) -> Pictures:
    """Check a job for the ViT `model_id`; raises MessageError."""
    try:
        job = _job_decoder.decode(data)
    except msgspec.DecodeError as error:
        raise MessageError(f"a job that cannot be read: {error}") from error
    if job.model_id != model_id:
        raise MessageError("the engine's vision encoder has other weights than the one here; give both one --model")
    for picture in job.pictures:
        rows, columns = picture.shape
        if min(picture.grid) < 1 or rows != math.prod(picture.grid) or columns != patch_dim:
            raise MessageError(f"patches of shape {picture.shape} for grid {picture.grid} and {patch_dim} values each")
        if len(picture.patches) != rows * columns:
            raise MessageError(f"{len(picture.patches)} bytes of patches for shape {picture.shape}")
    return Pictures(
        [torch.frombuffer(bytearray(p.patches), dtype=torch.uint8).view(p.shape) for p in job.pictures],
        [p.grid for p in job.pictures],
        [p.content_hash for p in job.pictures],
        getattr(torch, job.dtype),
    )


def pack_embeddings(hashes: Sequence[bytes], embeddings: Sequence[torch.Tensor], packing: EmbeddingBytes) -> bytes:
    """The answer to a job."""
    packed = tuple(packing.pack(key, each) for key, each in zip(hashes, embeddings, strict=True))
    return msgspec.msgpack.encode(_Done(packed))


def pack_fault(error: Exception) -> bytes:
    """The answer of an encoder that could not do what was asked."""
    return msgspec.msgpack.encode(_Failed(Fault.of(error)))


def unpack_embeddings(data: bytes, pictures: Sequence[Picture], packing: EmbeddingBytes) -> list[torch.Tensor]:
    """One [tokens_i, hidden] per picture, checked against what was asked for.

    Raises the encoder's own error, and MessageError for anything that is not an answer to this job.
    """
    try:
        reply = _reply_decoder.decode(data)
    except msgspec.DecodeError as error:
        raise MessageError(f"an answer that cannot be read: {error}") from error
    if isinstance(reply, _Failed):
        raise reply.fault.error()
    if len(reply.embeddings) != len(pictures):
        raise MessageError(f"{len(reply.embeddings)} embeddings for {len(pictures)} pictures")
    try:
        return [
            packing.unpack(picture.content_hash, picture.num_rows, each)
            for picture, each in zip(pictures, reply.embeddings, strict=True)
        ]
    except EmbeddingFormatError as error:
        raise MessageError(str(error)) from error
