"""aiperf: a short run over streams, with pictures, and the figures that it reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import MODEL, URL

pytestmark = pytest.mark.clients


def test_aiperf_measures_the_server(tmp_path: Path) -> None:
    options = {
        "model": MODEL,
        "url": URL,
        "endpoint-type": "chat",
        "request-count": "4",
        "concurrency": "2",
        "tokenizer": os.environ["DASHINFER_MODEL"],
        "synthetic-input-tokens-mean": "16",
        "output-tokens-mean": "8",
        "image-width-mean": "64",
        "image-height-mean": "64",
        "artifact-dir": str(tmp_path),
        "ui": "none",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--streaming", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    assert figures["request_count"]["avg"] == 4
    assert figures["time_to_first_token"]["avg"] > 0
