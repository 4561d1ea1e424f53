"""Fixtures that every room shares: random checkpoints in the published format, made once and kept."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch

import make_checkpoint
from tests.searching import register_profiles

ROOT = Path(__file__).resolve().parents[1]

LONGEST = frozenset({"test_gpu_check.py", "test_cards_parity.py"})
"""Files that come first, so that no process is left alone with one of them at the end."""

CheckpointMaker = Callable[..., Path]

if not torch.cuda.is_available():  # the kernels for cards run interpreted; triton reads this when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"


register_profiles()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected lives as long as the process: a million objects, each look at which would take the
    garbage collector a second of some test's time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))


@pytest.fixture(autouse=True)
def level_of_the_log() -> Iterator[None]:
    """Commands that run inside a test set it for their whole process."""
    package = logging.getLogger("dashinfer_vlm")
    level = package.level
    yield
    package.setLevel(level)


@pytest.fixture(scope="session")
def checkpoint() -> CheckpointMaker:
    """`checkpoint("qwen2_vl", size="tiny", dtype="float32", seed=0)` gives the folder of a random checkpoint."""
    version = hashlib.sha256(Path(make_checkpoint.__file__).read_bytes()).hexdigest()[:12]
    store = ROOT / "build" / "test-checkpoints" / version
    store.mkdir(parents=True, exist_ok=True)

    def make(arch: str = "qwen2_vl", *, size: str = "tiny", dtype: str = "float32", seed: int = 0) -> Path:
        folder = store / f"{arch}-{size}-{dtype}-{seed}"
        if not folder.is_dir():
            _write(folder, arch, size, dtype=dtype, seed=seed)
        return folder

    return make


def _write(folder: Path, arch: str, size: str, *, dtype: str, seed: int) -> None:
    """Appear at once or not at all: another run of the tests may look at the same moment."""
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    with torch.random.fork_rng():
        make_checkpoint.write_checkpoint(unfinished, arch, size, seed=seed, dtype=dtype)
    try:
        unfinished.rename(folder)
    except OSError:  # the other run was faster
        shutil.rmtree(unfinished)
