"""A real Ray cluster of two lent machines, all on this one: the same answers, whatever happens to the machines."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from dashinfer_vlm.cli.command import execute
from dashinfer_vlm.cli.tool import tool
from dashinfer_vlm.encoders.elsewhere.stage import WorkerEncoder
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.request import Request, SamplingParams
from tests.conftest import CheckpointMaker
from tests.encoders.asking import Answers, loaded, picture, request, run
from tests.encoders.cluster.nodes import Cluster, Node, is_alive
from tests.models import qwen3_vl

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs pip install 'dashinfer-vlm[cluster]'"),
]

NUM_REQUESTS = 50
PATIENCE_S = 180.0


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen2_vl")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Answers:
    """The 50 requests, encoded in the step."""
    with loaded(folder) as engine:
        return run(engine, [request(folder, str(i), picture(i)) for i in range(NUM_REQUESTS)])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture
def nodes(cluster: Cluster) -> list[Node]:
    """Two lent machines."""
    while sum(node.is_there for node in cluster.nodes) < 2:
        cluster.join()
    return [node for node in cluster.nodes if node.is_there]


def stage_of(engine: Engine) -> WorkerEncoder:
    assert isinstance(engine.stage, WorkerEncoder)
    return engine.stage


def serve_until(engine: Engine, folder: Path, *, num_ready: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while stage_of(engine).crew.num_ready != num_ready:
        assert time.monotonic() < deadline, f"{stage_of(engine).crew.num_ready} encoders are ready, not {num_ready}"
        run(engine, [request(folder, "again", picture(0))])


def test_two_machines_give_the_same_tokens_as_the_step(
    cluster: Cluster, nodes: list[Node], folder: Path, expected: Answers
) -> None:
    with loaded(folder, vision_workers=2, cluster=cluster.address) as engine:
        serve_until(engine, folder, num_ready=2)
        assert [len(node.actors) for node in nodes] == [1, 1]
        before = stage_of(engine).own.seconds
        assert run(engine, [request(folder, str(i), picture(i)) for i in range(NUM_REQUESTS)]) == expected
        assert stage_of(engine).own.seconds == before, "the engine encoded itself"
        assert engine.stats().num_encoder_retries_total == 0


def test_videos_of_qwen3_vl_come_whole_from_another_machine(
    cluster: Cluster, nodes: list[Node], checkpoint: CheckpointMaker
) -> None:
    folder = checkpoint("qwen3_vl")
    cases = {name: qwen3_vl.prompt(folder, *parts) for name, parts in qwen3_vl.CASES.items()}
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    requests = [Request(id=name, prompt_ids=case.ids, items=case.items, params=params) for name, case in cases.items()]
    with loaded(folder) as engine:
        in_step = run(engine, requests)
    with loaded(folder, vision_workers=1, cluster=cluster.address, prefix_cache=False, vision_cache_gib=0.0) as engine:
        while stage_of(engine).crew.num_ready == 0:
            run(engine, requests)
        before = stage_of(engine).own.seconds
        assert run(engine, requests) == in_step
        assert stage_of(engine).own.seconds == before, "the engine encoded itself"


def test_a_machine_killed_under_fifty_requests_costs_no_answer_and_another_takes_its_place(
    cluster: Cluster, nodes: list[Node], folder: Path, expected: Answers
) -> None:
    with loaded(folder, vision_workers=2, cluster=cluster.address) as engine:
        serve_until(engine, folder, num_ready=2)
        (actor,) = nodes[0].actors
        os.kill(actor, signal.SIGSTOP)  # so that it surely holds a batch when it dies
        already, stage, victims = stage_of(engine).stats.num_items_encoded_total, stage_of(engine), [nodes[0]]

        def kill_once_the_other_is_through() -> None:
            if victims and stage.stats.num_items_encoded_total > already:
                victims.pop().kill()

        requests = [request(folder, str(i), picture(i)) for i in range(NUM_REQUESTS)]
        start = time.monotonic()
        assert run(engine, requests, after_step=kill_once_the_other_is_through) == expected
        assert time.monotonic() - start < PATIENCE_S
        assert not victims
        assert engine.stats().num_encoder_retries_total > 0
        assert engine.stats().num_encoder_failures_total == 0
        cluster.join()
        serve_until(engine, folder, num_ready=2)
        assert engine.stats().num_encoder_restarts_total >= 1


def test_when_all_machines_leave_the_engine_encodes_itself(
    cluster: Cluster, nodes: list[Node], folder: Path, expected: Answers
) -> None:
    with loaded(folder, vision_workers=1, cluster=cluster.address) as engine:
        serve_until(engine, folder, num_ready=1)
        left = [pid for node in nodes for pid in node.leave()]
        requests = [request(folder, str(i), picture(i)) for i in range(12)]
        assert run(engine, requests).tokens == {r.id: expected.tokens[r.id] for r in requests}
    assert [pid for pid in left if is_alive(pid)] == []


def test_an_address_without_a_cluster_is_a_wrong_setting(folder: Path) -> None:
    with (
        pytest.raises(ConfigError, match="nothing answers at"),
        loaded(folder, vision_workers=1, cluster="127.0.0.1:9"),
    ):
        pass


def test_joining_where_nobody_listens_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(tool, ["encoder", "--join", "127.0.0.1:9"]) == 2
    error = capsys.readouterr().err
    assert "nothing answers at 127.0.0.1:9" in error
    assert error.count("\n") == 1
