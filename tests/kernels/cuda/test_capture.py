"""What a graph is captured of, on tensors without memory: who asks for a value, or lets a tensor of the processor in,
fails here as on a card."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from card_checks.models import BLOCK_SIZE, RandomWeights, make_model, published_config
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.cards.calls import ModelCalls
from dashinfer_vlm.engine.cards.graphs import Shapes
from dashinfer_vlm.engine.cards.worst_step import worst_step_bytes
from dashinfer_vlm.kernels.cuda import experts, variants  # noqa: F401 - all kernels have variants
from dashinfer_vlm.layers.card_backend import in_floats, in_groups, on_card
from dashinfer_vlm.models.loading import allocate_kv
from dashinfer_vlm.models.model import LoadedModel
from make_checkpoint import RECIPES

META = torch.device("meta")
MODULES = [
    x for name, x in sys.modules.items() if name.startswith("dashinfer_vlm.kernels.cuda.") and hasattr(x, "launch")
]
"""Those that start kernels."""
SHAPES = Shapes(4, 64, decode_sizes=(1, 2, 4), mixed_sizes=(32, 64))


class OnTheDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Nothing of the processor takes part but single numbers."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            assert not isinstance(x, Tensor) or x.device == META or x.dim() == 0, (
                f"{function} gets {x.device} {x.shape}"
            )
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """In place of the one that poisons memory: there is none."""


def capture_and_replay(model: LoadedModel, cache: torch.dtype | None = None) -> None:
    """Every shape runs once to warm up, which may send what is kept, and again as it is captured."""
    config = EngineConfig(device="cpu", max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256)
    with torch.inference_mode():
        calls = ModelCalls(model, allocate_kv(model, 9, BLOCK_SIZE, cache, num_seats=4), config, SHAPES)
        calls.capture()
        with OnTheDevice():  # type: ignore[no-untyped-call]
            for shape in SHAPES.all():
                calls.graphs.replay(shape)


@pytest.mark.parametrize("arch", RECIPES)
@pytest.mark.parametrize("cache", [None, torch.int8])
def test_a_step_asks_for_no_value_and_takes_nothing_from_the_processor(arch: str, cache: torch.dtype | None) -> None:
    config = published_config(arch, "tiny")
    model = make_model(config, on_card(META, torch.bfloat16), small=False)
    capture_and_replay(model, cache)


@pytest.mark.parametrize(
    ("arch", "quant_type"),
    [("qwen2", "fp8"), ("qwen2", "a16w8"), ("qwen2", "a16w4"), ("qwen3_moe", "fp8"), ("qwen3_moe", "a16w8"),
     ("qwen3_moe", "a16w4"), ("qwen3_5_text", "fp8"), ("qwen3_5_text", "a16w4"), ("qwen3_5_moe_text", "fp8")],
)  # fmt: skip
def test_nor_does_one_of_quantised_weights(arch: str, quant_type: str) -> None:
    config = published_config(arch, "tiny")
    is_fp8 = quant_type == "fp8"
    backend = in_floats(META, torch.bfloat16) if is_fp8 else in_groups(META, torch.bfloat16, quant_type)
    weights = RandomWeights(config, META, same_everywhere=False)
    model = LoadedModel(config, config.family.decoder(config, weights, backend), None, backend)
    capture_and_replay(model)


@pytest.mark.parametrize("num_rows", [1, 4, 300])
def test_nor_do_experts(num_rows: int) -> None:
    x, logits, gate_up, down = (
        torch.empty(shape, dtype=torch.bfloat16, device=META)
        for shape in ((num_rows, 64), (num_rows, 8), (8, 96, 64), (8, 64, 48))
    )
    with OnTheDevice():  # type: ignore[no-untyped-call]
        chosen = experts.choose(logits, 2, normalise=True)
        assert experts.multiply(x, gate_up, down, *chosen, x, x) is x


@pytest.mark.parametrize("arch", RECIPES)
def test_the_heaviest_step_can_be_done_on_a_device_of_its_own(arch: str) -> None:
    """Choice of tokens and pictures, too; prompts that are longer than a graph are computed so."""

    class Meter:
        calls = 0

        def peak_bytes(self, call: Any) -> int:
            Meter.calls += 1
            call()
            return 0

    config = published_config(arch, "tiny")
    model = make_model(config, on_card(META, torch.bfloat16), small=False)
    engine = EngineConfig(device="cpu", max_num_seqs=4, max_model_len=256)
    assert worst_step_bytes(model, config.vision, engine, 64, Meter()) > 0
    assert Meter.calls == (2 if config.vision else 1)
