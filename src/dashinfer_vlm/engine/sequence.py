"""The life of a request in the engine: its tokens, its blocks, how much of it is computed."""

from __future__ import annotations

import time
from collections import defaultdict
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import torch

from dashinfer_vlm.engine.shaping import Shaping
from dashinfer_vlm.request import Finish, Item, Request
from dashinfer_vlm.stages import Span, since

if TYPE_CHECKING:
    from dashinfer_vlm.engine.blocks import BlockHash
    from dashinfer_vlm.engine.drafts import Drafter
    from dashinfer_vlm.engine.grammars.matcher import Matcher
    from dashinfer_vlm.engine.states import StateSeat


PENDING = -1
"""In place of a token that a step under way will give."""


class Sequence:
    """Mutable state of one request. Everything that can be derived is a property.

    Owners: the scheduler moves `blocks`, `state`, `num_computed`, `num_published` and `num_scored`, and says which
    tokens are owed; the engine appends tokens and sets `finish`.
    """

    def __init__(
        self,
        request: Request,
        *,
        positions: torch.Tensor,
        offset: int,
        max_tokens: int,
        seed: int,
        drafter: Drafter | None = None,
        matcher: Matcher | None = None,
    ) -> None:
        self.request = request
        self.num_prompt = len(request.prompt_ids)
        self.tokens = list(request.prompt_ids)
        self.positions = positions
        self.position_offset = offset
        self.max_tokens = max_tokens
        self.seed = seed
        self.drafter = drafter
        self.matcher = matcher
        self.blocks: list[int] = []
        self.state: StateSeat | None = None
        """While it runs, if the model has states."""
        self.num_computed = 0
        """Tokens whose K and V are in `blocks`, or will be before a step that is started from now on."""
        self.num_published = 0
        """Full blocks that others can find."""
        self.num_owed = 0
        """Tokens at the end that are PENDING."""
        self.num_cached = 0
        """Prompt tokens that were found in the prefix cache when the sequence first ran."""
        self.num_scored = min(1, self.num_prompt) if request.params.prompt_logprobs is not None else self.num_prompt
        """Prompt tokens whose log probabilities need not be found any more; the first one has none."""
        self.finish: Finish | None = None
        self.spans: list[Span] = []
        """Stages that have ended and were not told yet."""
        self._arrived_s = time.perf_counter()
        self._begun_s: float | None = None
        self.shaping = Shaping(request)
        self.stop_token_ids = frozenset(request.params.stop_token_ids)
        self._stops: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)  # stop sequences by their last token
        for stop in request.params.stop_sequences:
            self._stops[stop[-1]].append(stop)
        self._hashes: list[BlockHash] = []
        self._item_keys = [_item_key(item) for item in request.items]

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def priority(self) -> int:
        """The lower, the earlier."""
        return self.request.priority

    @property
    def seat(self) -> int:
        """Where its state lies while it runs; 0 where the model has none."""
        return 0 if self.state is None else self.state.index

    @property
    def num_behind(self) -> int:
        """Computed tokens that its state has yet to see, after a wrong guess."""
        return 0 if self.state is None else self.state.num_behind

    @property
    def num_output(self) -> int:
        """Those that are owed are counted."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_known(self) -> int:
        """Tokens of prompt and output that are not PENDING."""
        return len(self.tokens) - self.num_owed

    @property
    def num_known_output(self) -> int:
        return self.num_known - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Only its newest token is missing from the cache, so that a step costs it one row, and one for each token that
        its state has yet to see."""
        return self.num_output > 0 and self.num_uncomputed == 1

    @property
    def pending_items(self) -> list[Item]:
        """Items of which at least one row is still to be computed."""
        items = self.request.items
        if not items or items[-1].end <= self.num_computed:  # every decoding sequence is asked in every step
            return []
        return [item for item in items if item.end > self.num_computed]

    def items_to_encode(self, *, behind: int) -> list[Item]:
        """Items that the encoder is asked for when the first `behind` tokens are computed; of one in several parts the
        last, which is needed longest."""
        return [i for i in self.request.items if i.embedding is None and i.is_last_part and i.end > behind]

    @property
    def is_scored(self) -> bool:
        """Whether the log probabilities of its prompt are known or under way, or not wanted."""
        return self.num_scored == self.num_prompt

    def unscored(self, start: int, stop: int) -> range:
        """Tokens of the prompt from `start` to before `stop` whose log probabilities are still wanted."""
        return range(max(start, self.num_scored), min(stop, self.num_prompt))

    @property
    def has_begun(self) -> bool:
        """Whether a chunk of it has been computed, or is about to be."""
        return self._begun_s is not None

    def begin(self) -> None:
        """A chunk of it is about to be computed."""
        if not self.has_begun:
            self._begun_s = time.perf_counter()
            self.spans.append(Span("prefill_wait", self._arrived_s, self._begun_s))

    def saw(self, spans: tuple[Span, ...]) -> None:
        """An embedding that it needed was made like this; one that is needed again was told before."""
        if not self.num_output:
            self.spans += since(spans, self._arrived_s)

    def has_read_prompt(self) -> None:
        """Its first token is known."""
        assert self._begun_s is not None, self.id
        self.spans.append(Span("prefill", self._begun_s, time.perf_counter()))

    def take_spans(self) -> tuple[Span, ...]:
        """Stages to be told."""
        spans, self.spans = tuple(self.spans), []
        return spans

    def owe(self) -> None:
        """A step that was started will give one more token."""
        self.tokens.append(PENDING)
        self.num_owed += 1

    def append(self, token: int) -> None:
        """The next token, owed or not."""
        if self.num_owed:
            self.tokens[self.num_known] = token
            self.num_owed -= 1
        else:
            self.tokens.append(token)
        self.shaping.push(token)
        if self.matcher is not None:
            self.matcher.accept(token)
        if self.drafter is not None:
            self.drafter.observe(token)

    @property
    def ends_with_a_stop_sequence(self) -> bool:
        """Whether the output does, whatever `min_tokens` says."""
        if not self._stops:
            return False
        end = self.num_known
        stops = self._stops.get(self.tokens[end - 1], ())
        return any(
            len(stop) <= self.num_known_output and tuple(self.tokens[end - len(stop) : end]) == stop for stop in stops
        )

    def positions_of(self, start: int, stop: int) -> torch.Tensor:
        """int64 [3, stop - start]: the prompt's own positions, then one step per token after it on all axes."""
        known = self.positions[:, start : min(stop, self.num_prompt)]
        if stop <= self.num_prompt:
            return known
        later = torch.arange(max(start, self.num_prompt), stop) + self.position_offset
        return torch.cat([known, later.expand(3, -1)], dim=1)

    def block_hash(self, index: int, block_size: int) -> BlockHash:
        """Hash of the full block `index` and of all before it: ids, and where an item stands, its content."""
        while len(self._hashes) <= index:
            self._hashes.append(self._next_hash(block_size))
        return self._hashes[index]

    def _next_hash(self, block_size: int) -> BlockHash:
        start = len(self._hashes) * block_size
        stop = start + block_size
        assert stop <= self.num_known, (stop, self.num_known)
        digest = blake2b(self._hashes[-1] if self._hashes else _beginning(self.request.cache_salt), digest_size=16)
        digest.update(np.asarray(self.tokens[start:stop], dtype=np.int64).tobytes())
        if self.request.positions is not None:
            digest.update(self.positions_of(start, stop).numpy().tobytes())
        for item, key in zip(self.request.items, self._item_keys, strict=True):
            if item.start < stop and item.start + item.num_tokens > start:
                digest.update(key + (item.start - start).to_bytes(8, "little", signed=True))
        return digest.digest()


def _beginning(salt: str) -> bytes:
    """In front of the first block. Hashed apart, so that no salt is the hash of somebody's blocks."""
    return blake2b(salt.encode(), digest_size=16, person=b"salt").digest() if salt else b""


def _item_key(item: Item) -> bytes:
    """Content and layout: equal pixels under another grid or frame rate have other positions, and each part of an item
    its own rows."""
    layout = f"{item.kind} {item.grid} {item.seconds_per_grid} {item.first_row} {item.num_tokens}".encode()
    return blake2b(item.content_hash + layout, digest_size=16).digest()
