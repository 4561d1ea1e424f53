"""A layer of the text model as one call of the native CPU kernels."""

from __future__ import annotations

from torch import Tensor

from dashinfer_vlm.kernels.cpu_ops import PackedWeight, extension

__all__ = ["DecoderLayer"]


class DecoderLayer:
    """A layer of the text model: what `rms_norm`, `linear`, `rope_write_kv` and `paged_attention` make one after the
    other, to the bit, in one call.

    norms: float32 [hidden], before attention and MLP. qkv: the heads of queries, keys and values one above the other,
    [(H + 2 Hkv) * D, hidden], with a float32 bias or none. head_norms: float32 [D] of queries and of keys, or none.
    gate_up is packed with `gate_up=True`. Raises ValueError where these do not fit each other.
    """

    def __init__(
        self,
        *,
        norms: tuple[Tensor, Tensor],
        qkv: PackedWeight,
        qkv_bias: Tensor | None,
        head_norms: tuple[Tensor, Tensor] | None,
        out: PackedWeight,
        gate_up: PackedWeight,
        down: PackedWeight,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
    ) -> None:
        self.handle = extension().DecoderLayer(
            norms[0],
            qkv.handle,
            qkv_bias,
            *(head_norms or (None, None)),
            out.handle,
            norms[1],
            gate_up.handle,
            down.handle,
            num_heads,
            num_kv_heads,
            eps,
        )

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        block_tables: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
    ) -> None:
        """x: float32 [T, hidden], dense, is overwritten; the rest as `rope_write_kv` and `paged_attention` take it."""
        self.handle.forward(x, cos, sin, k_cache, v_cache, slots, block_tables, query_starts, context_lens)
