"""Words that an answer must not have, as the sequences of ids that would write them."""

from __future__ import annotations

from collections.abc import Iterable

from dashinfer_vlm.frontend.tokenizer import Tokenizer

__all__ = ["bad_word_ids"]


def bad_word_ids(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Of each word the ids at the beginning of a text, and those behind a blank where that begins another token and
    takes as many: vLLM's rule. A word that is written with other ids, in capitals say, is another word."""
    found: list[tuple[int, ...]] = []
    for word in words:
        bare, spaced = (tuple(tokenizer.encode_text(blank + word.lstrip())) for blank in ("", " "))
        found.append(bare)
        if spaced[0] != bare[0] and len(spaced) == len(bare):
            found.append(spaced)
    return tuple(dict.fromkeys(found))
