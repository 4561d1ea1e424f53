"""One loaded model for all tests of the offline API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dashinfer_vlm import VLM
from tests.conftest import CheckpointMaker


@pytest.fixture(scope="package")
def vlm(checkpoint: CheckpointMaker) -> Iterator[VLM]:
    with VLM(
        checkpoint(),
        dtype="float32",
        device="cpu",
        max_length=1024,
        kv_cache_gib=0.1,
        threads=1,
        progress=False,
        enable_mm_embeds=True,
    ) as loaded:
        yield loaded
