"""What a model's steps read and multiply: of these the floors are made."""

from __future__ import annotations

import math

from dashinfer_vlm.layers.fp8 import Fp8Linear
from dashinfer_vlm.layers.grouped import GroupedLinear
from dashinfer_vlm.layers.linear import Linear
from dashinfer_vlm.models.base import KVCache
from dashinfer_vlm.models.config import CheckpointConfig
from dashinfer_vlm.models.model import LoadedModel
from dashinfer_vlm.request import Grid


def layer_numbers(model: LoadedModel) -> int:
    """Weights of all layers, without embedding and head."""
    t, delta_net = model.config.text, model.config.text.delta_net
    of_queries = 2 if delta_net is None else 3  # and their gates
    attention = t.hidden_size * t.head_dim * (of_queries * t.num_heads + 2 * t.num_kv_heads)
    recurrent = 0
    if delta_net is not None:
        values = delta_net.num_value_heads * delta_net.value_dim
        recurrent = t.hidden_size * (delta_net.num_channels + 2 * values + 2 * delta_net.num_value_heads)
    mixers = t.num_kv_layers * attention + (t.num_layers - t.num_kv_layers) * recurrent
    return mixers + t.num_layers * 3 * t.hidden_size * t.intermediate_size


def head_numbers(model: LoadedModel) -> int:
    return model.config.text.hidden_size * model.config.text.vocab_size


def weight_bytes(model: LoadedModel) -> int:
    """What a step reads of them, scales left out."""
    size = model.kv_dtype.itemsize
    of_layers, of_head = map(_bits, (model.decoder.layers[0].mlp.first, model.decoder.head))
    return (layer_numbers(model) * (of_layers or 8 * size) + head_numbers(model) * (of_head or 8 * size)) // 8


def _bits(layer: Linear) -> int | None:
    """Of a quantised weight."""
    if isinstance(layer, GroupedLinear):
        return layer.weight.bits
    return 8 if isinstance(layer, Fp8Linear) else None


def kv_bytes(kv: KVCache) -> float:
    """Of one token."""
    return sum(x.nbytes for x in (*kv.keys, *kv.values)) / (kv.num_blocks * kv.block_size)


def vit_flops(config: CheckpointConfig, grids: list[Grid]) -> tuple[float, float]:
    """Of products and of attention (the ViTs of Qwen2-VL and Qwen2.5-VL)."""
    vision = config.vision
    assert vision is not None
    width, section = vision.width, vision.section
    gated = section.has("intermediate_size")
    inner = section.integer("intermediate_size") if gated else int(width * section.number("mlp_ratio"))
    per_layer = 4 * width**2 + (3 if gated else 2) * width * inner
    num_patches = sum(math.prod(g) for g in grids)
    group = width * vision.merge_size**2
    merger = 2 * (num_patches / vision.merge_size**2) * group * (group + vision.out_size)
    products = 2 * num_patches * (vision.patch_dim * width + vision.depth * per_layer) + merger
    full = len(section.integers("fullatt_block_indexes")) if gated else vision.depth
    window = (section.integer("window_size") // vision.patch_size) ** 2 if gated else 0
    pairs = sum(t * (h * w) ** 2 for t, h, w in grids)
    return products, 4.0 * width * (full * pairs + (vision.depth - full) * num_patches * window)
