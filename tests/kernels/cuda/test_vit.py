"""The ViT as a card computes it: its residual stream goes without biases, which the norms add."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from card_checks.models import RandomWeights, published_config
from dashinfer_vlm.kernels.cuda import rotary, rows, segments
from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.card_backend import on_card
from dashinfer_vlm.models.config import CheckpointConfig
from tests.kernels.cuda.numbers import DEVICE, error

GRIDS = [(1, 4, 2), (1, 2, 6)]
META = torch.device("meta")
ARCHITECTURES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def embeddings(config: CheckpointConfig, backend: Backend) -> Tensor:
    vision = config.vision
    assert vision is not None
    weights = RandomWeights(config, backend.device, same_everywhere=backend.device != META)
    encoder = config.family.encoder(vision, weights, backend)
    random = torch.Generator().manual_seed(0)
    patches = [
        torch.randint(0, 256, (frames * rows * columns, vision.patch_dim), generator=random, dtype=torch.uint8)
        for frames, rows, columns in GRIDS
    ]
    state = encoder.begin(patches, GRIDS)
    encoder.run(state, 1 << 20)
    return torch.cat(encoder.finish(state))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_stream_without_biases_gives_the_same_embeddings(arch: str) -> None:
    config, backend = published_config(arch, "tiny"), on_card(DEVICE, torch.float32)
    want = embeddings(config, replace(backend, leaves_out_biases=False))
    assert error(embeddings(config, backend), want) < 1e-5


class Sums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How torch adds to [P, width], and how often in a product whose memory holds the sum already."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_in_place = 0
        self.others: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "addmm" and args[0] is (kwargs or {}).get("out"):
            self.num_in_place += 1
        elif name in ("add", "add_") and args[0].is_floating_point() and args[0].dim() == 2:
            self.others.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])
def test_what_is_added_to_the_stream_is_a_product_in_its_memory(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for each block, on tensors without memory; a bias beside it would be a launch more."""
    for module in (rows, rotary, segments):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    config, backend = published_config(arch, "tiny"), on_card(META, torch.float32)
    assert config.vision is not None
    with Sums() as sums:
        embeddings(config, backend)
    assert (sums.num_in_place, sums.others) == (2 * config.vision.depth, [])
    with Sums() as sums:
        embeddings(config, replace(backend, leaves_out_biases=False))
    assert (sums.num_in_place, len(sums.others)) == (0, 2 * config.vision.depth)
