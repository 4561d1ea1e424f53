"""What a step is: what the scheduler plans, what a runner starts, and what comes back of it, at once or a step later.

`Engine.step` starts a step and settles an older one. How many may be under way is for the runner to say: none on the
CPU, which computes while it is asked; one on a card, which works while the next step is planned. What a plan may
assume:

- Steps run in the order in which they were started. Whoever reads what another step writes was started later.
- A token that a step will give is owed to its sequence as soon as the step is started (`Sequence.owe`): it has a place,
  its value is PENDING. The next plan counts with it, and the runner knows where its value will be.
- The sequence may end while its step is under way: at a stop that nobody could foresee, or because the client has
  left. What comes back for it is thrown away, and its blocks may belong to others by then, who write them later.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import msgspec
import numpy as np
from torch import Tensor

from dashinfer_vlm.engine.sampler import Sampled
from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.models.base import KVCache
from dashinfer_vlm.request import TokenLogprob


class Chunk(msgspec.Struct, frozen=True):  # quick to make: every stream has one in every step
    """`num_tokens` tokens of a sequence, from `start` on, and guesses of what follows them."""

    sequence: Sequence
    start: int
    """`sequence.num_computed` when the chunk was cut, or `num_again` tokens before."""
    num_tokens: int
    num_logits: int
    """Rows whose logits are wanted, the last ones: of the newest token, and of each guess. 0 inside a prompt."""
    num_rows: int
    """Rows of the model call, guesses included."""
    draft: tuple[int, ...] = ()
    scored: range = range(0)
    """Tokens of the prompt whose log probabilities are wanted; the row before each one gives them."""
    gives_vector: bool = False
    """Whether its last row gives the vector that its sequence wants in place of tokens."""
    num_again: int = 0
    """The first of `num_tokens`, which were computed before: its state has yet to see them."""

    @classmethod
    def of(cls, sequence: Sequence, num_new: int, draft: tuple[int, ...] = ()) -> Chunk:
        """The next `num_new` tokens that are not computed. Cut it now: the mark of the sequence moves on as soon as the
        step is started."""
        is_last, wants_vector = num_new == sequence.num_uncomputed, sequence.request.wants_vector
        wanted = 1 + len(draft) if is_last and not wants_vector else 0
        num_again = sequence.num_behind
        start, num_tokens = sequence.num_computed - num_again, num_again + num_new
        scored = sequence.unscored(start + 1, start + num_tokens + 1)
        num_rows = num_tokens + len(draft)
        return cls(sequence, start, num_tokens, wanted, num_rows, draft, scored, is_last and wants_vector, num_again)

    @property
    def is_decode(self) -> bool:
        """Whether it is a stream's next token, not a part of a prompt or of what is computed after a preemption."""
        return self.num_tokens == 1 + self.num_again and self.start >= self.sequence.num_prompt


@dataclass(frozen=True)  # no slots: what is asked of it several times in a step is counted once
class Plan:
    """One step: chunks for one model call, and seconds for the encoder (None: it has nothing to do)."""

    chunks: tuple[Chunk, ...]
    encoder_s: float | None
    copies: tuple[tuple[int, int], ...] = ()
    """From which seat to which a state is copied, one after the other, before the model call; none without chunks."""

    @cached_property
    def num_tokens(self) -> int:
        """Rows of the model call."""
        return sum(chunk.num_rows for chunk in self.chunks)

    @cached_property
    def num_decode_rows(self) -> int:
        """Of the streams, their guesses among them."""
        return sum(chunk.num_rows for chunk in self.chunks if chunk.is_decode)

    @cached_property
    def sampled_chunks(self) -> list[Chunk]:
        """Those that end in a row whose logits are wanted."""
        return [chunk for chunk in self.chunks if chunk.num_logits]

    @cached_property
    def scored_chunks(self) -> list[Chunk]:
        """Those with tokens of a prompt whose log probabilities are wanted."""
        return [chunk for chunk in self.chunks if chunk.scored]

    @cached_property
    def num_scored(self) -> int:
        """Tokens of prompts whose log probabilities are wanted."""
        return sum(len(chunk.scored) for chunk in self.chunks)

    @cached_property
    def num_logits(self) -> int:
        """Rows whose logits are wanted, for tokens or for what is told of prompts."""
        return sum(chunk.num_logits for chunk in self.chunks) + self.num_scored

    @cached_property
    def vector_chunks(self) -> list[Chunk]:
        """Those that end in a row that gives a vector."""
        return [chunk for chunk in self.chunks if chunk.gives_vector]


def vectors_of(rows: Tensor) -> list[bytes]:
    """float32 [vectors, size], on the host, as `Output.vector` has them; nothing of a row that is not all
    numbers."""
    values = rows.numpy()
    return [row.astype("<f4").tobytes() if np.isfinite(row).all() else b"" for row in values]


class Flight(Protocol):
    """A step that was started."""

    @property
    def plan(self) -> Plan: ...

    def resume(self) -> None:
        """Go on with what has waited for the values of older tokens, all of which are known now; `sampled` does so
        itself. Raises what goes wrong."""
        ...

    def sampled(self) -> list[list[Sampled]]:
        """For each of the plan's `sampled_chunks` its `num_logits` tokens, as `Sampler.sample` gives them. Waits until
        they are here; called once. Raises what the step has failed with."""
        ...

    def scores(self) -> list[list[TokenLogprob]]:
        """For each of the plan's `scored_chunks` what is told of its `scored` tokens. Asked after `sampled`."""
        ...

    def vectors(self) -> list[bytes]:
        """For each of the plan's `vector_chunks` what `vectors_of` makes of its last row. Asked after `sampled`."""
        ...

    def seconds(self) -> float:
        """How long the step kept the device busy, from the model call to the tokens. Asked after `sampled`."""
        ...

    def sampling_seconds(self) -> float:
        """How much of `seconds` the choice of tokens took; 0 where it is not timed apart. Asked after `sampled`."""
        ...


class StepRunner(Protocol):
    """Computes steps. It owns the KV cache's tensors and knows the model; it knows nothing of queues."""

    @property
    def kv(self) -> KVCache: ...

    @property
    def depth(self) -> int:
        """Steps that may be under way while the next one is planned and started. With 0 nothing is ever PENDING."""
        ...

    def start(self, plan: Plan) -> Flight:
        """Begin the model call of a plan that has chunks, and the sampling behind it. The plan's copies are made
        first, whatever fails then.

        Called before the plan's tokens are owed: `num_output` of a sequence is the place of the token that is chosen
        first, owed ones counted. Where `Sequence.tokens` has PENDING at a row of a chunk, the value is the token that
        the flight before this one chooses for the sequence, or any id of the vocabulary where that one has a problem.
        What is read of a sequence is read before this returns.
        """
        ...

    def needs_tokens(self, sequence: Sequence) -> bool:
        """Whether a step of the sequence cannot be started while a token of it is PENDING, because of something that
        the host must work out from its value. Such steps wait for the one before."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """It has ended, whatever is under way for it: keep nothing of it, which may hold pictures."""
        ...
