from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.frontend.detokenizer import Detokenizer, StopFinder
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.tokens import END_OF_SPECIAL, FIRST_SPECIAL, IM_END


def test_an_emoji_of_four_tokens_comes_out_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text("😀")
    assert len(ids) == 4
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(id) for id in ids] == ["", "", "", "😀"]
    assert detokenizer.flush() == ""


def test_a_character_that_never_ends_is_flushed_as_a_replacement(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(id) for id in tokenizer.encode_text("😀")[:3]] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"


@given(ids=st.lists(st.integers(0, 300) | st.integers(FIRST_SPECIAL - 3, END_OF_SPECIAL + 3)))
def test_pieces_join_to_the_whole_text_whatever_the_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == tokenizer.decode(ids)


def test_special_tokens_are_left_out_unless_asked_for(tokenizer: Tokenizer) -> None:
    assert Detokenizer(tokenizer).push(IM_END) == ""
    assert Detokenizer(tokenizer, skip_special=False).push(IM_END) == "<|im_end|>"


def test_stop_strings_are_not_looked_for_in_the_first_min_tokens(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("z",), min_tokens=2)
    assert [detokenizer.push(id) for id in tokenizer.encode_text("zzz")] == ["z", "z", ""]
    assert detokenizer.stopped == "z"


def test_a_stop_string_may_span_pieces_and_ends_the_text_before_it() -> None:
    finder = StopFinder(("END",))
    assert [finder.push(piece) for piece in ("one E", "N", "D two", "three")] == ["one ", "", "", ""]
    assert finder.found == "END"


def test_a_stop_string_can_be_kept() -> None:
    finder = StopFinder(("END",), include=True)
    assert [finder.push(piece) for piece in ("one E", "ND two")] == ["one ", "END"]


def test_what_only_began_like_a_stop_string_comes_out_later() -> None:
    finder = StopFinder(("END",))
    assert [finder.push(piece) for piece in ("E", "N", "x", "EN")] == ["", "", "ENx", ""]
    assert finder.flush() == "EN"
    assert finder.found is None


stops = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


def cut_at_first_complete_stop(text: str, stop: tuple[str, ...]) -> str:
    """The definition: read letter by letter and cut where a stop string has just become complete."""
    for end in range(len(text) + 1):
        ended = [s for s in stop if text[:end].endswith(s)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


@given(pieces=st.lists(st.text("abc", max_size=5)), stop=stops)
def test_the_text_ends_before_the_first_complete_stop_string_however_it_is_cut(
    pieces: list[str], stop: tuple[str, ...]
) -> None:
    finder = StopFinder(stop)
    text = "".join(map(finder.push, pieces)) + finder.flush()
    assert text == cut_at_first_complete_stop("".join(pieces), stop)
