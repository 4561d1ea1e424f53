"""Words that an answer must not have, as the sequences of ids that would write them."""

from __future__ import annotations

from collections.abc import Iterable

from dashinfer_vlm.frontend.tokenizer import Tokenizer

__all__ = ["bad_word_ids"]


def bad_word_ids(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Of each word the ids at the beginning of a text, and those behind a blank where that begins another token. A word
    that is written with other ids, in capitals say, is another word. vLLM leaves those behind a blank out where they
    are fewer or more, so that many words are said all the same."""
    found: list[tuple[int, ...]] = []
    for word in words:
        bare, spaced = (tuple(tokenizer.encode_text(blank + word.lstrip())) for blank in ("", " "))
        found.append(bare)
        if spaced[0] != bare[0]:
            found.append(spaced)
    return tuple(dict.fromkeys(found))
