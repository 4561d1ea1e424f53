"""A layer of the text model as one call of the native kernels, where all of its parts are theirs."""

from __future__ import annotations

from torch import Tensor

from dashinfer_vlm.kernels.decoder_layer import DecoderLayer
from dashinfer_vlm.kernels.head_norms import HeadNorms
from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.linear import Linear, NativeLinear, StreamLinear
from dashinfer_vlm.layers.ops import NATIVE

__all__ = ["native_layer"]


def native_layer(
    backend: Backend,
    *,
    norms: tuple[Tensor, Tensor],
    qkv: Linear,
    head_norms: HeadNorms | None,
    out: StreamLinear,
    gate_up: Linear,
    down: StreamLinear,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> DecoderLayer | None:
    """None where a part is shared by ranks, is watched by somebody or computes otherwise. `norms` and `head_norms` are
    the backend's own."""
    if backend.ops.paged_attention is not NATIVE.paged_attention:
        return None
    if not (
        isinstance(qkv, NativeLinear)
        and isinstance(out, NativeLinear)
        and isinstance(gate_up, NativeLinear)
        and isinstance(down, NativeLinear)
    ):
        return None
    assert out.bias is gate_up.bias is down.bias is None, "no family has these"
    return DecoderLayer(
        norms=norms,
        qkv=qkv.packed,
        qkv_bias=qkv.bias,
        head_norms=None if head_norms is None else (head_norms.queries, head_norms.keys),
        out=out.packed,
        gate_up=gate_up.packed,
        down=down.packed,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        eps=eps,
    )
