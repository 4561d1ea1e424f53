"""Items that running sequences hold at the encoder, from admission until their last row is computed."""

from __future__ import annotations

from dashinfer_vlm.encoders.stage import EncoderStage
from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.request import Item


class WantedItems:
    """Asks the encoder for what sequences need, and lets go of what is behind them."""

    def __init__(self, stage: EncoderStage, max_tokens: int) -> None:
        """`max_tokens` bounds the visual tokens that running sequences wait for or have yet to compute."""
        self.stage = stage
        self.max_tokens = max_tokens
        self._of: dict[str, list[Item]] = {}  # by the sequence's id

    def __bool__(self) -> bool:
        """Whether anything is held."""
        return bool(self._of)

    @property
    def rows(self) -> dict[bytes, int]:
        """Rows of embeddings that are held, by content."""
        return {item.content_hash: item.num_rows for items in self._of.values() for item in items}

    def fit(self, items: list[Item]) -> bool:
        """Whether these may be held, too. Content that several sequences wait for counts once. Who holds nothing that
        others wait for fits always, or a long video would never run."""
        rows = self.rows
        return (
            not rows or sum((rows | {item.content_hash: item.num_rows for item in items}).values()) <= self.max_tokens
        )

    def request(self, sequence: Sequence, items: list[Item]) -> None:
        for item in items:
            self.stage.request(item)
        if items:
            self._of[sequence.id] = items

    def release(self, sequence: Sequence, *, computed: int | None) -> None:
        """Tell the encoder that the sequence is past some items (`computed` tokens), or needs none (None)."""
        items = self._of.get(sequence.id)
        if items is None:
            return
        done = [item for item in items if computed is None or item.start + item.num_tokens <= computed]
        for item in done:
            if computed is not None:
                sequence.saw(self.stage.cache.spans(item.content_hash))
            self.stage.release(item)
            items.remove(item)
        if not items:
            del self._of[sequence.id]

    def num_ready(self, sequence: Sequence) -> int:
        """Tokens before the first item whose embedding is not here yet."""
        for item in sequence.pending_items:
            if item.embedding is None and item.content_hash not in self.stage.cache:
                return max(0, item.start - sequence.num_computed)
        return sequence.num_uncomputed
