"""The bench clients of vLLM and SGLang: short runs with texts and with pictures, in which every request is answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import MODEL, URL

pytestmark = pytest.mark.clients

CHECKPOINT = os.environ.get("DASHINFER_MODEL", "")
SHARED = {
    "base-url": URL,
    "model": MODEL,
    "num-prompts": "4",
    "max-concurrency": "2",
    "random-input-len": "16",
    "random-output-len": "8",
}
VLLM = {
    "texts": {"backend": "openai", "dataset-name": "random"},
    "pictures": {
        "backend": "openai-chat",
        "endpoint": "/v1/chat/completions",
        "dataset-name": "random-mm",
        "random-mm-bucket-config": "{(64, 64, 1): 1.0}",
        "random-mm-limit-mm-per-prompt": '{"image": 1, "video": 0}',
    },
}
SGLANG = {
    "texts": {"backend": "sglang-oai", "dataset-name": "random-ids"},
    "pictures": {
        "backend": "sglang-oai-chat",
        "dataset-name": "image",
        "image-count": "1",
        "image-resolution": "64x64",
    },
}


def measured(module: list[str], options: dict[str, str], report: Path) -> dict[str, Any]:
    """What the client has written to `report`, after a run without a hub in its folder."""
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", *module, *flags],
        cwd=report.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return figures


@pytest.mark.parametrize("kind", VLLM)
def test_vllms_requests_are_answered(kind: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    module = ["vllm.entrypoints.cli.main", "bench", "serve", "--save-result"]
    figures = measured(
        module, {**SHARED, **VLLM[kind], "tokenizer": CHECKPOINT, "result-filename": str(report)}, report
    )
    assert (figures["completed"], figures["failed"]) == (4, 0)


@pytest.mark.parametrize("kind", SGLANG)
def test_sglangs_requests_are_answered(kind: str, tmp_path: Path) -> None:
    """It loads the processor of pictures from the folder that is named as the model is."""
    (tmp_path / MODEL).symlink_to(CHECKPOINT)
    report = tmp_path / "report.json"
    figures = measured(["sglang.bench_serving"], {**SHARED, **SGLANG[kind], "output-file": str(report)}, report)
    assert figures["completed"] == 4
