"""What is kept up token by token equals what a look at the whole text would find."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.engine.shaping import Shaping
from dashinfer_vlm.request import Request, SamplingParams
from tests.searching import searched

TOKENS = st.lists(st.integers(0, 3), max_size=20)


def check(shaping: Shaping, prompt: list[int], output: list[int], size: int) -> None:
    assert shaping.seen is not None
    counted = dict(zip(shaping.seen.ids.tolist(), shaping.seen.counts.tolist(), strict=True))
    assert counted == dict.fromkeys(prompt, 0) | Counter(output)
    text = prompt + output
    newest = text[len(text) - size + 1 :] if len(text) >= size else None
    followers = [text[i + size - 1] for i in range(len(text) - size + 1) if text[i : i + size - 1] == newest]
    assert shaping.ngrams is not None
    assert shaping.ngrams.newest.tolist() == followers


@searched(200)
@given(prompt=TOKENS, steps=st.lists(st.none() | st.integers(0, 100), max_size=100), size=st.integers(1, 5))
def test_tokens_that_come_and_go_leave_what_the_text_has(prompt: list[int], steps: list[int | None], size: int) -> None:
    params = SamplingParams(repetition_penalty=2, no_repeat_ngram_size=size)
    shaping = Shaping(Request(id="s", prompt_ids=prompt, params=params))
    output: list[int] = []
    check(shaping, prompt, output, size)
    for token in steps:
        if token is not None:
            shaping.push(token)
            output.append(token)
        elif output:
            shaping.pop()
            output.pop()
        check(shaping, prompt, output, size)


def test_an_ngram_longer_than_the_text_forbids_nothing() -> None:
    shaping = Shaping(Request(id="s", prompt_ids=[1, 2], params=SamplingParams(no_repeat_ngram_size=2**31 - 1)))
    assert shaping.ngrams is not None
    assert shaping.ngrams.newest.tolist() == []
