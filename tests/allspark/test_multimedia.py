"""Embeddings in the prompt: every producer, several placeholders, identity, positions; only what fits is scheduled."""

from __future__ import annotations

import _datetime as datetime  # type: ignore[import-not-found]
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors import safe_open
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

import allspark
from allspark import AsStatus, MultiMediaInfo
from dashinfer_vlm.models.mrope import mrope_positions
from dashinfer_vlm.request import Item
from tests.allspark.conftest import GREEDY, HIDDEN, NAME, Ask, embedding, media, usable
from tests.searching import searched
from tests.tokens import FIRST_SPECIAL, VOCAB

IMAGE = VOCAB - 1
"""An id of the vocabulary that means nothing; placeholders beyond it are as good."""
LOGPROBS = {**GREEDY, "logprobs": True}


class Producer:
    """Any library with the protocol."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> object:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> object:
        return self.tensor.__dlpack_device__()


FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "torch capsule": to_dlpack,
    "torch tensor": lambda t: t,
    "numpy array": lambda t: t.numpy(),
    "object with the protocol": Producer,
    "transposed": lambda t: t.T.contiguous().T,
    "every second row": lambda t: torch.stack([t, t + 1], dim=1).reshape(-1, HIDDEN)[::2],
    "wider rows": lambda t: torch.cat([t, t], dim=1)[:, :HIDDEN],
    "float64": lambda t: t.double(),
    "with gradient": lambda t: t.clone().requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_producer_of_dlpack_means_the_same(form: str, ask: Ask) -> None:
    ids = [5, *[IMAGE] * 4, 6]
    expected = ask(ids, LOGPROBS, mm_info=media(str(IMAGE), embedding(4)))
    answer = ask(ids, LOGPROBS, mm_info=media(str(IMAGE), FORMS[form](embedding(4))))
    assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_as_its_value(dtype: torch.dtype, ask: Ask) -> None:
    ids, half = [5, *[IMAGE] * 4, 6], embedding(4).to(dtype)
    expected = ask(ids, LOGPROBS, mm_info=media(str(IMAGE), half.float()))
    assert ask(ids, LOGPROBS, mm_info=media(str(IMAGE), half)).logprobs == pytest.approx(expected.logprobs, abs=1e-6)


def test_a_contiguous_tensor_is_not_copied() -> None:
    tensor = embedding(4)
    assert media("7", to_dlpack(tensor)).embeddings[7][0].data_ptr() == tensor.data_ptr()
    array = tensor.numpy()
    assert media("7", array).embeddings[7][0].data_ptr() == array.ctypes.data


def test_embeddings_that_equal_those_of_words_mean_these_words(ask: Ask, folder: Path) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        words = file.get_tensor("model.embed_tokens.weight")[[6, 7]]
    plain = ask([5, 6, 7, 8, 9], LOGPROBS)
    as_words = ask([5, *[IMAGE] * 2, 8, 9], LOGPROBS, mm_info=media(str(IMAGE), words))
    other = ask([5, *[IMAGE] * 2, 8, 9], LOGPROBS, mm_info=media(str(IMAGE), words + 0.1))
    assert as_words.logprobs == pytest.approx(plain.logprobs, abs=1e-5)
    assert other.logprobs != pytest.approx(plain.logprobs, abs=1e-5)


def test_several_placeholders_and_runs_keep_their_order(ask: Ask) -> None:
    a, b, c = embedding(2, 1), embedding(3, 2), embedding(2, 3)
    ids = [5, *[IMAGE] * 2, *[99999999] * 3, 6, *[IMAGE] * 2, 7]
    info = media(str(IMAGE), a, c)
    assert info.add_multimedia_content("99999999", [b]) == AsStatus.ALLSPARK_SUCCESS
    together = ask(ids, LOGPROBS, mm_info=info)
    renamed = [t if t < IMAGE else 7777777 for t in ids]
    renamed[3:6] = [8888888] * 3
    one_by_one = MultiMediaInfo()
    for name, tensor in (("8888888", b), ("7777777", a), ("7777777", c)):
        assert one_by_one.add_multimedia_content(name, [tensor]) == AsStatus.ALLSPARK_SUCCESS
    assert ask(renamed, LOGPROBS, mm_info=one_by_one).logprobs == pytest.approx(together.logprobs, abs=1e-5)
    swapped = media(str(IMAGE), c, a)
    assert swapped.add_multimedia_content("99999999", [b]) == AsStatus.ALLSPARK_SUCCESS
    assert ask(ids, LOGPROBS, mm_info=swapped).logprobs != pytest.approx(together.logprobs, abs=1e-5)


def test_different_embeddings_never_share_what_is_cached(ask: Ask) -> None:
    ids = [*[IMAGE] * 32, *range(300, 340)]
    first, second = embedding(32, 11), embedding(32, 12)
    fresh = ask(ids, LOGPROBS, mm_info=media(str(IMAGE), first))
    again = ask(ids, LOGPROBS, mm_info=media(str(IMAGE), first.clone()))
    assert (fresh.prefix_cache_len, again.prefix_cache_len) == (0, 64)
    assert again.logprobs == pytest.approx(fresh.logprobs, abs=1e-5)
    nearly = first.clone()
    nearly[17, 3] += 1e-3
    for other in (second, nearly):
        answer = ask(ids, LOGPROBS, mm_info=media(str(IMAGE), other))
        assert answer.prefix_cache_len < 32


def test_a_given_identity_decides_what_is_shared(ask: Ask) -> None:
    ids, tensor = [*[IMAGE] * 32, *range(400, 440)], embedding(32, 21)
    key = torch.tensor([1, 2, 3], dtype=torch.int32)
    assert ask(ids, mm_info=media(str(IMAGE), tensor, hash_input=key)).prefix_cache_len == 0
    assert ask(ids, mm_info=media(str(IMAGE), tensor, hash_input=key.clone())).prefix_cache_len == 64
    assert ask(ids, mm_info=media(str(IMAGE), tensor, hash_input=key + 1)).prefix_cache_len == 0
    assert ask(ids, mm_info=media(str(IMAGE), tensor, hash_input=key.long())).prefix_cache_len == 0
    assert ask(ids, mm_info=media(str(IMAGE), tensor)).prefix_cache_len == 0


def test_given_positions_are_used_and_kept_apart_in_the_cache(ask: Ask) -> None:
    ids, tensor = [*range(500, 520), *[IMAGE] * 4, *range(520, 540)], embedding(4, 31)
    info = media(str(IMAGE), tensor)
    sequential = torch.arange(len(ids), dtype=torch.int32).expand(3, 1, -1)
    plain = ask(ids, LOGPROBS, mm_info=info)
    same = ask(ids, LOGPROBS, mm_info=media(str(IMAGE), tensor, positions=sequential))
    other = ask(ids, LOGPROBS, mm_info=media(str(IMAGE), tensor, positions=sequential * 2))
    assert same.logprobs == pytest.approx(plain.logprobs, abs=1e-5)
    assert other.logprobs != pytest.approx(plain.logprobs, abs=1e-5)
    assert other.prefix_cache_len == 0


def test_grids_give_the_positions_of_the_model(ask: Ask) -> None:
    ids, tensor = [5, *[IMAGE] * 6, 6, 7], embedding(6, 41)
    item = Item(kind="image", start=1, num_tokens=6, content_hash=b"", grid=(1, 4, 6))
    positions, _ = mrope_positions(len(ids), [item], merge_size=2, tokens_per_second=None)
    grid = torch.tensor([[1, 4, 6]])
    by_grid = ask(ids, LOGPROBS, mm_info=media(str(IMAGE), tensor, grid_thw=grid))
    by_positions = ask(ids, LOGPROBS, mm_info=media(str(IMAGE), tensor, positions=positions[:, None]))
    without = ask(ids, LOGPROBS, mm_info=media(str(IMAGE), tensor))
    assert by_grid.logprobs == pytest.approx(by_positions.logprobs, abs=1e-5)
    assert without.logprobs != pytest.approx(by_grid.logprobs, abs=1e-5)


def test_the_deprecated_type_has_no_effect() -> None:
    assert MultiMediaInfo().set_multimedia_type(5) == AsStatus.ALLSPARK_SUCCESS


def consumed() -> object:
    capsule = to_dlpack(embedding(2))
    media("7", capsule)
    return capsule


class BrokenProducer(Producer):
    def __init__(self) -> None:
        super().__init__(embedding(2))

    def __dlpack__(self, **options: Any) -> object:
        raise BufferError("not today")


class NoProducer(BrokenProducer):
    def __dlpack__(self, **options: Any) -> object:
        return 5


def read_only() -> np.ndarray:
    array = embedding(2).numpy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("identifier", "content", "reason"),
    [
        ("word", [embedding(2)], "neither the decimal id"),
        ("-1", [embedding(2)], "neither the decimal id"),
        ("1.5", [embedding(2)], "neither the decimal id"),
        ("007", [embedding(2)], "neither the decimal id"),
        ("", [embedding(2)], "neither the decimal id"),
        ("9" * 40, [embedding(2)], "neither the decimal id"),
        ("٣", [embedding(2)], "neither the decimal id"),
        (151859, [embedding(2)], "must be a string"),
        ("7", [], "at least one tensor"),
        ("7", embedding(2), "must be a list"),
        ("7", None, "must be a list"),
        ("7", [None], "cannot be imported"),
        ("7", ["tensor"], "cannot be imported"),
        ("7", [object()], "cannot be imported"),
        ("7", [consumed()], "cannot be imported"),
        ("7", [embedding(2).numpy()[::-1]], "strides [-128, 1]"),
        ("7", [embedding(2).numpy().astype(np.complex64)], "DLPack type code 5"),
        ("7", [to_dlpack(embedding(2) > 0)], "DLPack type code 6"),
        ("7", [BrokenProducer()], "its producer says: not today"),
        ("7", [NoProducer()], "gave a int"),
        ("7", [datetime.datetime_CAPI], "the capsule was used before, or is none"),
        ("7", [embedding(2).int()], "torch.int32"),
        ("7", [embedding(2).to(torch.complex64)], "torch.complex64"),
        ("7", [embedding(2) > 0], "torch.bool"),
        ("7", [embedding(2)[0]], "shape"),
        ("7", [embedding(2)[None]], "shape"),
        ("7", [embedding(2)[:0]], "shape"),
        ("7", [embedding(2) / 0], "not finite"),
        ("7", [torch.full((2, HIDDEN), float("nan"), dtype=torch.bfloat16)], "not finite"),
        ("7", [embedding(2).to_sparse()], "strided"),
        ("7", [torch.empty(2, HIDDEN, device="meta")], "strided"),
        ("7", [embedding(2), embedding(2).int()], "tensor 1"),
        ("positions", [torch.zeros(3, 1, 4)], "whole numbers"),
        ("positions", [torch.zeros(2, 1, 4, dtype=torch.int32)], "positions are"),
        ("positions", [torch.zeros(3, 2, 4, dtype=torch.int32)], "positions are"),
        ("positions", [torch.full((3, 1, 4), -1)], "31 bits"),
        ("positions", [torch.full((3, 1, 4), 2**40)], "31 bits"),
        ("positions", [torch.zeros(3, 1, 0, dtype=torch.int32)], "whole numbers"),
        ("hash_input", [embedding(2)], "whole numbers"),
        ("grid_thw", [torch.tensor([1, 2, 2])], "frames, rows and columns"),
        ("grid_thw", [torch.tensor([[1, 0, 2]])], "frames, rows and columns"),
    ],
)
def test_content_that_cannot_be_is_refused_at_once(identifier: Any, content: Any, reason: str) -> None:
    info = MultiMediaInfo()
    status = info.add_multimedia_content(identifier, content)
    assert status == AsStatus.ALLSPARK_PARAM_ERROR
    assert reason in status.message
    assert not info.embeddings


def test_a_read_only_array_is_taken_or_refused_but_never_written_to() -> None:
    array = read_only()
    before = array.copy()
    assert MultiMediaInfo().add_multimedia_content("7", [array]) in (
        AsStatus.ALLSPARK_SUCCESS,
        AsStatus.ALLSPARK_PARAM_ERROR,
    )
    assert (array == before).all()


@pytest.mark.parametrize(
    ("ids", "info", "reason"),
    [
        ([5, IMAGE, IMAGE, 6], lambda: media(str(IMAGE), embedding(3)), "3 rows, its run of placeholders has 2"),
        ([5, IMAGE, IMAGE, 6], lambda: media(str(IMAGE), embedding(1)), "1 rows, its run of placeholders has 2"),
        ([5, IMAGE, 6], lambda: media(str(IMAGE), embedding(1), embedding(1)), f"1 runs of placeholder {IMAGE} for 2"),
        ([IMAGE, 6, IMAGE], lambda: media(str(IMAGE), embedding(1)), f"2 runs of placeholder {IMAGE} for 1"),
        ([5, 6], lambda: media(str(IMAGE), embedding(1)), f"0 runs of placeholder {IMAGE} for 1"),
        (
            [5, IMAGE],
            lambda: media(str(IMAGE), embedding(1, columns=127)),
            "127 columns, the model's hidden size is 128",
        ),
        ([5, IMAGE], lambda: media(str(IMAGE), embedding(1, columns=256)), "256 columns"),
        ([5, 99999999], lambda: None, "no multimedia content has the identifier '99999999'"),
        ([5, 99999999], lambda: media("9999999", embedding(1)), "no multimedia content"),
        ([5, -1], lambda: None, "input id 1 is -1"),
        ([5, VOCAB], lambda: None, f"input id 1 is {VOCAB}"),
        (
            [5, IMAGE],
            lambda: media(str(IMAGE), embedding(1), positions=torch.zeros(3, 1, 3, dtype=torch.int32)),
            "ask for one tensor",
        ),
        (
            [5, IMAGE],
            lambda: media(str(IMAGE), embedding(1), hash_input=torch.tensor([1])).extra("hash_input") and two_keys(),
            "2 tensors for 1",
        ),
        (
            [5, IMAGE],
            lambda: media(str(IMAGE), embedding(1), grid_thw=torch.tensor([[1, 2, 2], [1, 2, 2]])),
            "2 grids for 1",
        ),
        ([5, IMAGE], lambda: media(str(IMAGE), embedding(1), grid_thw=torch.tensor([[1, 4, 2]])), "is not 1 tokens"),
        ([5, IMAGE], lambda: media(str(IMAGE), embedding(1), grid_thw=torch.tensor([[4, 1, 1]])), "is not 1 tokens"),
        ([5, 6], lambda: {"151859": []}, "must be a MultiMediaInfo"),
    ],
)
def test_what_does_not_fit_its_prompt_is_refused_before_anything_is_scheduled(
    ids: list[int], info: Callable[[], Any], reason: str, engine: allspark.Engine
) -> None:
    before = engine.get_as_engine_stat(NAME).total_prefill_token
    status, handle, queue = engine.start_request_ids(NAME, None, ids, {**GREEDY, "mm_info": info()})
    assert status == AsStatus.ALLSPARK_PARAM_ERROR
    assert reason in status.message
    assert (handle, queue) == (None, None)
    assert engine.get_as_engine_stat(NAME).total_prefill_token == before
    assert usable(engine)


def two_keys() -> MultiMediaInfo:
    info = media(str(IMAGE), embedding(1), hash_input=torch.tensor([1]))
    info.add_multimedia_content("hash_input", [torch.tensor([2])])
    return info


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids with runs of two placeholders between words, and the true (placeholder, length) of the runs."""
    ids: list[int] = []
    runs: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(1, 4))):
        ids += draw(st.lists(st.integers(0, FIRST_SPECIAL - 1), min_size=1, max_size=3))
        token, length = draw(st.sampled_from([IMAGE, 2**40])), draw(st.integers(1, 5))
        ids += [token] * length
        runs.append((token, length))
    return ids, runs


@searched(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_request_is_accepted_exactly_when_every_tensor_fits(data: st.DataObject, engine: allspark.Engine) -> None:
    ids, runs = data.draw(prompts())
    wrong_run = data.draw(st.one_of(st.none(), st.integers(0, len(runs) - 1)), label="run that gets a wrong tensor")
    info = MultiMediaInfo()
    for i, (token, length) in enumerate(runs):
        columns, rows = HIDDEN, length
        if i == wrong_run:
            rows, columns = data.draw(
                st.tuples(st.integers(1, 6), st.sampled_from([1, HIDDEN - 1, HIDDEN, HIDDEN + 1])).filter(
                    lambda shape: shape != (length, HIDDEN)  # noqa: B023 - called at once
                )
            )
        base = embedding(rows * 2, i, columns * 2).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
        tensor = base[:: data.draw(st.sampled_from([1, 2])), :: data.draw(st.sampled_from([1, 2]))][:rows, :columns]
        assert info.add_multimedia_content(str(token), [to_dlpack(tensor)]) == AsStatus.ALLSPARK_SUCCESS
    status, handle, _ = engine.start_request_ids(
        NAME, None, ids, {**GREEDY, "max_length": len(ids) + 2, "mm_info": info}
    )
    if wrong_run is None:
        assert status == AsStatus.ALLSPARK_SUCCESS, status
        assert engine.sync_request(NAME, handle) == AsStatus.ALLSPARK_SUCCESS
        assert engine.release_request(NAME, handle) == AsStatus.ALLSPARK_SUCCESS  # type: ignore[arg-type]
    else:
        assert status == AsStatus.ALLSPARK_PARAM_ERROR
        assert handle is None
