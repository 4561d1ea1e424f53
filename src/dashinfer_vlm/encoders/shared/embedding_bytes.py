"""An embedding as bytes that other processes and machines may keep: a header that says whose it is, then the rows.

Little endian: magic, version, dtype, rows, columns, CRC-32 of the rows, model id, content hash. Every field is checked
before a byte of the rows is used, and nothing in it is ever executed: the bytes may come from anybody.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["HASH_BYTES", "VERSION", "EmbeddingBytes", "EmbeddingFormatError"]

HASH_BYTES = 32
VERSION = 1
_MAGIC = b"DIVLMEMB"
_HEADER = struct.Struct(f"<8sHHIII{HASH_BYTES}s{HASH_BYTES}s")
_DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.float64: 4}


class EmbeddingFormatError(ValueError):
    """Bytes that are not the embedding that was asked for."""


@dataclass(frozen=True, slots=True)
class EmbeddingBytes:
    """Packs and checks the embeddings `[tokens, num_columns]` of one model."""

    model_id: bytes
    """32 bytes: identity of the encoder's weights and of how it computes."""
    num_columns: int
    """Columns of one row: the model's `embedding_size`."""
    dtype: torch.dtype

    def __post_init__(self) -> None:
        assert len(self.model_id) == HASH_BYTES, len(self.model_id)
        assert self.dtype in _DTYPES, self.dtype

    def num_bytes(self, num_tokens: int) -> int:
        """Size of a packed embedding."""
        return _HEADER.size + num_tokens * self.num_columns * self.dtype.itemsize

    def pack(self, content_hash: bytes, embedding: torch.Tensor) -> bytes:
        """Header and rows of `embedding`, which may lie on any device."""
        rows = embedding.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data
        return self._header(content_hash, len(embedding), zlib.crc32(rows)) + bytes(rows)

    def unpack(self, content_hash: bytes, num_tokens: int, data: bytes) -> torch.Tensor:
        """The embedding `[num_tokens, num_columns]` of that content, on the CPU, in memory of its own.

        Raises EmbeddingFormatError when `data` is anything else: another version, model, content, type or shape, or
        damaged rows.
        """
        if len(data) != self.num_bytes(num_tokens):
            raise EmbeddingFormatError(f"{len(data)} bytes; {self.num_bytes(num_tokens)} are expected")
        rows = np.frombuffer(data, dtype=np.uint8, offset=_HEADER.size)
        if data[: _HEADER.size] != self._header(content_hash, num_tokens, zlib.crc32(rows.data)):
            raise EmbeddingFormatError("the header is not that of this content, model, type and shape, or rows changed")
        embedding = torch.empty(num_tokens, self.num_columns, dtype=self.dtype)
        embedding.view(torch.uint8).numpy().reshape(-1)[:] = rows
        return embedding

    def _header(self, content_hash: bytes, num_tokens: int, checksum: int) -> bytes:
        assert len(content_hash) == HASH_BYTES, len(content_hash)
        kind = _DTYPES[self.dtype]
        return _HEADER.pack(_MAGIC, VERSION, kind, num_tokens, self.num_columns, checksum, self.model_id, content_hash)
