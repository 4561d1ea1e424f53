"""From the placeholders that a chat template writes to the runs that stand for the items' embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.media.types import LoadedMedia
from dashinfer_vlm.models.family import Expansion, Run
from dashinfer_vlm.request import Item, ItemKind

__all__ = ["ExpandItem", "Expander", "one_run"]

ExpandItem = Callable[[LoadedMedia, Callable[[str], list[int]]], Expansion]

_LEAD_TOKENS = 32
"""Tokens in front of a lead that are encoded again together with it, at least."""


def one_run(medium: LoadedMedia, encode: Callable[[str], list[int]]) -> Expansion:
    """The placeholder as often as the medium has tokens."""
    return Expansion(pieces=(Run(0, medium.num_tokens),))


@dataclass(frozen=True, slots=True)
class Expander:
    """Expands the prompts of one model."""

    tokenizer: Tokenizer
    placeholder_ids: Mapping[ItemKind, int]
    expand_item: ExpandItem

    def __call__(
        self, ids: Sequence[int], media: Sequence[LoadedMedia], param: str
    ) -> tuple[list[int], tuple[Item, ...]]:
        """The n-th placeholder of a kind becomes what the n-th medium of that kind expands to.

        Raises InvalidRequestError when the numbers of placeholders and media differ.
        """
        kind_of = {token: kind for kind, token in self.placeholder_ids.items()}
        queues = {kind: [medium for medium in media if medium.kind == kind] for kind in self.placeholder_ids}
        for kind, token in self.placeholder_ids.items():
            found = ids.count(token)
            if found != len(queues[kind]):
                raise InvalidRequestError(
                    f"the prompt has {found} {kind} placeholders for {len(queues[kind])} {kind}s", param=param
                )
        if not media:
            return list(ids), ()
        full: list[int] = []
        items: list[Item] = []
        skipped = -1
        for index, token in enumerate(ids):
            if token in kind_of:
                medium = queues[kind_of[token]].pop(0)
                expansion = self.expand_item(medium, self.tokenizer.encode_text)
                if expansion.around and (*full[-1:], *ids[index + 1 : index + 2]) == expansion.around:
                    full.pop()
                    skipped = index + 1
                self._write(expansion, medium, token, full, items)
            elif index != skipped:
                full.append(token)
        return full, tuple(items)

    def _write(self, expansion: Expansion, medium: LoadedMedia, token: int, full: list[int], items: list[Item]) -> None:
        if expansion.lead:
            self._write_text(expansion.lead, full)
        for piece in expansion.pieces:
            if isinstance(piece, Run):
                items.append(_item(medium, piece, len(full)))
                full += [token] * piece.num_tokens
            else:
                full.append(piece)

    def _write_text(self, text: str, full: list[int]) -> None:
        """Append plain text with the ids that it has together with the plain text before it."""
        added = set(self.tokenizer.added.values())
        num_plain = next((i for i, token in enumerate(reversed(full)) if token in added), len(full))
        count = min(_LEAD_TOKENS, num_plain)
        while True:
            before = full[len(full) - count :]
            known = self.tokenizer.decode(before)
            if count == num_plain or self.tokenizer.encode_text(known) == before:  # cut between two words
                break
            count = min(2 * count, num_plain)
        full[len(full) - count :] = self.tokenizer.encode_text(known + text)


def _item(medium: LoadedMedia, run: Run, start: int) -> Item:
    return Item(
        kind=medium.kind,
        start=start,
        num_tokens=run.num_tokens,
        content_hash=medium.content_hash,
        grid=medium.grid,
        patches=None if medium.is_embedding else medium.features,
        embedding=medium.features if medium.is_embedding else None,
        seconds_per_grid=medium.seconds_per_grid,
        first_row=run.first_row,
        encoded_rows=None if run.num_tokens == medium.num_tokens else medium.num_tokens,
    )
