"""A real server whose engine is killed: what clients and probes see, until it is back, and when it is not."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import httpx

from tests.e2e.serving import Server, descendants

CHAT = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 2000, "ignore_eos": True}
STARTED_AGAIN = re.compile("the engine was started again and takes requests")


def kill_engine(server: Server) -> None:
    (engine,) = (
        pid
        for pid in descendants(server.process.pid)
        if b"dashinfer_vlm.engine.host.child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(engine, signal.SIGKILL)


def test_an_engine_that_was_killed_is_back_and_one_that_is_killed_again_ends_the_server(model_folder: Path) -> None:
    server = Server("--model", str(model_folder), "--port", "0", "--kv-cache-gib", "0.05", "--max-engine-restarts", "1")
    try:
        address = server.wait_ready()
        with httpx.stream("POST", f"{address}/v1/chat/completions", json={**CHAT, "stream": True}, timeout=60) as reply:
            lines = (line for line in reply.iter_lines() if line)
            next(lines)
            kill_engine(server)
            *_, last = lines
        assert '"code":"engine_dead"' in last
        refused = httpx.post(f"{address}/v1/chat/completions", json=CHAT, timeout=60)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "30")
        assert [httpx.get(f"{address}/{probe}").status_code for probe in ("health", "ready")] == [200, 503]
        server.wait_line(STARTED_AGAIN)
        assert httpx.get(f"{address}/ready").status_code == 200
        answer = httpx.post(f"{address}/v1/chat/completions", json={**CHAT, "max_tokens": 2}, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 2
        kill_engine(server)
        assert server.wait_end() == 1
        assert "Traceback" not in server.text
    finally:
        server.kill()
