"""Decides what each step does: decode first, then what the oldest requests need, prefill or encoding.

Order of side effects in `schedule()`:
1. every decoding sequence gets a block for its next token; when none is free, the last in rank is preempted: the
   youngest of those whose `priority` is the highest number;
2. waiting sequences are admitted, tenants in turns and each one's by rank, the oldest of the lowest number first
   (`waiting.py`), while sequences, blocks and embeddings fit: blocks for the whole prompt are taken, prefixes shared,
   where layers keep states as far as one is saved (`states.py`), and the encoder is asked for the items that are still
   needed;
3. decoding sequences that can guess what comes next (`drafts.py`) get as many guesses as are expected to pay;
4. chunks are cut for admitted sequences, by rank, up to their first item without an embedding, or to where their state
   is to be saved;
5. what is left of the step's time goes to the encoder; after a step with prefill, while anything decodes, the whole
   extra time does: no step pays for both, and neither waits for the end of the other's queue.

While anything decodes, the extra work of a step is limited to a share of what the decode itself costs: every stream's
gap between tokens grows by that share at most (`share.py` has a rule for each `--schedule`). Guesses are not part of
that share: each is expected to shorten the time per token of all streams together.
"""

from __future__ import annotations

from bisect import bisect_right

from dashinfer_vlm.encoders.stage import EncoderStage
from dashinfer_vlm.engine.blocks import BlockPool
from dashinfer_vlm.engine.cost import StepCost
from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.engine.share import Share
from dashinfer_vlm.engine.states import States
from dashinfer_vlm.engine.steps import Chunk, Plan
from dashinfer_vlm.engine.waiting import WaitingLine
from dashinfer_vlm.engine.wanted import WantedItems

FAR_S = 1.0
"""Prefill of this many seconds, or an item to be encoded, makes a request a far one; less makes it partly a near one.
"""
MOST_BEHIND = 8
"""Tokens that a sequence computes again beside new guesses; with more it makes none before its state has seen them."""
MAX_SCORED_ROWS = 128
"""Of one step: rows of prompts whose log probabilities are wanted. Each has a logit for every word."""
IDLE_STEP_S = 0.5
"""Encoder time of a step in which nothing decodes: long enough to be efficient, short enough to notice arrivals."""


class Scheduler:
    """Owns which sequences wait and which run, and every change of their blocks."""

    def __init__(
        self,
        *,
        pool: BlockPool,
        block_size: int,
        stage: EncoderStage,
        cost: StepCost,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        share: Share,
        max_pinned_tokens: int = 1 << 62,
        num_seats: int = 0,
    ) -> None:
        """`max_pinned_tokens` bounds the visual tokens that running sequences wait for or have yet to compute;
        `num_seats` are for states, at least `max_num_seqs` where the model has some."""
        self.pool = pool
        self.block_size = block_size
        self.stage = stage
        self.cost = cost
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.share = share
        self.wanted = WantedItems(stage, max_pinned_tokens)
        self.states = States(num_seats, pool, block_size)
        self.waiting = WaitingLine()
        self.running: list[Sequence] = []  # by rank
        self.num_preemptions = 0
        self._encoder_is_next = False

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def schedule(self) -> Plan:
        decoding = self._make_room_for_decode()
        self._admit()
        extra_s = self._extra_seconds(len(decoding))
        chunks = self._decode_chunks(decoding)
        if extra_s is not None and self._encoder_is_next and self.stage.computes_here:
            self._encoder_is_next = False
            return self._plan(chunks, extra_s)
        prefill = self._prefill_chunks(sum(c.num_rows for c in chunks), extra_s)
        self._encoder_is_next = bool(prefill) and self.stage.computes_here
        if not self.stage.has_work():
            return self._plan(chunks + prefill, None)
        if extra_s is None:
            return self._plan(chunks + prefill, IDLE_STEP_S)
        added_s = self.cost.more(sum(c.num_rows for c in chunks), sum(c.num_tokens for c in prefill))
        return self._plan(chunks + prefill, max(0.0, extra_s - added_s))

    def _plan(self, chunks: list[Chunk], encoder_s: float | None) -> Plan:
        """States are copied with the next rows that are computed."""
        return Plan(tuple(chunks), encoder_s, self.states.take_copies() if chunks else ())

    def started(self, plan: Plan) -> None:
        """The plan's rows are computed, or will be before anything that is started from now on: its tokens are owed."""
        for chunk in plan.chunks:
            self.states.catch_up(chunk.sequence)
            self.computed(chunk.sequence, chunk.num_tokens - chunk.num_again)
            chunk.sequence.num_scored += len(chunk.scored)
            if chunk.num_logits:
                chunk.sequence.owe()
                self.waiting.charge(chunk.sequence, 1)

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """K and V of the sequence's next `num_tokens` tokens are in the cache, or on their way there: publish full
        blocks, let go of items that are behind. A guess counts once it has become a token: until then its slots may be
        written again."""
        sequence.num_computed += num_tokens
        self.publish(sequence)
        self.wanted.release(sequence, computed=sequence.num_computed)

    def publish(self, sequence: Sequence) -> None:
        """Let others find the full blocks whose tokens are all known."""
        num_full = min(sequence.num_computed, sequence.num_known) // self.block_size
        while sequence.num_published < num_full:
            index = sequence.num_published
            self.pool.register(sequence.blocks[index], sequence.block_hash(index, self.block_size))
            sequence.num_published += 1

    def needs_tokens(self) -> bool:
        """Whether the next plan depends on the values of tokens that are still owed: who must be preempted computes
        its tokens again, and guesses follow the newest ones."""
        return self.pool.num_free < len(self.running) or any(s.drafter is not None for s in self.running)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and free all it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_up_resources(sequence)
        else:
            self.waiting.remove(sequence)

    def check_integrity(self) -> None:
        """Blocks are accounted for exactly; for tests and idle moments."""
        self.pool.check_integrity()
        self.states.check_integrity(self.running)
        assert not self.running or all(s.num_computed <= len(s.blocks) * self.block_size for s in self.running)
        assert not any(s.blocks or s.state for s in self.waiting), "a waiting sequence holds blocks, or a seat"
        if not self.running:
            assert self.pool.num_free == self.pool.num_blocks, "blocks leaked"
            assert not self.wanted, "items leaked"

    # Decode

    def _make_room_for_decode(self) -> list[Sequence]:
        decoding = [s for s in self.running if s.is_decoding and s.num_output < s.max_tokens]
        num_running = len(self.running)
        for sequence in decoding:
            while len(sequence.blocks) * self.block_size < len(sequence.tokens) and sequence in self.running:
                if self.pool.num_free:
                    sequence.blocks += self.pool.allocate(1)
                else:
                    self._preempt(self.running[-1])
        if len(self.running) == num_running:
            return decoding
        return [sequence for sequence in decoding if sequence in self.running]

    def _decode_chunks(self, decoding: list[Sequence]) -> list[Chunk]:
        """The newest token of each sequence, and guesses, the likeliest first, while each is expected to pay: while its
        chance to give a token, per second of its row, is above what the step gives per second without it.

        Half of the rows are left to prompts. Where layers keep states, all rows of a wrong guess are computed again in
        the next step, which has one more for every sequence that runs.
        """
        drafts: list[list[int]] = [[] for _ in decoding]
        num_rows, num_expected = sum(1 + s.num_behind for s in decoding), float(len(decoding))
        most_rows = num_rows + (self.max_num_batched_tokens - num_rows) // 2
        if self.states.num_seats:
            most_rows = min(most_rows, self.max_num_batched_tokens - len(self.running))
        for chance, index, token in self._guesses(decoding):
            if num_rows >= most_rows or chance * self.cost.of(num_rows) <= num_expected * self.cost.more(num_rows, 1):
                break
            if self._has_slot(decoding[index], len(drafts[index])):
                drafts[index].append(token)
                num_rows += 1
                num_expected += chance
        for sequence, draft in zip(decoding, drafts, strict=True):
            self.states.save(sequence)
            self.states.guard(sequence, guesses=bool(draft))
        return [Chunk.of(sequence, 1, tuple(draft)) for sequence, draft in zip(decoding, drafts, strict=True)]

    def _guesses(self, decoding: list[Sequence]) -> list[tuple[float, int, int]]:
        """Chance, index of the sequence, token: the likeliest first, those of one sequence in order."""
        found = []
        for index, sequence in enumerate(decoding):
            if (drafter := sequence.drafter) is not None and sequence.num_behind <= MOST_BEHIND:
                num_useful = sequence.max_tokens - sequence.num_output - 1
                guess = drafter.propose(sequence.tokens, min(num_useful, drafter.settings.num_speculative_tokens))
                if guess and sequence.matcher is not None:
                    guess = guess[: sequence.matcher.num_allowed(guess)]
                found += [(drafter.chance ** (place + 1), index, token) for place, token in enumerate(guess)]
        return sorted(found, key=lambda guess: -guess[0])

    def _has_slot(self, sequence: Sequence, place: int) -> bool:
        """Whether K and V of the guess at `place` have where to go. A block is taken for it only while every running
        sequence could get one too; it stays, since the sequence will need it soon."""
        if len(sequence.tokens) + place < len(sequence.blocks) * self.block_size:
            return True
        if self.pool.num_free <= len(self.running):
            return False
        sequence.blocks += self.pool.allocate(1)
        return True

    def begin_again(self, plan: Plan) -> None:
        """The plan's step has failed on its way: states may have seen rows of it, which they must not see twice. Its
        sequences owe no tokens."""
        for chunk in reversed(plan.chunks):
            if chunk.sequence.finish is None:
                self._preempt(chunk.sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Give its blocks to those before it; its tokens stay and are computed again when there is room."""
        assert not sequence.num_owed, "a token that nobody knows cannot be computed again"
        self.running.remove(sequence)
        self._give_up_resources(sequence)
        self.waiting.put_back(sequence)
        self.num_preemptions += 1

    def _give_up_resources(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        self.states.leave(sequence)
        sequence.blocks = []
        sequence.num_computed = sequence.num_published = 0
        self.wanted.release(sequence, computed=None)

    # Admission

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.first()
            if not self._try_admit(sequence):
                break
            self.waiting.remove(sequence)
            place = bisect_right(self.running, sequence.priority, key=lambda running: running.priority)
            self.running.insert(place, sequence)  # behind those of its own priority: they are older

    def _try_admit(self, sequence: Sequence) -> bool:
        known = self._find_prefix(sequence)
        for block in known:
            self.pool.share(block)
        shared = known[: self.states.reach(sequence, len(known))]
        self.pool.release(known[len(shared) :])  # to be computed again, and kept: there the state will be saved
        needed = -(-len(sequence.tokens) // self.block_size) - len(shared)
        reserve = len(self.running)  # a block for each: who is admitted without it is preempted at once
        wanted = sequence.items_to_encode(behind=len(shared) * self.block_size)
        if needed + reserve > self.pool.num_free or not self.wanted.fit(wanted):
            self.pool.release(shared)
            return False
        sequence.blocks = shared + self.pool.allocate(needed)
        sequence.num_computed, sequence.num_published = len(shared) * self.block_size, len(shared)
        self.states.admit(sequence, len(known))
        if not sequence.has_begun:  # what it computes again after a preemption is nobody's gift, and was paid for
            sequence.num_cached = sequence.num_computed
            self.waiting.charge(sequence, sequence.num_uncomputed + sum(item.num_rows for item in wanted))
        self.wanted.request(sequence, wanted)
        return True

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks from the start; at least one token is left to compute, since its logits are wanted."""
        if not sequence.is_scored:
            return []
        return self._find_blocks(sequence, 0, (len(sequence.tokens) - 1) // self.block_size)

    def _find_blocks(self, sequence: Sequence, first: int, end: int) -> list[int]:
        """Cached blocks from its block `first` on, up to one that is missing."""
        found: list[int] = []
        for index in range(first, end):
            block = self.pool.find(sequence.block_hash(index, self.block_size))
            if block is None:
                break
            found.append(block)
        return found

    # Prefill

    def _extra_seconds(self, num_decoding: int) -> float | None:
        """Seconds that prefill and encoding may add to this step; None means no limit, since no stream is waiting."""
        if not num_decoding:
            return None
        distances = [self._distance(sequence) for sequence in self.running if not sequence.is_decoding]
        num_far = sum(distances) + len(self.waiting)
        return self.share(num_far, len(distances) - sum(distances), num_decoding) * self.cost.of(num_decoding)

    def _distance(self, sequence: Sequence) -> float:
        """How far a running sequence is from decoding: from 0, near, to 1."""
        num_ready = self.wanted.num_ready(sequence)
        return 1.0 if num_ready < sequence.num_uncomputed else min(1.0, num_ready * self.cost.token_s / FAR_S)

    def _prefill_chunks(self, num_rows: int, extra_s: float | None) -> list[Chunk]:
        """Chunks that join a step of `num_rows` rows."""
        budget = self.max_num_batched_tokens - num_rows
        if extra_s is not None:
            budget = min(budget, max(1, self.cost.joining_in(extra_s, num_rows)))
        chunks: list[Chunk] = []
        in_this_step: set[bytes] = set()
        scored_left = MAX_SCORED_ROWS
        for sequence in self.running:
            if budget <= 0:
                break
            if sequence.is_decoding:
                continue
            self.states.save(sequence)
            if not self._catch_up(sequence, in_this_step):
                continue
            num_tokens = min(budget, self.wanted.num_ready(sequence), self.states.longest_chunk(sequence))
            if not sequence.is_scored:
                num_tokens = min(num_tokens, scored_left)
                scored_left -= num_tokens
            if num_tokens:
                sequence.begin()
                chunks.append(Chunk.of(sequence, num_tokens))
                budget -= num_tokens
        return chunks

    def _catch_up(self, sequence: Sequence, in_this_step: set[bytes]) -> bool:
        """Share blocks that others computed since admission. False: what it would compute next is being computed in
        this very step by another sequence, so that waiting one step is cheaper than doing it twice."""
        if not self.pool.prefix_cache or not sequence.is_scored:  # nothing is found, or its own rows are wanted
            return True
        size = self.block_size
        while (stop := self.states.next_stop(sequence)) is not None:
            first, end = sequence.num_computed // size, stop // size
            found = self._find_blocks(sequence, first, end)
            is_there = len(found) == end - first and self.states.reach(sequence, end) == end
            if not is_there or found[0] == sequence.blocks[first]:
                block_hash = sequence.block_hash(end - 1, size)
                if block_hash in in_this_step:
                    return False
                in_this_step.add(block_hash)
                return True
            for block in found:
                self.pool.share(block)
            self.pool.release(sequence.blocks[first:end])
            sequence.blocks[first:end] = found
            if not sequence.num_output:
                sequence.num_cached += stop - sequence.num_computed
            sequence.num_computed, sequence.num_published = stop, end
            self.states.resume(sequence)
            self.wanted.release(sequence, computed=stop)
        return True
