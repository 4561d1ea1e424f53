"""openai from npm and the AI SDK, by node's own test runner; their packages are installed below build/clients/npm."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "clients" / "npm"


@pytest.fixture(scope="module")
def folder() -> Path:
    shutil.copytree(HERE / "npm", BUILD, dirs_exist_ok=True)
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=BUILD, check=True)
    return BUILD


@pytest.mark.parametrize("name", ["openai", "ai"])
def test_a_client_of_npm_is_served(folder: Path, name: str, picture: str) -> None:
    done = subprocess.run(
        ["node", "--test", f"{name}.test.mjs"],
        cwd=folder,
        env={**os.environ, "DASHINFER_PICTURE": picture},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
