"""How many processes decode, for an engine on a processor and on a card."""

from __future__ import annotations

from pathlib import Path

import pytest

from dashinfer_vlm.frontend import open_loader
from dashinfer_vlm.frontend.open_loader import default_workers


@pytest.mark.parametrize(("num_cores", "beside_a_card"), [(1, 1), (2, 1), (7, 3), (16, 8), (64, 8)])
def test_a_card_is_fed_by_half_of_the_cores(
    num_cores: int, beside_a_card: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_loader, "usable_cores", lambda: list(range(num_cores)))
    driver = tmp_path / "nvidiactl"
    assert default_workers("cuda", driver) == beside_a_card
    assert default_workers("cpu", driver) == default_workers("auto", driver) == 1
    driver.touch()
    assert default_workers("auto", driver) == beside_a_card
    assert default_workers("cpu", driver) == 1
