"""The encoder as a stage of its own: items in, embeddings out. The scheduler sees only these verbs, wherever the stage
runs."""

from __future__ import annotations

from typing import Protocol

from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.encoders.stats import StageStats
from dashinfer_vlm.request import Item

__all__ = ["EncoderStage", "NoEncoder"]


class EncoderStage(Protocol):
    """What the engine needs of an encoder, wherever it runs."""

    @property
    def cache(self) -> EmbeddingCache: ...

    @property
    def stats(self) -> StageStats: ...

    def request(self, item: Item) -> None:
        """Pin the item's embedding and see to it that it will be there; a second request for the same content shares
        the work. One `release` per `request`."""
        ...

    def release(self, item: Item) -> None: ...

    def has_work(self) -> bool: ...

    def advance(self, budget_s: float) -> None:
        """Work for about `budget_s` seconds; finished embeddings are in `cache` afterwards. What is too little for a
        slice is saved up for the next call, so that over many calls the budget is kept on average.

        A stage that runs elsewhere never waits while streams do: at most for a hundredth of a long budget."""
        ...

    @property
    def computes_here(self) -> bool:
        """Whether `advance` would now compute in the engine's own time."""
        ...

    def take_failures(self) -> dict[bytes, str]:
        """Content hashes that could not be encoded since the last call, with the reason."""
        ...

    def close(self) -> None:
        """Give back processes and machines; idempotent."""
        ...


class NoEncoder:
    """The stage of a text model, which is asked for nothing: requests with something to encode are refused before."""

    def __init__(self) -> None:
        self.cache = EmbeddingCache(0)
        self.stats = StageStats()
        self.computes_here = False

    def request(self, item: Item) -> None:
        raise AssertionError(f"the {item.kind} at {item.start} was accepted for a model without an encoder")

    def release(self, item: Item) -> None:
        raise AssertionError(f"the {item.kind} at {item.start} was never requested")

    def has_work(self) -> bool:
        return False

    def advance(self, budget_s: float) -> None:
        """Nothing to do."""

    def take_failures(self) -> dict[bytes, str]:
        return {}

    def close(self) -> None:
        """Nothing is held."""
