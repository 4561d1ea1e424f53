"""How kernels of a chain are started."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.kernels.cuda import launch, rows, sampling


@pytest.fixture(autouse=True)
def _ask_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    asked = launch.is_programmatic
    asked.cache_clear()
    yield
    asked.cache_clear()


@pytest.mark.parametrize(
    ("told", "capability", "is_early"), [("1", (9, 0), True), ("1", (8, 9), False), ("0", (9, 0), False)]
)
def test_a_kernel_is_started_early_where_it_is_asked_for_and_the_card_can(
    monkeypatch: pytest.MonkeyPatch, told: str, capability: tuple[int, int], is_early: bool
) -> None:
    monkeypatch.setenv("DASHINFER_PROGRAMMATIC_LAUNCH", told)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert launch.chaining(rows._rms_norm) == ({"PDL": True, "launch_pdl": True} if is_early else {"PDL": False})


def test_a_kernel_that_waits_for_none_is_started_behind_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_programmatic", lambda: True)
    assert launch.chaining(sampling._choose) == {}


def test_nonsense_in_the_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASHINFER_PROGRAMMATIC_LAUNCH", "yes")
    with pytest.raises(ConfigError, match="is 'yes'; it must be 0 or 1"):
        launch.is_programmatic()
