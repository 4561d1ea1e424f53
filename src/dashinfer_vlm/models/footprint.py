"""What a checkpoint will take in memory, told from its configuration and the headers of its files; nothing is
loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from dashinfer_vlm.layers.attention import cache_row_size
from dashinfer_vlm.layers.grouped import BITS
from dashinfer_vlm.layers.quantise import QUANT_TYPES
from dashinfer_vlm.models.config import TextConfig

__all__ = [
    "CARD_PRECISIONS",
    "PRECISIONS",
    "Shapes",
    "experts_of",
    "kv_token_bytes",
    "layer_parameters",
    "num_parameters",
    "step_bytes",
    "weight_bytes",
]

PRECISIONS = ("bfloat16", "float32", *QUANT_TYPES)
"""How processors can store weights; the quantised ones keep the embedding as bfloat16."""
CARD_PRECISIONS = ("bfloat16", "float32", "fp8", *BITS)
"""The same of cards, where 8-bit floats keep the head, too."""

Shapes = Mapping[str, tuple[int, ...]]
"""Of the tensors of one part of a model, by their published names."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_EXPERTS, _ROUTERS = ".mlp.experts.", (".mlp.gate.weight", ".shared_expert_gate.weight")


def num_parameters(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def layer_parameters(text: Shapes) -> tuple[int, int]:
    """Of the text model's matrices: those of all layers, and those of its head, which may be the embedding."""
    matrices = {name: math.prod(shape) for name, shape in text.items() if len(shape) == 2}
    embedding = matrices.pop(_EMBEDDING)
    head = matrices.pop(_HEAD, embedding)
    return sum(matrices.values()), head


def experts_of(text: Shapes) -> Shapes:
    """Of the text model: what a token only reads a share of."""
    return {name: shape for name, shape in text.items() if _EXPERTS in name}


def step_bytes(text: Shapes, precision: str) -> int:
    """Bytes of the text model's weights that a step of many rows reads: all but the table of embeddings, of which it
    takes a few rows."""
    return weight_bytes(text, precision) - round(_tensor_bytes(_EMBEDDING, text[_EMBEDDING], precision))


def weight_bytes(shapes: Shapes, precision: str) -> int:
    """Bytes of one part's weights on a processor with the native kernels: vectors, routers and the patches' weight are
    float32, and a head that shares the embedding's numbers is packed for itself."""
    tied = {_HEAD: shapes[_EMBEDDING]} if _EMBEDDING in shapes else {}
    return round(sum(_tensor_bytes(name, shape, precision) for name, shape in {**tied, **shapes}.items()))


def kv_token_bytes(text: TextConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers, in a cache of `dtype`."""
    return 2 * text.num_kv_layers * text.num_kv_heads * cache_row_size(text.head_dim, dtype) * dtype.itemsize


def _tensor_bytes(name: str, shape: tuple[int, ...], precision: str) -> float:
    count = math.prod(shape)
    if precision == "float32" or len(shape) != 2 or name.endswith(_ROUTERS):
        return 4 * count
    if precision == "fp8" and name not in (_EMBEDDING, _HEAD):
        return count + 4 * shape[0]
    if precision not in QUANT_TYPES or name == _EMBEDDING:
        return 2 * count
    layers, head = QUANT_TYPES[precision]
    return count * _bytes_per_weight(head if name == _HEAD else layers, depth=shape[1])


def _bytes_per_weight(packed_type: str, depth: int) -> float:
    """A number and its share of a bfloat16 scale, in groups that are filled up (`layers.quantise`)."""
    if packed_type == "int8":
        return 1 + 2 / depth
    if packed_type == "int4":
        return 0.5 + 2 / (128 if depth % 128 == 0 else 32)
    return (1 + 2 / 128) * (-(-depth // 128) * 128 / depth)
