"""A model with states in two processes: each has those of its own heads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.engine.parallel.crew import RankProcesses
from dashinfer_vlm.errors import EngineDeadError
from dashinfer_vlm.models.loading import load_model
from tests.conftest import CheckpointMaker
from tests.engine.parallel.test_ranks import NAMES, config_of
from tests.engine.test_parity import Family, mixed_prompts, run


@pytest.mark.parametrize("arch", ["qwen3_5", "qwen3_5_moe"])
def test_states_are_dealt_out_by_heads(checkpoint: CheckpointMaker, arch: str) -> None:
    """And saved by both ranks: a second turn goes on behind the first one's."""
    folder = checkpoint(arch)
    family = Family(folder, None, load_model(config_of(folder, 1)))
    prompts = mixed_prompts(family)
    requests = [family.request(name, prompts[name], max_tokens=8) for name in NAMES]
    first = family.request("first", family.prompt(150), max_tokens=4)
    alone, _ = load_engine(config_of(folder, 1), lambda *_: None)
    shared, _ = load_engine(config_of(folder, 2), lambda *_: None)
    try:
        assert 2 * shared.model.text.state_bytes == alone.model.text.state_bytes
        assert run(shared, *requests) == run(alone, *requests)
        said = run(alone, first)
        assert run(shared, first) == said
        ids = [*first.prompt_ids, *said["first"], *range(20)]
        second = replace(first, id="second", prompt_ids=ids)
        assert run(shared, second) == run(alone, second)
        assert shared.stats().num_cached_tokens_total >= 128
    finally:
        shared.close()


def test_a_rank_that_is_killed_while_streams_run_is_named(checkpoint: CheckpointMaker) -> None:
    """The first one fails at what they have begun together, and would blame itself."""
    folder = checkpoint("qwen3_5")
    shared, _ = load_engine(config_of(folder, 2), lambda *_: None)
    try:
        family = Family(folder, None, shared.model)
        shared.add(family.request("a", family.prompt(9), max_tokens=64))
        shared.step()
        processes = shared._followers
        assert isinstance(processes, RankProcesses)
        processes._processes[1].kill()
        with pytest.raises(EngineDeadError, match="rank 1 of the model was killed by signal SIGKILL"):
            run(shared)
    finally:
        shared.close()
