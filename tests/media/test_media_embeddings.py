"""Embeddings that their sender brings: every kind that can be, and every reason why one cannot."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import save as save_torch
from tests.media.site import LoaderMaker

from dashinfer_vlm.errors import MediaError, MediaTooLargeError, UnsupportedError
from dashinfer_vlm.media.embeddings import read_embedding
from dashinfer_vlm.media.types import GivenEmbedding, MediaRef

ROWS = np.arange(24, dtype=np.float32).reshape(6, 4) / 7
GRID = save({"grid": np.array([1, 4, 6])})


def text(file: bytes) -> str:
    return base64.b64encode(file).decode()


def ref(embeds: bytes, grid: bytes = GRID) -> MediaRef:
    given = GivenEmbedding(text(embeds), text(grid))
    return MediaRef(kind="image", source=given, param="messages[0].content[0].image_embeds")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 4), (1, 6, 4)])
def test_every_float_becomes_float32(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = torch.from_numpy(ROWS).to(dtype)
    rows, grid = read_embedding(save_torch({"any": sent.reshape(shape)}), GRID, merge_size=2)
    assert np.array_equal(rows, sent.float().numpy())
    assert rows.dtype == np.float32
    assert grid == (1, 4, 6)


@pytest.mark.parametrize("grid", [np.array([[1, 4, 6]]), np.array([1, 4, 6], np.int32), np.array([1, 4, 6], np.uint8)])
def test_a_grid_may_be_any_integers(grid: np.ndarray) -> None:
    assert read_embedding(save({"x": ROWS}), save({"grid": grid}), merge_size=2)[1] == (1, 4, 6)


def bad(values: Any) -> bytes:
    return save({"x": np.asarray(values)})


@pytest.mark.parametrize(
    ("embeds", "grid", "message"),
    [
        (b"nonsense", GRID, "image_embeds is not a safetensors file"),
        (b"\xff" * 100, GRID, "image_embeds is not a safetensors file"),
        (save({"a": ROWS, "b": ROWS}), GRID, "2 tensors"),
        (save({}), GRID, "0 tensors"),
        (bad(ROWS.astype(np.int32)), GRID, "image_embeds is I32"),
        (bad(ROWS[0]), GRID, r"shape \[4\]"),
        (bad(ROWS[None, None, :, :][:, [0, 0]]), GRID, r"shape \[2, 6, 4\]"),
        (bad(ROWS[:0]), GRID, r"shape \[0, 4\]"),
        (bad(np.where(ROWS > 2, np.nan, ROWS)), GRID, "not finite"),
        (bad(np.where(ROWS > 2, np.inf, ROWS)), GRID, "not finite"),
        (bad(ROWS.astype(np.float64) * 1e300), GRID, "not finite"),
        (save_torch({"x": torch.full((6, 4), torch.nan, dtype=torch.bfloat16)}), GRID, "not finite"),
        (bad(ROWS), b"", "image_grid_thw is not a safetensors file"),
        (bad(ROWS), bad([1.0, 4.0, 6.0]), "three integers"),
        (bad(ROWS), bad([4, 6]), "three integers"),
        (bad(ROWS), bad([-1, -4, 6]), "from 1 on"),
        (bad(ROWS), bad([2**40, 4, 6]), "from 1 on"),
        (bad(ROWS), bad([1, 4, 4]), "not the 6 rows"),
        (bad(ROWS), bad([1, 3, 8]), "not the 6 rows"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(embeds: bytes, grid: bytes, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        read_embedding(embeds, grid, merge_size=2)


async def test_an_embedding_is_shared_and_known_by_its_values(make_loader: LoaderMaker) -> None:
    loader = make_loader(enable_mm_embeds=True)
    first = await loader.load(ref(save({"x": ROWS})))
    assert first.is_embedding
    assert np.array_equal(first.features.open(), ROWS)
    assert (first.grid, first.num_tokens) == ((1, 4, 6), 6)
    same, other = await loader.load(ref(save({"y": ROWS}))), await loader.load(ref(save({"x": ROWS + 1})))
    assert first.content_hash == same.content_hash != other.content_hash
    for medium in (first, same, other):
        medium.release()


async def test_equal_embeddings_under_another_salt_share_nothing(make_loader: LoaderMaker) -> None:
    loader = make_loader(enable_mm_embeds=True)
    loaded = [await loader.load(ref(save({"x": ROWS})), salt=salt) for salt in ("", "a", "b", "a")]
    assert (loader.counters.cache_misses, loader.counters.cache_hits) == (3, 1)
    assert len({medium.content_hash for medium in loaded}) == 3
    for medium in loaded:
        medium.release()


async def test_no_embedding_is_taken_unless_the_server_says_so(make_loader: LoaderMaker) -> None:
    with pytest.raises(UnsupportedError, match="--enable-mm-embeds") as caught:
        await make_loader().load(ref(save({"x": ROWS})))
    assert caught.value.param == "messages[0].content[0].image_embeds"


async def test_an_embedding_keeps_to_the_limits_of_an_image(make_loader: LoaderMaker) -> None:
    loader = make_loader(enable_mm_embeds=True, max_image_mib=1)
    with pytest.raises(MediaTooLargeError):
        await loader.load(ref(save({"x": np.zeros((600, 512), np.float32)})))
    with pytest.raises(MediaError) as caught:
        await loader.load(MediaRef(kind="image", source=GivenEmbedding("!!!", text(GRID)), param="here"))
    assert caught.value.param == "here"
    assert loader.raw_bytes_free > 0
