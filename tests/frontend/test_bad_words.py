"""Which ids write a word that an answer must not have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dashinfer_vlm.frontend.bad_words import bad_word_ids

TOKENIZER: Any = SimpleNamespace(
    encode_text={"cat": [1], " cat": [2], "blue": [3, 4], " blue": [5], "7": [6], " 7": [7, 6], "!": [8], " !": [8]}.get
)


def test_a_word_is_forbidden_at_the_beginning_and_behind_a_blank_with_as_many_ids_or_not() -> None:
    assert bad_word_ids(["cat"], TOKENIZER) == ((1,), (2,))
    assert bad_word_ids(["blue", " blue"], TOKENIZER) == ((3, 4), (5,))
    assert bad_word_ids(["7"], TOKENIZER) == ((6,), (7, 6))
    assert bad_word_ids(["!"], TOKENIZER) == ((8,),)
