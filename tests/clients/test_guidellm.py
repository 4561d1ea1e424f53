"""guidellm: a short run, and the figures that it reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import MODEL, URL

pytestmark = pytest.mark.clients


def test_guidellm_measures_the_server(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console-interactive"]
    options = {
        "backend": f"kind=openai_http,target={URL},model={MODEL}",
        "profile": "kind=synchronous",
        "constraint": "kind=max_requests,count=3",
        "tokenizer": f"kind=huggingface_auto,model={os.environ['DASHINFER_MODEL']}",
        "data": "kind=synthetic_text,prompt_tokens=16,output_tokens=8",
        "output": f"kind=json,path={report}",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads(report.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    assert metrics["request_totals"]["successful"] == 3
    assert metrics["output_token_count"]["successful"]["mean"] == 8
