"""The functions of the layers that have more than one implementation, by who computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.delta_net import DeltaNet
from dashinfer_vlm.kernels.head_norms import HeadNorms
from dashinfer_vlm.layers import activation, attention, delta_net, norm, rotary
from dashinfer_vlm.layers.embed import embed

__all__ = ["NATIVE", "NATIVE_BFLOAT16", "REFERENCE", "Ops"]


class RmsNorm(Protocol):
    """`norm.rms_norm`."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float, *, shift: Tensor | None = None) -> Tensor: ...


class LayerNorm(Protocol):
    """`norm.layer_norm`."""

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, shift: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Ops:
    """The functions of the layers that have more than one implementation; signatures are those of the reference, which
    is also what those are that are not told."""

    embed: Callable[[Tensor, Tensor, torch.dtype, Tensor | None, Tensor | None], Tensor]
    rms_norm: RmsNorm
    layer_norm: LayerNorm
    mrope_cos_sin: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor], None]
    rope_write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    paged_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
    varlen_attention: Callable[[Tensor, Tensor, Tensor, Tensor, float, int, Tensor | None], Tensor]
    rope_and_attend: Callable[..., Tensor] | None = None
    """`attend`, where that is more than one after the other."""
    write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] = attention.write_kv
    sigmoid_mul: Callable[[Tensor, Tensor], Tensor] = activation.sigmoid_mul
    causal_conv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = delta_net.causal_conv
    delta_rule: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = (
        delta_net.delta_rule
    )
    whole_delta_net: (
        Callable[[Tensor, Tensor, Tensor, DeltaNet, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None
    ) = None
    """`gated_delta_net`, where that is more than one after the other."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        block_tables: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
        scale: float,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        """`norms`, `rope_write_kv`, then `paged_attention`, whose result it is; q, k and v may be overwritten. Tables
        of fewer channels than heads have turn the first ones."""
        where = (block_tables, query_starts, context_lens, scale)
        if self.rope_and_attend is not None:
            return self.rope_and_attend(q, k, v, cos, sin, k_cache, v_cache, slots, *where, norms)
        if norms is not None:
            of_heads = ((q, norms.queries), (k, norms.keys))
            q, k = (self.rms_norm(x.flatten(0, 1), gains, norms.eps).view(x.shape) for x, gains in of_heads)
        num_turned = 2 * cos.shape[-1]
        if num_turned == q.shape[-1]:
            self.rope_write_kv(q, k, v, cos, sin, k_cache, v_cache, slots)
        else:
            for x in (q, k):
                self.rope(x[..., :num_turned], cos, sin)
            self.write_kv(k, v, k_cache, v_cache, slots)
        return self.paged_attention(q, k_cache, v_cache, *where)

    def gated_delta_net(
        self,
        channels: Tensor,
        gate: Tensor,
        rates: Tensor,
        net: DeltaNet,
        inputs: Tensor,
        memory: Tensor,
        seats: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
    ) -> Tensor:
        """[T, H * V] of the gate's type: `causal_conv` of channels [T, C], `delta_rule` by rates [T, 2 H] (how much is
        learnt, then how much is forgotten), and the norm of each head times SiLU of the gate [T, H * V]. States, seats
        and the rest are those of `layers.delta_net`; rows may be strided."""
        where = (seats, query_starts, context_lens)
        if self.whole_delta_net is not None:
            return self.whole_delta_net(channels, gate, rates, net, inputs, memory, *where)
        keys = net.num_key_heads * net.key_dim
        mixed = self.causal_conv(channels.to(inputs.dtype), inputs, net.conv, *where)
        parts = mixed.split_with_sizes([keys, keys, gate.shape[1]], dim=1)
        dims = (net.key_dim, net.key_dim, net.value_dim)
        q, k, v = (part.view(len(mixed), -1, dim) for part, dim in zip(parts, dims, strict=True))
        learnt, forgotten = rates.to(memory.dtype).chunk(2, dim=1)
        decay = net.speed * F.softplus(forgotten + net.rate_bias)
        out = self.delta_rule(q, k, v, learnt.sigmoid(), decay, memory, *where)
        normed = self.rms_norm(out.to(gate.dtype).flatten(0, 1), net.gains, net.eps)
        return normed.view(gate.shape) * F.silu(gate)


REFERENCE = Ops(
    embed=embed,
    rms_norm=norm.rms_norm,
    layer_norm=norm.layer_norm,
    mrope_cos_sin=rotary.mrope_cos_sin,
    rope=rotary.rope,
    rope_write_kv=attention.rope_write_kv,
    paged_attention=attention.paged_attention,
    varlen_attention=attention.varlen_attention,
)

NATIVE = Ops(
    embed=embed,
    rms_norm=cpu_ops.rms_norm,
    layer_norm=cpu_ops.layer_norm,
    mrope_cos_sin=rotary.mrope_cos_sin,
    rope=cpu_ops.rope,
    rope_write_kv=cpu_ops.rope_write_kv,
    paged_attention=cpu_ops.paged_attention,
    varlen_attention=cpu_ops.varlen_attention,
    write_kv=cpu_ops.write_kv,
    causal_conv=cpu_ops.causal_conv,
    delta_rule=cpu_ops.delta_rule,
)

NATIVE_BFLOAT16 = replace(NATIVE, varlen_attention=partial(cpu_ops.varlen_attention, bfloat16=True))
"""For models whose weights are bfloat16."""
