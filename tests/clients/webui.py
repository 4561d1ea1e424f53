"""A running Open WebUI with its default settings, for the tests of its HTTP API."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

__all__ = ["webui"]


@pytest.fixture(scope="module")
def webui(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of its HTTP API who has signed in. Offline: it would fetch an embedding model for documents."""
    folder = tmp_path_factory.mktemp("webui")
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    settings = {
        "DATA_DIR": str(folder),
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "secret",
        "ENABLE_OLLAMA_API": "False",
        "OPENAI_API_BASE_URLS": url,
        "OPENAI_API_KEYS": "EMPTY",
        "OFFLINE_MODE": "True",
        "RAG_EMBEDDING_ENGINE": "openai",
    }
    command = [str(Path(sys.executable).with_name("open-webui")), "serve", "--port", str(port)]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, **settings}, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://localhost:{port}", timeout=120) as client:
            _wait(client, process)
            signed = client.post("/api/v1/auths/signin", json={"email": "admin@localhost", "password": "admin"}).json()
            client.headers["Authorization"] = f"Bearer {signed['token']}"
            client.get("/api/models")  # as its page does; until then it knows no model
            yield client
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def _wait(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert process.poll() is None, "it has ended"
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError("it did not become ready")
