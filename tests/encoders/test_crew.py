"""The life of encoders elsewhere, with encoders that do as they are told."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from dashinfer_vlm.encoders.elsewhere import crew as crew_module
from dashinfer_vlm.encoders.elsewhere.crew import (
    Crew,
    Encoded,
    EncoderDiedError,
    EncodeRefusedError,
    Lost,
    NoPlaceError,
    Refused,
)
from dashinfer_vlm.errors import ConfigError, EngineError
from tests.encoders.told import TIMEOUT_S, Told, item


@pytest.fixture
def employ(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Crew]:
    monkeypatch.setattr(crew_module, "PLACE_CHECK_S", 0.01)
    monkeypatch.setattr(crew_module, "FIRST_BACK_OFF_S", 0.01)
    monkeypatch.setattr(crew_module, "IDLE_CHECK_S", 0.05)

    def crew_of(*encoders: Told) -> Crew:
        crew = Crew(encoders)
        crew.wait_started(TIMEOUT_S)
        return crew

    return crew_of


def test_each_batch_has_one_outcome(employ: Callable[..., Crew]) -> None:
    crew = employ(Told(batches=[EncodeRefusedError("no"), EncoderDiedError("gone")]))
    for number, kind in enumerate((Refused, Lost, Encoded)):
        crew.submit([item(number)])
        (outcome,) = crew.outcomes(TIMEOUT_S)
        assert isinstance(outcome, kind)
        assert outcome.items[0].content_hash == bytes([number]) * 32
    assert (crew.num_restarts, crew.num_ready) == (1, 1)
    crew.close()


def test_an_encoder_that_fails_to_start_is_tried_again(employ: Callable[..., Crew]) -> None:
    told = Told(starts=[EngineError("not yet"), OSError("nor now")])
    crew = employ(told)
    crew.submit([item(1)])
    assert isinstance(crew.outcomes(TIMEOUT_S)[0], Encoded)
    assert (told.num_started, crew.num_restarts) == (1, 0), "failed starts are no restarts"
    crew.close()


def test_an_encoder_without_a_place_is_not_expected_and_comes_when_there_is_one(employ: Callable[..., Crew]) -> None:
    told = Told(starts=[NoPlaceError("no machine")])
    first_start = threading.Event()
    start = told.start

    def watched() -> None:
        if first_start.is_set():
            told.may_start.wait(TIMEOUT_S)
        else:
            told.may_start.clear()
            first_start.set()
            raise told.starts.pop(0)
        start()

    told.start = watched  # type: ignore[method-assign]
    crew = employ(told)
    assert (crew.num_ready, crew.num_starting) == (0, 0)
    told.may_start.set()
    crew.submit([item(1)])
    assert isinstance(crew.outcomes(TIMEOUT_S)[0], Encoded)
    crew.close()


def test_a_wrong_setting_is_raised_and_closes_the_crew(employ: Callable[..., Crew]) -> None:
    good, bad = Told(), Told(starts=[ConfigError("no such device")])
    with pytest.raises(ConfigError, match="no such device"):
        employ(good, bad)
    assert good.num_stopped
    assert not good.alive


def test_a_batch_that_no_encoder_has_begun_can_be_taken_back(employ: Callable[..., Crew]) -> None:
    told = Told()
    told.may_encode.clear()
    crew = employ(told)
    crew.submit([item(1)])
    assert told.encoding.wait(TIMEOUT_S)
    crew.submit([item(2)])
    assert [[i.content_hash for i in items] for items in crew.take_back()] == [[bytes([2]) * 32]]
    told.may_encode.set()
    assert len(crew.outcomes(TIMEOUT_S)) == 1
    crew.close()


def test_an_encoder_that_dies_without_work_is_replaced_before_its_next_batch(employ: Callable[..., Crew]) -> None:
    told = Told()
    crew = employ(told)
    told.alive = False
    crew.submit([item(1)])
    assert isinstance(crew.outcomes(TIMEOUT_S)[0], Encoded)
    assert (told.num_started, crew.num_restarts) == (2, 1)
    crew.close()


def test_closing_ends_an_encoder_at_work(employ: Callable[..., Crew]) -> None:
    told = Told()
    told.may_encode.clear()
    crew = employ(told)
    crew.submit([item(1)])
    assert told.encoding.wait(TIMEOUT_S)
    crew.close()
    assert not told.alive
    crew.close()
