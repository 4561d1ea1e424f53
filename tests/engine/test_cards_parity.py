"""Real models through the runner for cards: in float32 the greedy tokens of the runner for processors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine import engine as engine_module
from dashinfer_vlm.engine.devices import make_runner
from dashinfer_vlm.layers.backend import Backend, choose_backend
from dashinfer_vlm.layers.card_backend import on_card
from dashinfer_vlm.layers.ops import REFERENCE
from dashinfer_vlm.models import loading
from tests.conftest import CheckpointMaker
from tests.engine.card_runner import make_card_runner
from tests.engine.test_parity import Family, Prompt, mixed_prompts, picture, run


def answers(
    family: Family, runner: object, names: tuple[str, ...], num_tokens: int, **options: object
) -> dict[str, list[int]]:
    prompts = mixed_prompts(family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "make_runner", runner)
        engine = family.engine(max_num_batched_tokens=48, **options)
        requests = [family.request(name, prompts[name], max_tokens=num_tokens) for name in names]
        return run(engine, *requests)


def make_family(checkpoint: CheckpointMaker, arch: str) -> Family:
    folder = checkpoint(arch)
    return Family(folder, None, loading.load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu")))


def plain_torch(*args: Any) -> Backend:
    """The kernels for processors insist that every row has an owner; torch's and a card's do not."""
    return replace(choose_backend(*args), ops=REFERENCE)


def kernels_for_cards(*args: Any) -> Backend:
    return on_card(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("arch", "backend", "num_tokens", "max_model_len"),
    [
        ("qwen2_vl", plain_torch, 12, 2048),
        ("qwen2_5_vl", plain_torch, 12, 2048),
        ("qwen3_vl", plain_torch, 12, 2048),
        ("qwen3_5", plain_torch, 12, 2048),
        ("qwen2_vl", kernels_for_cards, 4, 256),  # interpreted, each further part of a context takes its time
        pytest.param("qwen3_vl", kernels_for_cards, 12, 2048, marks=pytest.mark.slow),
        pytest.param("qwen3_5", kernels_for_cards, 4, 256, marks=pytest.mark.slow),
    ],
)
def test_padding_and_seats_change_no_token(
    checkpoint: CheckpointMaker,
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
    backend: Callable[..., Backend],
    num_tokens: int,
    max_model_len: int,
) -> None:
    names = ("text0", "text2", "one1", "two0") if backend is plain_torch else ("text0", "one0")
    if backend is kernels_for_cards:
        pytest.importorskip("triton")
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy, which interprets, reports what a card does not
    ask = partial(answers, names=names, num_tokens=num_tokens, max_model_len=max_model_len)
    want = ask(make_family(checkpoint, arch), make_runner)
    assert all(len(tokens) == num_tokens for tokens in want.values())
    monkeypatch.setattr(loading, "choose_backend", backend)
    family = make_family(checkpoint, arch)
    assert ask(family, make_card_runner) == want
    if backend is plain_torch:
        assert ask(family, make_card_runner, max_num_seqs=2) == want


@pytest.mark.parametrize("arch", ["qwen3_5", "qwen3_5_moe"])
def test_states_of_who_is_preempted_begin_again(
    checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    """In fewer seats than sequences, which are given to the next ones while older steps are under way."""
    names = ("text0", "text1", "text2", "one0")
    want = answers(make_family(checkpoint, arch), make_runner, names, 60)
    monkeypatch.setattr(loading, "choose_backend", plain_torch)
    monkeypatch.setattr(engine_module, "make_runner", make_card_runner)
    family = make_family(checkpoint, arch)
    for options, preempts in (({"max_num_seqs": 2}, False), ({"max_model_len": 144, "num_blocks": 10}, True)):
        engine, prompts = family.engine(**options), mixed_prompts(family)
        got = run(engine, *(family.request(name, prompts[name], max_tokens=60) for name in names))
        assert got == want
        assert (engine.stats().num_preemptions_total > 0) == preempts


def test_the_next_turn_goes_on_from_a_saved_state(checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def turns(family: Family, runner: object, **options: Any) -> tuple[list[int], list[int], int]:
        """Both answers, and how many tokens were found."""
        first = family.prompt(4, picture(320, 256), 30)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "make_runner", runner)
            engine = family.engine(**options)
        answer = run(engine, family.request("a", first, max_tokens=70))["a"]
        second = Prompt(first.ids + answer + family.prompt(9).ids, first.pictures)
        return answer, run(engine, family.request("b", second))["b"], engine.stats().num_cached_tokens_total

    *want, _ = turns(make_family(checkpoint, "qwen3_5"), make_runner, prefix_cache=False)
    monkeypatch.setattr(loading, "choose_backend", plain_torch)
    *got, num_found = turns(make_family(checkpoint, "qwen3_5"), make_card_runner)
    assert got == want
    assert num_found > 160, "behind the picture, and behind most of the answer"
