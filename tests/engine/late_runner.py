"""A runner as a card would be one, without a card: tokens come back one step late.

It computes and samples in `start`, reads the values of PENDING tokens from where the step before has left them, and
lets nobody see them before the next step was started.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.engine.runner import DoneStep, Runner
from dashinfer_vlm.engine.sampler import Sampled
from dashinfer_vlm.engine.sequence import PENDING, Sequence
from dashinfer_vlm.engine.steps import Chunk, Plan
from dashinfer_vlm.models.base import KVCache, Model, StepBatch
from dashinfer_vlm.request import TokenLogprob


@dataclass
class LateStep:
    done: DoneStep
    is_landed: bool = False

    @property
    def plan(self) -> Plan:
        return self.done.plan

    def resume(self) -> None:
        pass

    def sampled(self) -> list[list[Sampled]]:
        assert not self.is_landed, "a flight lands once"
        self.is_landed = True
        return self.done.sampled()

    def scores(self) -> list[list[TokenLogprob]]:
        assert self.is_landed
        return self.done.scores()

    def vectors(self) -> list[bytes]:
        assert self.is_landed
        return self.done.vectors()

    def seconds(self) -> float:
        assert self.is_landed
        return self.done.seconds()

    def sampling_seconds(self) -> float:
        assert self.is_landed
        return self.done.sampling_seconds()


class LateRunner(Runner):
    depth = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._newest: dict[Sequence, int] = {}
        self._flights: list[LateStep] = []
        self.num_pending = 0
        """Rows whose token nobody but this runner knew."""

    def start(self, plan: Plan) -> LateStep:  # type: ignore[override]
        self._flights = [flight for flight in self._flights if not flight.is_landed]
        assert len(self._flights) <= self.depth
        done = super().start(plan)
        chosen = zip(plan.sampled_chunks, done.sampled(), strict=True)
        self._newest = {chunk.sequence: max(0, rows[0].token) for chunk, rows in chosen}
        self._flights.append(LateStep(done))
        return self._flights[-1]

    def forget(self, sequence: Sequence) -> None:
        self._newest.pop(sequence, None)
        self._flights = [flight for flight in self._flights if not flight.is_landed]

    def batch(self, chunks: tuple[Chunk, ...]) -> StepBatch:
        batch = super().batch(chunks)
        starts = [0, *accumulate(chunk.num_rows for chunk in chunks)]
        for row, chunk in zip(starts, chunks, strict=False):
            if chunk.sequence.tokens[chunk.start] == PENDING:
                assert chunk.num_rows == 1
                batch.ids[row] = self._newest[chunk.sequence]
                self.num_pending += 1
        return batch


def make_late_runner(
    model: Model, kv: KVCache, embeddings: EmbeddingCache, config: EngineConfig, followers: None = None
) -> LateRunner:
    """In place of `devices.make_runner`."""
    return LateRunner(model, kv, embeddings)
