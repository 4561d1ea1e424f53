"""Pages of the KV cache: who holds them, which are free, and which still hold a known prefix.

A block is *held* (reference count above 0), *cached* (count 0, its content findable by hash, given up in LRU order)
or *blank* (count 0, no content). The pool hands out numbers only; the tensors belong to the runner.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable

BlockHash = bytes
"""Chained: covers every token, item and position from the start of the prompt to the end of the block."""


class BlockPool:
    """Reference-counted blocks with a prefix cache in the free ones."""

    def __init__(self, num_blocks: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.prefix_cache = prefix_cache
        self._refs = [0] * num_blocks
        self._blank: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, BlockHash] = OrderedDict()  # oldest first
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, blank ones first, then the cached prefixes that were used longest ago.

        The caller checks `num_free` first: to ask for more is a bug, not a state of the world.
        """
        assert count <= self.num_free, (count, self.num_free)
        taken = [self._take_one() for _ in range(count)]
        for block in taken:
            self._refs[block] = 1
        return taken

    def release(self, blocks: Iterable[int]) -> None:
        """Give back one reference each. Later blocks of a sequence become evictable before earlier ones, since a
        prefix is worth more the shorter it is."""
        for block in reversed(list(blocks)):
            assert self._refs[block] > 0, f"block {block} released more often than taken"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                known = self._hash_of.get(block)
                if known is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = known

    def find(self, block_hash: BlockHash) -> int | None:
        """The block that holds this prefix, if any. It is not taken: call `share` before anything is allocated."""
        return self._block_of.get(block_hash)

    def share(self, block: int) -> None:
        """Take one more reference to a block that `find` gave."""
        self._cached.pop(block, None)
        self._refs[block] += 1

    def register(self, block: int, block_hash: BlockHash) -> None:
        """Make a full, computed block findable. The first block with a hash keeps it; a twin stays anonymous."""
        assert self._refs[block] > 0, f"block {block} is registered by nobody who holds it"
        if self.prefix_cache and block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def check_integrity(self) -> None:
        """Every block is in exactly one state and both hash tables agree; for tests and idle moments."""
        blank, cached = set(self._blank), set(self._cached)
        held = {block for block, refs in enumerate(self._refs) if refs > 0}
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert not blank & cached, (blank & cached, "blank and cached")
        assert not held & (blank | cached), (held & (blank | cached), "held and free")
        assert len(blank) + len(cached) + len(held) == self.num_blocks, "a block is lost"
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, "hash tables disagree"
        assert all(self._hash_of[b] == h for b, h in self._cached.items()), "a cached block lost its hash"
        assert not blank & self._hash_of.keys(), "a blank block is findable"

    def _take_one(self) -> int:
        if self._blank:
            return self._blank.popleft()
        block, block_hash = self._cached.popitem(last=False)
        del self._block_of[block_hash], self._hash_of[block]
        return block
