"""One tokenizer and one template for all tests of the front end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.conftest import CheckpointMaker


@pytest.fixture(scope="session")
def folder(checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything of a checkpoint but its weights. Text is normalised to NFC, as in the published tokenizers."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for path in checkpoint("qwen2_vl").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "NFC"}}))
    return folder


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate.from_folder(folder, tokenizer)
