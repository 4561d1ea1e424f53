"""SIGHUP: files are read again at once, and nothing ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from pathlib import Path

import httpx
import pytest

from dashinfer_vlm.config import ServerConfig
from dashinfer_vlm.server import files
from dashinfer_vlm.server.connection import Connection
from dashinfer_vlm.server.run import serve as run
from dashinfer_vlm.server.tls import Certificate
from tests.certificates import self_signed
from tests.server.conftest import Serve
from tests.server.test_tls import shown


async def test_a_hangup_has_keys_and_certificate_read_again_at_once_and_ends_nothing(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LOOK_S", 3600.0)  # nobody looks without being told
    monkeypatch.setattr(Connection, "max_connections", Connection.max_connections)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        self_signed(tmp_path / name)
    live, keys = shutil.copytree(tmp_path / "old", tmp_path / "live"), tmp_path / "keys"
    keys.write_text("one")
    certificate = Certificate(str(live / "certificate.pem"), str(live / "key.pem"))
    config = ServerConfig(host="127.0.0.1", api_keys_file=str(keys), log_level="warning")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    serving = asyncio.create_task(run((await serve()).service, config, certificate, [listener]))
    async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=False) as client:

        async def opens(key: str) -> bool:
            return (await client.get("/version", headers={"x-api-key": key})).status_code == 200

        assert await opens("one")
        keys.write_text("two")
        shutil.copytree(tmp_path / "new", live, dirs_exist_ok=True)
        assert [await opens(key) for key in ("one", "two")] == [True, False]
        os.kill(os.getpid(), signal.SIGHUP)
        while not await opens("two"):
            pass
        assert not await opens("one")
        assert await shown(port, None) == (tmp_path / "new" / "certificate.pem").read_text()
    os.kill(os.getpid(), signal.SIGTERM)
    await serving
