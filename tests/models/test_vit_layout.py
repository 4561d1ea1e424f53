"""What the host knows of a layout without asking the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dashinfer_vlm.models.vit import PackedVit
from dashinfer_vlm.models.vit_layout import frames_layout, windows_layout

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")
TWO_BY_TWO: Any = SimpleNamespace(merge_size=2)


@pytest.mark.parametrize("layout", [frames_layout(CPU), windows_layout(TWO_BY_TWO, 3, CPU)])
def test_pairs_are_those_of_the_segments(layout: Any) -> None:
    found = layout([(2, 6, 14), (1, 2, 2)])
    want = [int(starts.diff().long().square().sum()) for starts in found.starts]
    assert list(found.pairs) == want
    assert len(set(want)) == len(want)


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether copies to another device are waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waited: list[bool] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") == ELSEWHERE:
            self.waited.append(not kwargs.get("non_blocking", False))
        return function(*args, **kwargs)


@pytest.mark.parametrize("layout", [frames_layout(ELSEWHERE), windows_layout(TWO_BY_TWO, 3, ELSEWHERE)])
def test_a_batch_begins_without_waiting_for_the_device(layout: Any) -> None:
    config: Any = SimpleNamespace(out_size=4, width=32, num_heads=2, rope_theta=1e4, patch_dim=12, merge_size=2)
    backend: Any = SimpleNamespace(device=ELSEWHERE, activation_dtype=torch.float32, leaves_out_biases=False)
    nothing: Any = None
    vit = PackedVit(config, backend, embed=nothing, blocks=[], merger=nothing, layout=layout)
    grids = [(2, 6, 14), (1, 2, 2)]
    patches = [torch.empty(t * h * w, 12, dtype=torch.uint8, device=ELSEWHERE) for t, h, w in grids]
    with Copies() as copies:
        vit.begin(patches, grids)
    assert copies.waited
    assert not any(copies.waited)
