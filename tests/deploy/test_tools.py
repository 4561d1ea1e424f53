"""What the tools of others make of `deploy/`: linters, and a Prometheus that scrapes a server of ours."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT
from tests.deploy.test_files import expressions
from tests.server.conftest import Serve

pytestmark = pytest.mark.slow
DEPLOY = ROOT / "deploy"


def tool(name: str) -> str:
    """Its path; the test is skipped where it is not installed (`make test-deploy` installs them)."""
    if (found := shutil.which(name)) is None:
        pytest.skip(f"{name} is not installed")
    return found


def check(*command: str | Path) -> str:
    done = subprocess.run([tool(str(command[0])), *map(str, command[1:])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_hadolint_has_nothing_to_say() -> None:
    assert check("hadolint", DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda") == ""


def test_promtool_takes_rules_and_settings() -> None:
    assert "11 rules found" in check("promtool", "check", "rules", DEPLOY / "prometheus" / "alerts.yml")
    check("promtool", "check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "systemd" / "dashinfer-vlm.service").read_text()
    copy = tmp_path / "dashinfer-vlm.service"
    copy.write_text(unit.replace("/opt/dashinfer/bin/dashinfer_vlm_serve", "/bin/true"))
    assert check("systemd-analyze", "verify", copy) == ""


def _config(server_port: int) -> str:
    return f"""
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{DEPLOY / "prometheus" / "alerts.yml"}]
scrape_configs:
  - job_name: dashinfer-vlm
    static_configs: [{{targets: ["127.0.0.1:{server_port}"]}}]
"""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def _until(client: httpx.AsyncClient, query: str) -> list[Any]:
    """What `query` gives, once it gives something."""
    for _ in range(300):
        try:
            found = (await client.get("/api/v1/query", params={"query": query})).json()["data"]["result"]
        except (httpx.TransportError, KeyError):
            found = []
        if found:
            return list(found)
        await asyncio.sleep(0.1)
    raise AssertionError(f"{query} gave nothing")


async def test_prometheus_evaluates_all_rules_and_queries(serve: Serve, tmp_path: Path) -> None:
    running, port = await serve("hello"), _free_port()
    (tmp_path / "prometheus.yml").write_text(_config(running.port))
    process = await asyncio.create_subprocess_exec(
        tool("prometheus"),
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            assert (await _until(client, "up"))[0]["value"][1] == "1"
            for _ in range(4):
                body = {"messages": [{"role": "user", "content": "a"}]}
                await running.post("/v1/chat/completions", body)
                await asyncio.sleep(1)
            (tokens,) = await _until(client, "vllm:request_success_total{finished_reason='stop'} >= 4")
            assert tokens["metric"]["model_name"] == "models/scripted"
            await _check_rules(client)
            await _check_queries(client)
    finally:
        process.terminate()
        await process.wait()


async def _check_rules(client: httpx.AsyncClient) -> None:
    groups = (await client.get("/api/v1/rules")).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 11
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


async def _check_queries(client: httpx.AsyncClient) -> None:
    for expression in expressions():
        query = expression.replace("$model_name", "models/scripted").replace("$instance", ".*")
        reply = await client.get("/api/v1/query", params={"query": query.replace("$__rate_interval", "30s")})
        assert reply.json()["status"] == "success", (expression, reply.text)
