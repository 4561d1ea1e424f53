"""A mixture of experts in place of a layer's MLP."""

from __future__ import annotations

from typing import Any

import torch

from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.experts import Routing
from dashinfer_vlm.layers.linear import Linear, Matrix
from dashinfer_vlm.layers.ranks import Cut
from dashinfer_vlm.models.config import TextConfig
from dashinfer_vlm.models.weights import Weights

__all__ = ["ExpertMlp"]


class ExpertMlp:
    """The shares of the experts that a router chooses for each row. Takes `{prefix}.gate.weight`, `{prefix}.experts.*`
    and, of a mixture with one, `{prefix}.shared_expert*`, which is one more of them. Every rank has a part of each
    expert's channels, so that all have the same to do."""

    def __init__(self, prefix: str, config: TextConfig, weights: Weights, backend: Backend) -> None:
        mixture, hidden = config.mixture, config.hidden_size
        assert mixture is not None, prefix
        inner, self.ranks = mixture.intermediate_size, backend.ranks
        part = backend.ranks.share(inner, "channels of an expert")
        gate_ups: list[Matrix] = []
        downs: list[Matrix] = []
        names = [f"{prefix}.experts.{i}" for i in range(mixture.num_experts)]
        router = weights.take(f"{prefix}.gate.weight", mixture.num_experts, hidden)
        if mixture.has_shared:
            names.append(f"{prefix}.shared_expert")
            router = torch.cat((router, weights.take(f"{prefix}.shared_expert_gate.weight", 1, hidden)))
        for name in names:
            rows = dict.fromkeys((f"{name}.{x}_proj.weight" for x in ("gate", "up")), inner)
            gate_ups.append(weights.matrix(rows, hidden, Cut(rows=dict.fromkeys(rows, part))))
            downs.append(weights.matrix({f"{name}.down_proj.weight": hidden}, inner, Cut(columns=part)))
        routing = Routing(mixture.num_chosen, mixture.is_normalised, mixture.has_shared)
        self.experts = backend.experts(router, gate_ups, downs, routing)

    @property
    def first(self) -> Linear:
        return self.experts.router

    def __call__(self, x: Any, *, residual: torch.Tensor) -> torch.Tensor:
        return self.ranks.sum(self.experts(x, residual=residual if self.ranks.index == 0 else None))
