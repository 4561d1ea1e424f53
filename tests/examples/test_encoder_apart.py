"""The example with two processes and a socket gives the answer that one process gives."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dashinfer_vlm import VLM, SamplingParams
from tests.conftest import ROOT, CheckpointMaker

EXAMPLE = ROOT / "examples" / "encoder_apart"
QUESTION = "What is this?"


def test_an_encoder_in_another_process_gives_the_same_answer(
    checkpoint: CheckpointMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, picture = checkpoint("qwen2_5_vl"), tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (84, 112, 3), np.uint8)).save(picture)
    with VLM(folder, dtype="float32", device="cpu", max_length=512, kv_cache_gib=0.1, progress=False) as vlm:
        content = [{"type": "image", "image": picture}, QUESTION]
        params = SamplingParams(max_tokens=16, temperature=0.0)
        expected = vlm.chat([{"role": "user", "content": content}], params).text

    model = [sys.executable, str(EXAMPLE / "language_model.py"), str(folder), "--port", "0", "--requests", "1"]
    limits = ["--dtype", "float32", "--max-length", "512", "--max-tokens", "16"]
    with subprocess.Popen([*model, *limits], stdout=subprocess.PIPE, text=True) as language_model:
        assert language_model.stdout is not None
        port = language_model.stdout.readline().split()[-1]
        monkeypatch.syspath_prepend(EXAMPLE)
        encoder = ["encoder.py", str(folder), "127.0.0.1", port, str(picture), QUESTION, "--dtype", "float32"]
        monkeypatch.setattr(sys, "argv", encoder)
        capsys.readouterr()  # of what was printed before
        runpy.run_path(str(EXAMPLE / "encoder.py"), run_name="__main__")
        assert language_model.wait() == 0
    assert capsys.readouterr().out == expected + "\n"
    assert expected
