"""LoRA adapters of random numbers as PEFT writes them, and what they make of a model of `transformers`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."

Tensors = dict[str, torch.Tensor]


def old_name(module: str) -> str:
    """As `transformers` called it before it put the text model and the ViT below one roof."""
    for new, old in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if module.startswith(new):
            return old + module.removeprefix(new)
    return module


@dataclass
class Adapter:
    """Of all linear layers, and of experts that lie in one parameter, that `chosen` says yes to."""

    model: Any
    chosen: Callable[[str], bool] = lambda module: True
    rank: int = 4
    alpha: float = 6.0
    ranks: dict[str, int] = field(default_factory=dict)
    """By the whole name of a module, as `alphas`."""
    alphas: dict[str, float] = field(default_factory=dict)
    is_stabilised: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.pairs = {
            module: (self._drawn(a, depth), self._drawn(b, rank))
            for module, a, b, depth, rank in self._sizes()
            if self.chosen(module)
        }

    @property
    def settings(self) -> dict[str, Any]:
        """As PEFT 0.21 writes them, but for what is null."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "somebody/something",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.05,
            "megatron_core": "megatron.core",
            "modules_to_save": None,
            "rank_pattern": self.ranks,
            "alpha_pattern": self.alphas,
            "target_modules": sorted({module.rpartition(".")[2] for module in self.pairs}),
            "use_dora": False,
            "use_rslora": self.is_stabilised,
        }

    def tensors(self, named: Callable[[str], str] = str) -> Tensors:
        """By the names that the file has, of modules as `named` calls them."""
        return {
            f"{PREFIX}{named(module)}.lora_{half}.weight": matrix.to(self.dtype)
            for module, pair in self.pairs.items()
            for half, matrix in zip("AB", pair, strict=True)
        }

    def write(self, folder: Path, named: Callable[[str], str] = str, **settings: Any) -> Path:
        """`settings` replace some of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.settings | settings))
        save_file(self.tensors(named), folder / "adapter_model.safetensors")
        return folder

    def merge(self) -> None:
        """Change the model's weights, in float64 and rounded once."""
        for module, pair in self.pairs.items():
            a, b = (matrix.to(self.dtype).double() for matrix in pair)
            rank = self._rank(module)
            scale = self.alphas.get(module, self.alpha) / (math.sqrt(rank) if self.is_stabilised else rank)
            weight = self._weight(module)
            if weight.ndim == 2:
                delta = b @ a
            else:  # experts: E x r rows of A, r x E columns of B
                count = len(weight)
                delta = torch.stack([b[:, i::count] @ a[i * rank : (i + 1) * rank] for i in range(count)])
            weight.data = (weight.double() + scale * delta).to(weight.dtype)

    def _sizes(self) -> Iterator[tuple[str, int, int, int, int]]:
        """Of each module: rows of A and of B, columns of A and of B."""
        for module, layer in self.model.named_modules():
            if isinstance(layer, torch.nn.Linear) and module != "lm_head":
                rank = self._rank(module)
                yield module, rank, layer.out_features, layer.in_features, rank
            elif hasattr(layer, "gate_up_proj") and layer.gate_up_proj.ndim == 3:
                count, rank = len(layer.gate_up_proj), self._rank(module)
                for name, weight in ((f"{module}.base_layer", layer.gate_up_proj), (module, layer.down_proj)):
                    yield name, count * rank, weight.shape[1], weight.shape[2], rank * count

    def _rank(self, module: str) -> int:
        return self.ranks.get(module, self.rank)

    def _weight(self, module: str) -> torch.nn.Parameter:
        layer = self.model.get_submodule(module.removesuffix(".base_layer"))
        name = "gate_up_proj" if module.endswith(".base_layer") else "weight"
        weight: torch.nn.Parameter = getattr(layer, name) if hasattr(layer, name) else layer.down_proj
        return weight

    @staticmethod
    def _drawn(rows: int, columns: int) -> torch.Tensor:
        """Of so few bits that products and their sums are exact in every type."""
        return torch.randint(-8, 9, (rows, columns)) / 64
