"""Sampling against a float64 reference written out in numpy, and its statistics, in the kernels and in the
reference."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dashinfer_vlm.engine import sampler
from dashinfer_vlm.engine.sampler import Sampled, Sampler
from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.layers.sampling import NATIVE, REFERENCE, uniform
from dashinfer_vlm.request import Item, Request, SamplingParams
from tests.searching import searched

VOCAB = 50
EOS = (49,)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=["native", "reference"], scope="module")
def ops(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "native" and not cpu_ops.available():
        pytest.skip(f"no native kernels: {cpu_ops.why_unavailable()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "sampling_ops", lambda device: NATIVE if request.param == "native" else REFERENCE)
        yield


def sequence(prompt: list[int], output: list[int], params: SamplingParams, seed: int = 0) -> Sequence:
    positions = torch.arange(len(prompt)).expand(3, -1)
    made = Sequence(
        Request(id="s", prompt_ids=prompt, params=params), positions=positions, offset=0, max_tokens=99, seed=seed
    )
    for token in output:
        made.append(token)
    return made


def sample(rows: torch.Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> list[Sampled]:
    """One token for each sequence, whose row is the one of its index."""
    groups = Sampler(eos_token_ids, CPU).sample(rows, [(sequence, ()) for sequence in sequences])
    return [sampled for (sampled,) in groups]


def logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def draws(row: torch.Tensor, params: SamplingParams, count: int = 4000) -> Counter[int]:
    """Tokens of `count` draws, each by a seed of its own."""
    sequences = [sequence([1], [], params, seed) for seed in range(count)]
    return Counter(sampled.token for sampled in sample(row.expand(count, -1), sequences, EOS))


def reference(row: NDArray[np.float64], params: SamplingParams) -> NDArray[np.float64]:
    """Probabilities after temperature, min-p, top-k and top-p, by their definitions."""
    scaled = row / params.temperature
    p = np.exp(scaled - scaled.max())
    p[p < params.min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= params.top_p]] = 0
    normalised: NDArray[np.float64] = p / p.sum()
    return normalised


def test_greedy_takes_the_largest_logit_of_each_row() -> None:
    rows = logits(1, 4)
    greedy = SamplingParams(temperature=0)
    sampled = sample(rows, [sequence([1], [], greedy) for _ in range(4)], EOS)
    assert [s.token for s in sampled] == rows.argmax(dim=-1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.7),
        SamplingParams(temperature=1.5, top_k=9, top_p=0.6),
        SamplingParams(temperature=3.0, min_p=0.2),
        SamplingParams(temperature=2.0, min_p=0.05, top_k=20, top_p=0.9),
    ],
    ids=lambda p: f"t{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}",
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    row = logits(3)
    expected = reference(row[0].double().numpy(), params)
    counts = draws(row, params)
    assert set(counts) <= {int(t) for t in np.flatnonzero(expected)}, "a truncated token was drawn"
    for token in np.flatnonzero(expected > 0.02):
        deviation = 5 * math.sqrt(4000 * expected[token] * (1 - expected[token]))
        assert abs(counts[int(token)] - 4000 * expected[token]) <= deviation


@searched(50)
@given(
    seed=st.integers(0, 1000),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=8),
    repetition=st.floats(0.5, 2),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties_follow_their_definitions(
    seed: int, prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> None:
    params = SamplingParams(
        temperature=0, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    row = logits(seed)
    expected = row[0].double().numpy().copy()
    for token in set(prompt + output):
        expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
    for token, count in Counter(output).items():
        expected[token] -= presence + frequency * count
    chosen = sample(row, [sequence(prompt, output, params)], EOS)[0].token
    assert expected[chosen] >= expected.max() - 1e-4


def test_placeholders_of_items_are_not_repeated_tokens() -> None:
    item = Item(kind="image", start=1, num_tokens=2, content_hash=b"x", embedding=torch.zeros(2, 1))
    request = Request(
        id="s", prompt_ids=[1, 7, 7, 2], items=(item,), params=SamplingParams(temperature=0, repetition_penalty=100)
    )
    one = Sequence(request, positions=torch.arange(4).expand(3, -1), offset=0, max_tokens=9, seed=0)
    row = torch.zeros(1, VOCAB)
    row[0, 7], row[0, 2] = 5.0, 6.0
    assert sample(row, [one], EOS)[0].token == 7


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-39, 1e-300])
def test_a_temperature_of_almost_nothing_takes_the_likeliest_token(temperature: float) -> None:
    row = logits(2)
    assert set(draws(row, SamplingParams(temperature=temperature), 20)) == {int(row.argmax())}


def test_of_equally_likely_tokens_the_first_survive() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 30] = 1.0
    assert set(draws(row, SamplingParams(temperature=1, top_k=3), 200)) == {30, 0, 1}
    row[0, 30] = 0.0
    assert set(draws(row, SamplingParams(temperature=1, top_p=0.0999), 200)) == {0, 1, 2, 3, 4}
    assert set(draws(row, SamplingParams(temperature=1, top_p=0), 20)) == {0}


def test_no_ngram_is_repeated() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 3], row[0, 4] = 9.0, 8.0
    params = SamplingParams(temperature=0, no_repeat_ngram_size=3)
    assert sample(row, [sequence([1, 2, 3, 5], [1, 2], params)], EOS)[0].token == 4
    assert sample(row, [sequence([1, 2, 3, 5], [2, 2], params)], EOS)[0].token == 3


def test_a_bias_moves_a_token_and_minimum_tokens_hold_back_the_end() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 49], row[0, 8] = 9.0, 5.0
    assert sample(row, [sequence([1], [], SamplingParams(temperature=0, logit_bias={6: 50.0}))], EOS)[0].token == 6
    held = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(8,))
    assert sample(row, [sequence([1], [5], held)], EOS)[0].token not in (49, 8)
    assert sample(row, [sequence([1], [5, 5], held)], EOS)[0].token == 49


def test_log_probabilities_are_those_of_the_unshaped_logits() -> None:
    row = logits(5)
    params = SamplingParams(temperature=0, logprobs=3, logit_bias={11: 100.0})
    sampled = sample(row, [sequence([1], [], params)], EOS)[0]
    expected = torch.log_softmax(row[0].double(), dim=-1)
    assert sampled.token == 11
    assert sampled.logprob is not None
    assert sampled.logprob.logprob == pytest.approx(float(expected[11]), abs=1e-5)
    assert sampled.logprob.rank == int((expected > expected[11]).sum()) + 1
    assert [t for t, _ in sampled.logprob.top] == expected.topk(3).indices.tolist()


def test_a_row_that_is_not_a_number_is_told_and_harms_no_other_row() -> None:
    rows = logits(1, 3)
    rows[1, 7] = float("nan")
    sampled = sample(rows, [sequence([1], [], SamplingParams(temperature=0)) for _ in range(3)], EOS)
    assert [s.token for s in sampled] == [int(rows[0].argmax()), -1, int(rows[2].argmax())]


def test_equal_seeds_draw_equal_tokens_and_others_differ() -> None:
    params = SamplingParams(temperature=3)

    def several(seed: int) -> list[int]:
        return [sample(logits(i), [sequence([1], [0] * i, params, seed)], EOS)[0].token for i in range(20)]

    assert several(4) == several(4)
    assert several(4) != several(5)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(min_tokens=5, stop_token_ids=tuple(range(VOCAB))),
        SamplingParams(min_tokens=5, stop_token_ids=tuple(range(VOCAB)), temperature=0),
        SamplingParams(min_tokens=5, stop_token_ids=tuple(range(VOCAB)), top_k=3, top_p=0.5, min_p=0.1),
    ],
)
def test_a_row_of_which_everything_is_forbidden_is_a_problem_of_its_own(params: SamplingParams) -> None:
    free = sequence([1], [], SamplingParams(temperature=0))
    rows = logits(3, 2)
    stuck, well = sample(rows, [sequence([1], [], params), free], EOS)
    assert stuck.token == -1
    assert "forbid every token" in (stuck.problem or "")
    assert (well.token, well.problem) == (int(rows[1].argmax()), None)


def test_forbidden_ngrams_may_leave_nothing() -> None:
    stuck = sequence([1], list(range(VOCAB)), SamplingParams(no_repeat_ngram_size=1))
    assert "forbid every token" in (sample(logits(3), [stuck], EOS)[0].problem or "")


def test_random_numbers_are_those_of_splitmix64() -> None:
    # the first outputs of the published generator that begins at 1234567
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert uniform([1234567] * 4, range(4)).tolist() == [(value >> 40) / 2**24 for value in published]


def test_seeds_beyond_64_bits_wrap_around_and_numbers_stay_below_one() -> None:
    assert uniform([-1], [3]) == uniform([2**64 - 1], [3])
    numbers = uniform(range(100_000), [0] * 100_000)
    assert 0 <= numbers.min() <= numbers.max() < 1
    assert abs(float(numbers.mean()) - 0.5) < 5 * (12 * 100_000) ** -0.5


KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),
    SamplingParams(temperature=1),
    SamplingParams(temperature=1.5, top_p=0.9, logprobs=2),
    SamplingParams(temperature=2, min_p=0.1, presence_penalty=0.5, frequency_penalty=0.2),
    SamplingParams(temperature=1, logit_bias={3: 5.0}, no_repeat_ngram_size=2, min_tokens=20, logprobs=0),
]


def test_a_row_gets_the_same_alone_and_in_any_batch() -> None:
    rows = logits(8, 60)
    sequences = [sequence([1, 2, 3], [4, 1, 2, i % 9], KINDS[i % len(KINDS)], seed=i) for i in range(60)]
    together = sample(rows, sequences, EOS)
    assert together == [sample(rows[i : i + 1], [sequences[i]], EOS)[0] for i in range(60)]
    assert together == sample(rows.flip(0), sequences[::-1], EOS)[::-1]


@pytest.mark.parametrize("params", KINDS, ids=str)
def test_rows_behind_guesses_get_what_the_guesses_as_tokens_would_give(params: SamplingParams) -> None:
    rows, guesses = logits(9, 4), (7, 7, 2)
    guessing = sequence([1, 2, 7], [7, 1], params, seed=3)
    (found,) = Sampler(EOS, CPU).sample(rows, [(guessing, guesses)])
    for place, sampled in enumerate(found):
        known = sequence([1, 2, 7], [7, 1, *guesses[:place]], params, seed=3)
        assert [sampled] == sample(rows[place : place + 1], [known], EOS)
    assert sample(rows[:1], [guessing], EOS) == found[:1], "the guesses were not forgotten"


def bit_mask(rows: list[set[int]], vocab: int = VOCAB) -> torch.Tensor:
    words = np.zeros((len(rows), -(-vocab // 32)), np.uint32)
    for row, allowed in enumerate(rows):
        for token in allowed:
            words[row, token // 32] |= np.uint32(1 << token % 32)
    return torch.from_numpy(words.view(np.int32))


@pytest.mark.parametrize("params", [*KINDS, SamplingParams(temperature=5)], ids=str)
def test_a_mask_lets_only_its_tokens_through(params: SamplingParams) -> None:
    allowed = [{31, 49}, {0}, set(range(VOCAB)), {32, 33, 5}]
    sequences = [sequence([1], [4], params, seed) for seed in range(4)]
    sampler = Sampler((), CPU)
    for seed in range(20):
        groups = sampler.sample(logits(seed, 4), [(s, ()) for s in sequences], bit_mask(allowed))
        assert all(sampled.token in tokens for (sampled,), tokens in zip(groups, allowed, strict=True))
        unmasked = sample(logits(seed, 4), sequences, ())
        assert groups[2] == [unmasked[2]]


def test_a_mask_that_allows_nothing_is_a_problem_of_its_own_row() -> None:
    rows, greedy = logits(1, 2), SamplingParams(temperature=0)
    stuck, free = Sampler(EOS, CPU).sample(rows, [(sequence([1], [], greedy), ())] * 2, bit_mask([set(), {4}]))
    assert "forbid every token" in (stuck[0].problem or "")
    assert free[0].token == 4


def test_parameters_that_raise_fail_their_own_sequence() -> None:
    broken, well = sequence([1], [], SamplingParams()), sequence([1], [], SamplingParams(temperature=0))
    del broken.shaping
    rows = logits(1, 3)
    failed, fine = Sampler(EOS, CPU).sample(rows, [(broken, (5,)), (well, ())])
    assert [bool(sampled.problem) for sampled in failed] == [True, True]
    assert fine[0].token == int(rows[2].argmax())
