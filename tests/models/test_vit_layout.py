"""What the host knows of a layout without asking the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dashinfer_vlm.models.vit_layout import frames_layout, windows_layout

CPU = torch.device("cpu")
TWO_BY_TWO: Any = SimpleNamespace(merge_size=2)


@pytest.mark.parametrize("layout", [frames_layout(CPU), windows_layout(TWO_BY_TWO, 3, CPU)])
def test_pairs_are_those_of_the_segments(layout: Any) -> None:
    found = layout([(2, 6, 14), (1, 2, 2)])
    want = [int(starts.diff().long().square().sum()) for starts in found.starts]
    assert list(found.pairs) == want
    assert len(set(want)) == len(want)
