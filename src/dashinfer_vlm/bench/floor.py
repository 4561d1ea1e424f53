"""The least that a machine could need for what it was asked: operations at the rate of its products, weights at the
rate at which it reads them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dashinfer_vlm.models.config import CheckpointConfig

__all__ = ["Amounts", "Floor", "Rates", "Work", "measure_rates", "read_work"]

_REPEATS = 12
_PRODUCTS = ((512, 1024, 1024), (512, 4096, 1024), (512, 2048, 2048))
"""Rows, columns and depth of products whose weights stay in a cache: the best of them counts."""
_READ_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Amounts:
    """What requests needed."""

    num_items: float
    num_patches: float
    num_prompts: float
    num_prompt_tokens: float
    """Without those that were found in the prefix cache."""
    num_decoded: float
    """Tokens of answers but for the first one of each, which the prompt's step gives."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a model costs: operations of the products alone, two for each weight and row."""

    patch_flops: float
    patch_pair_flops: float
    """Of a query and a key, in the ViT's blocks whose attention spans the whole picture; windows count as nothing."""
    token_flops: float
    """Of a prompt's token, without the head."""
    token_pair_flops: float
    head_flops: float
    step_bytes: float
    """Weights that a step of many rows reads, all but the table of word embeddings; K and V count as nothing."""
    text_numbers: str
    """`int8`, or the type that is multiplied."""
    vision_numbers: str
    expert_bytes: float = 0.0
    """Of `step_bytes` those of experts."""
    chosen_share: float = 0.0
    """Of the experts, that a token chooses."""

    def bytes_read(self, num_rows: float) -> float:
        """By a step of so many rows, which choose their experts independently."""
        return self.step_bytes - self.expert_bytes * math.pow(1 - self.chosen_share, num_rows)


@dataclass(frozen=True, slots=True)
class Rates:
    """What this machine was seen to do."""

    read_gb_s: float
    gflop_s: dict[str, float]
    """By the type of the numbers that are multiplied."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds of all requests together, one kind of work after the other, as many streams in each step as there are
    clients."""

    encoder_s: float
    prefill_s: float
    decode_s: float
    rates: Rates

    @property
    def seconds(self) -> float:
        return self.encoder_s + self.prefill_s + self.decode_s

    @classmethod
    def of(cls, work: Work, rates: Rates, amounts: Amounts, num_clients: int) -> Floor:
        """Pictures and prompts count as being of equal size: no other sizes of the same sum cost less."""
        a = amounts
        patch_pairs = a.num_patches**2 / a.num_items if a.num_items else 0.0
        token_pairs = a.num_prompt_tokens**2 / a.num_prompts / 2 if a.num_prompts else 0.0
        encoder_flops = work.patch_flops * a.num_patches + work.patch_pair_flops * patch_pairs
        prefill_flops = work.token_flops * a.num_prompt_tokens + work.token_pair_flops * token_pairs
        text, vision = (1e9 * rates.gflop_s[numbers] for numbers in (work.text_numbers, work.vision_numbers))
        step_s = max(
            work.bytes_read(num_clients) / 1e9 / rates.read_gb_s,
            num_clients * (work.token_flops + work.head_flops) / text,
        )
        return cls(encoder_flops / vision, prefill_flops / text, step_s * a.num_decoded / num_clients, rates)


def read_work(facts: Mapping[str, str]) -> Work | None:
    """`facts` are the labels of `dashinfer_engine_info`; None when its model's folder is not on this machine, or its
    device is no processor."""
    folder = Path(facts.get("model", ""))
    if facts.get("device") != "cpu" or not (folder / "config.json").is_file():
        return None
    # these bring torch
    from dashinfer_vlm.models.config import read_config
    from dashinfer_vlm.models.footprint import experts_of, layer_parameters, num_parameters, step_bytes, weight_bytes
    from dashinfer_vlm.models.weights import Weights

    config = read_config(folder)
    weights, text = Weights(folder, config.family.names, config.stored), config.text
    shapes = weights.shapes("text")
    layers, head = layer_parameters(shapes)
    experts = experts_of(shapes)
    chosen_share = text.mixture.num_chosen / text.mixture.num_experts if text.mixture else 0.0
    precision = facts["quant_type"] if facts["quant_type"] != "none" else facts["dtype"]
    return Work(
        *_vision_flops(config, weights.shapes("vision")),
        token_flops=2.0 * (layers - (1 - chosen_share) * num_parameters(experts)),
        token_pair_flops=4.0 * text.num_kv_layers * text.num_heads * text.head_dim,
        head_flops=2.0 * head,
        step_bytes=step_bytes(shapes, precision),
        text_numbers=_numbers(facts["quant_type"], facts["dtype"]),
        vision_numbers=_numbers(facts["vision_quant_type"], facts["dtype"]),
        expert_bytes=weight_bytes(experts, precision),
        chosen_share=chosen_share,
    )


def measure_rates(numbers: set[str]) -> Rates:
    """Products of each type of `numbers` (`bfloat16`, `float32`, `int8`) that stay in a cache, and a product of one row
    with half a GiB of weights, through the layers' own kernels with a thread per core; the best of a few times.

    Takes a second or two, in which nothing else should compute.
    """
    import torch

    from dashinfer_vlm.cores import usable_cores
    from dashinfer_vlm.kernels.threads import set_threads

    set_threads(len(usable_cores()))
    with torch.inference_mode():
        products = {name: max(_product_rate(name, *sizes) for sizes in _PRODUCTS) for name in numbers}
        return Rates(_read_rate(), products)


def _vision_flops(config: CheckpointConfig, shapes: Mapping[str, tuple[int, ...]]) -> tuple[float, float]:
    """Of a patch, and of a query and a key. A merger's rows are tokens; a table of positions is not multiplied."""
    if config.vision is None:
        return 0.0, 0.0
    vision = config.vision
    counts = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) > 1 and "pos_embed" not in name}
    rows = sum(count / (vision.merge_size**2 if "merger" in name else 1) for name, count in counts.items())
    key = "fullatt_block_indexes"
    num_full = len(vision.section.integers(key)) if vision.section.has(key) else vision.depth
    return 2.0 * rows, 4.0 * vision.width * num_full


def _numbers(quant_type: str, dtype: str) -> str:
    """The quantised types all multiply bytes."""
    return dtype if quant_type == "none" else "int8"


def _product_rate(numbers: str, rows: int, columns: int, depth: int) -> float:
    """GFLOP/s."""
    import torch

    weight = torch.randn(columns, depth)
    return 2 * rows * columns * depth / 1e9 / _best_s(_product(weight, numbers, rows))


def _read_rate() -> float:
    """GB/s."""
    import torch

    weight = torch.ones(_READ_BYTES // 2 // 4096, 4096, dtype=torch.bfloat16)
    product = _product(weight, "bfloat16", 1)
    num_bytes = weight.nbytes
    del weight
    return num_bytes / 1e9 / _best_s(product)


def _product(weight: Tensor, numbers: str, rows: int) -> Callable[[], object]:
    """A product of `rows` rows with `weight`, through the native kernels where they are."""
    import torch

    from dashinfer_vlm.kernels import cpu_ops

    x = torch.randn(rows, weight.shape[1])
    if not cpu_ops.available():
        dtype = getattr(torch, numbers)
        x, weight = x.to(dtype), weight.to(dtype)
        return lambda: torch.nn.functional.linear(x, weight)
    if numbers == "int8":
        packed = cpu_ops.pack_linear_int8(weight)
    else:
        packed = cpu_ops.pack_linear(weight.to(getattr(torch, numbers)))
    out = torch.empty(rows, weight.shape[0])
    return lambda: cpu_ops.linear(x, packed, out=out)


def _best_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        begin_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin_s)
    return min(times)
