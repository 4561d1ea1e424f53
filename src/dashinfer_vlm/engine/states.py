"""Seats of states, where layers keep one of each sequence: who runs in which, and what is saved in the others.

Every token changes a state, and none can be taken back. So before guesses are computed, a sequence's state is copied to
a second seat of its own: after a wrong one it goes on from there, and the tokens since then are computed once more
beside its next one.

And a prefix that others have computed is of use only where the state behind it was saved: copied, at the end of a
block, into a seat that nobody runs in, and found by the hash of that block. These are saved:
- of a prompt the one a few tokens before its end, since the next turn of a conversation may write those differently;
- where a prompt parts from the blocks that are known, if no state is saved there: what two prompts begin with, a third
  one will, too. For both the prompt is cut;
- of an answer the newest, in place of the one before.

Who runs comes first. Then a seat goes to whoever saves last: free ones are taken first, then those whose block is gone,
then the one that was of use longest ago.

Copies are only planned here. A runner makes them in this order before the rows of the next step, so that it does not
matter who has got a seat meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from dashinfer_vlm.engine.blocks import BlockHash, BlockPool
from dashinfer_vlm.engine.sequence import Sequence

MIN_SPARED = 64
"""Tokens that a saved state spares at least: to compute fewer costs little more than to cut a prompt for them."""
PROMPT_TAIL = 8
"""Tokens at the end of a prompt, at the least, that no state is saved behind: those with which the template begins an
answer may be missing in the next turn's prompt."""


@dataclass(slots=True)
class StateSeat:
    """A running sequence's."""

    index: int
    marks: tuple[int, ...]
    """Tokens of the prompt behind which its state is saved, ascending; the first are those that it began behind."""
    spare: int | None = None
    """Where its state waits while guesses are computed; None for a sequence that makes none."""
    num_behind: int = 0
    """Computed tokens that the state in `spare` has not seen, and that in `index` beside wrong guesses."""
    answer: BlockHash | None = None
    """What the newest state of its answer is saved under."""

    @property
    def seats(self) -> tuple[int, ...]:
        return (self.index,) if self.spare is None else (self.index, self.spare)


class States:
    """Owns `Sequence.state`. With 0 seats there are no states, and blocks alone say where a sequence can go on."""

    def __init__(self, num_seats: int, pool: BlockPool, block_size: int) -> None:
        self.num_seats = num_seats
        self.pool = pool
        self.block_size = block_size
        self._free = list(range(num_seats))[::-1]
        self._saved: OrderedDict[BlockHash, int] = OrderedDict()  # of use longest ago first
        self._copies: list[tuple[int, int]] = []

    def reach(self, sequence: Sequence, num_blocks: int) -> int:
        """Of its first `num_blocks` blocks, which are known: how many it can go on behind."""
        if not self.num_seats:
            return num_blocks
        return next((n for n in range(num_blocks, 0, -1) if self._key(sequence, n) in self._saved), 0)

    def admit(self, sequence: Sequence, num_known: int) -> None:
        """Give it a seat with the state behind its computed tokens; its first `num_known` blocks are known."""
        if not self.num_seats:
            return
        saved = self._find(sequence) if sequence.num_computed else None
        index = self._take()
        assert index is not None, "more sequences run than there are seats"
        if saved is not None:
            self._copy(saved, index)
        spare = None if sequence.drafter is None else self._take()
        assert (spare is None) == (sequence.drafter is None), "more sequences run than there are seats"
        sequence.state = StateSeat(index, self._marks(sequence, num_known), spare)

    def resume(self, sequence: Sequence) -> None:
        """It goes on behind more computed tokens than its own: bring its state there."""
        if sequence.state is not None:
            self._copy(self._find(sequence), sequence.seat)

    def leave(self, sequence: Sequence) -> None:
        if sequence.state is not None:
            self._free += sequence.state.seats
            sequence.state = None

    def next_stop(self, sequence: Sequence) -> int | None:
        """The tokens, more than are computed, behind which it could go on if others computed them. None: nowhere."""
        if sequence.state is None:
            stop = (sequence.num_computed // self.block_size + 1) * self.block_size
            return stop if stop < len(sequence.tokens) else None
        if not self._free and not self._saved:
            return None  # where would they save it?
        return next((mark for mark in sequence.state.marks if mark > sequence.num_computed), None)

    def longest_chunk(self, sequence: Sequence) -> int:
        """Tokens up to where its state is to be saved, or all."""
        stop = self.next_stop(sequence) if sequence.state is not None else None
        return sequence.num_uncomputed if stop is None else stop - sequence.num_computed

    def save(self, sequence: Sequence) -> None:
        """Before its next rows change it: save its state, if it is worth a seat here and there is one."""
        seat, num_tokens = sequence.state, sequence.num_published * self.block_size
        if seat is None or not self.pool.prefix_cache or not num_tokens or num_tokens != sequence.num_computed:
            return
        if seat.num_behind:
            return
        if num_tokens in seat.marks:
            self._save(sequence, in_place_of=None)
        elif sequence.is_decoding and num_tokens - seat.marks[-1] >= MIN_SPARED:
            seat.answer = self._save(sequence, in_place_of=seat.answer)

    def guard(self, sequence: Sequence, *, guesses: bool) -> None:
        """Before its next row and guesses change its state: keep what a wrong one would spoil, or take back what one
        has spoilt."""
        seat = sequence.state
        if seat is None or seat.spare is None:
            return
        if seat.num_behind:
            self._copy(seat.spare, seat.index)
        elif guesses:
            self._copy(seat.index, seat.spare)

    def catch_up(self, sequence: Sequence) -> None:
        """The rows that it has in a step bring its state to its newest token, or beyond, by guesses."""
        if sequence.state is not None:
            sequence.state.num_behind = 0

    def fall_behind(self, sequence: Sequence, start: int) -> None:
        """A guess was wrong beside its tokens from `start` on: it has the state before these."""
        if sequence.state is not None:
            sequence.state.num_behind = sequence.num_computed - start

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """From which seat, to which, since the last call."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Every seat is free, somebody's, or holds a saved state; for tests and idle moments."""
        taken = [seat for sequence in running if sequence.state is not None for seat in sequence.state.seats]
        seats = sorted([*self._free, *self._saved.values(), *taken])
        assert seats == list(range(self.num_seats)), (seats, "a seat is lost, or given twice")

    def _marks(self, sequence: Sequence, num_known: int) -> tuple[int, ...]:
        marks, size = [sequence.num_computed], self.block_size
        in_prompt = (sequence.num_prompt - PROMPT_TAIL) // size * size
        for mark in (min(num_known * size, in_prompt), in_prompt) if self.pool.prefix_cache else ():
            if mark - marks[-1] >= MIN_SPARED:
                marks.append(mark)
        return tuple(marks)

    def _save(self, sequence: Sequence, *, in_place_of: BlockHash | None) -> BlockHash | None:
        """What its newest state is saved under from now on; None: nowhere."""
        key = self._key(sequence, sequence.num_published)
        if key in self._saved:
            self._saved.move_to_end(key)
            return in_place_of
        index = self._saved.pop(in_place_of, None) if in_place_of is not None else None
        if index is None:
            index = self._take()
        if index is None:
            return None
        self._saved[key] = index
        self._copy(sequence.seat, index)
        return key

    def _find(self, sequence: Sequence) -> int:
        """Where the state behind its computed tokens is saved, which is of use now."""
        key = self._key(sequence, sequence.num_computed // self.block_size)
        self._saved.move_to_end(key)
        return self._saved[key]

    def _take(self) -> int | None:
        """A seat that nobody runs in; what was saved there is lost. None: there is none."""
        if self._free:
            return self._free.pop()
        if not self._saved:
            return None
        without_block = (key for key in self._saved if self.pool.find(key) is None)
        return self._saved.pop(next(without_block, next(iter(self._saved))))

    def _copy(self, source: int, target: int) -> None:
        if source != target:  # who takes the only seat that is left may take that of the state which it goes on from
            self._copies.append((source, target))

    def _key(self, sequence: Sequence, num_blocks: int) -> BlockHash:
        return sequence.block_hash(num_blocks - 1, self.block_size)
