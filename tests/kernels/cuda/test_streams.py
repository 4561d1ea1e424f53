"""A text model in 16 bits, whose residual stream some products leave unsummed for the norm behind them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from card_checks.models import BLOCK_SIZE, make_model, published_config, text_batch
from dashinfer_vlm.kernels.cuda import skinny
from dashinfer_vlm.layers.card_backend import on_card
from dashinfer_vlm.models.loading import allocate_kv
from dashinfer_vlm.models.model import LoadedModel
from tests.kernels.cuda.numbers import DEVICE, error


def logits_of(model: LoadedModel, rows: list[int], contexts: list[int]) -> Tensor:
    torch.manual_seed(0)
    kv = allocate_kv(model, 8, BLOCK_SIZE)
    for x in (*kv.keys, *kv.values):
        x.normal_()
    return model.forward(text_batch(DEVICE, rows, contexts), kv)


@pytest.mark.parametrize(("rows", "contexts"), [([1, 1, 1], [5, 17, 9]), ([1, 6], [5, 12])])
@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen3_vl"])
def test_logits_are_those_of_a_stream_that_is_summed_at_once(arch: str, rows: list[int], contexts: list[int]) -> None:
    """But for rounding: bfloat16 of one sum instead of two."""
    model = make_model(published_config(arch, "tiny"), on_card(DEVICE, torch.bfloat16), small=True)
    num_layers = model.config.text.num_layers
    with torch.inference_mode(), mock.patch.object(skinny, "splits_to_leave", return_value=1):
        want = logits_of(model, rows, contexts)
    with (
        torch.inference_mode(),
        mock.patch.object(skinny, "splits_to_leave", return_value=2),
        mock.patch.object(skinny, "parts_of", side_effect=skinny.parts_of) as left,
    ):
        got = logits_of(model, rows, contexts)
    assert left.call_count == 2 * num_layers
    assert error(got, want) < 2e-2
