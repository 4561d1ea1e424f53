"""What is in `deploy/` fits the server: its metrics, its flags, its routes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from dashinfer_vlm import flags
from tests.conftest import ROOT
from tests.server.conftest import Serve

DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "dashinfer-vlm"
METRIC = re.compile(r"\b(?:vllm:|dashinfer_|process_)\w+")


def expressions() -> Iterator[str]:
    """All PromQL of the dashboard and of the alerts."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    yield from (target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", []))
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    yield from (rule["expr"] for group in alerts["groups"] for rule in group["rules"])


async def test_dashboard_and_alerts_ask_for_metrics_that_there_are(serve: Serve) -> None:
    running = await serve(config={"api_keys": ("key",)})
    key = {"Authorization": "Bearer key"}
    await running.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, headers=key)
    text = (await running.get("/metrics", headers=key)).text
    there = {name for family in text_string_to_metric_families(text) for name in (family.name, *_samples(family))}
    there |= {f"{name}_total" for name in there}  # counters with labels have no sample before the first event
    asked = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert len(asked) > 30
    assert asked <= there


def _samples(family: Any) -> set[str]:
    return {sample.name for sample in family.samples}


def test_the_dashboard_is_what_its_tool_makes() -> None:
    command = [sys.executable, str(ROOT / "tools" / "dashboard.py")]
    made = subprocess.run(command, capture_output=True, check=True)
    assert made.stdout == (DEPLOY / "grafana" / "dashboard.json").read_bytes()
    refused = subprocess.run([*command, "--out"], capture_output=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, b"")


def test_the_charts_values_fit_their_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.validate(values, schema)
    assert values.keys() == schema["properties"].keys() - {"global"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**values, "replica": 2}, schema)


def test_a_chart_with_keys_and_a_monitor_needs_the_key_of_the_monitor() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    keys, monitor = {"apiKeysSecret": "keys"}, {"monitoring": {"enabled": True, "apiKeySecret": "key"}}
    for good in (keys, monitor, {**keys, **monitor}):
        jsonschema.validate({**values, **good}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**values, **keys, "monitoring": {"enabled": True, "apiKeySecret": ""}}, schema)


def test_the_chart_uses_its_values_and_no_others() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    asked = set(re.findall(r"\.Values\.([\w.]+)", templates))
    known = {*values, *(f"{a}.{b}" for a, under in values.items() if isinstance(under, dict) for b in under)}
    assert asked <= known
    assert {name.split(".")[0] for name in asked} == set(values)


def test_flags_in_deploy_are_flags_of_the_server() -> None:
    fields = {item.field for face in flags.FACES for item in flags.flags_of(face)}
    aliases = {alias for face in flags.FACES for item in flags.flags_of(face) for alias in item.aliases}
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert {name.replace("-", "_") for name in values["flags"]} <= fields
    template = (CHART / "templates" / "deployment.yaml").read_text()
    compose = yaml.safe_load((DEPLOY / "compose" / "compose.yml").read_text())["services"]["server"]["command"]
    spelt = {*re.findall(r"- --([\w-]+)=", template), *(word[2:] for word in compose if word.startswith("--"))}
    assert spelt
    assert {name for name in spelt if name.replace("-", "_") not in fields} <= aliases
    files = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda", DEPLOY / "systemd" / "dashinfer-vlm.service"]
    variables = {name for path in files for name in re.findall(r"DASHINFER_(\w+)=", path.read_text())}
    assert {name.lower() for name in variables} <= fields


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_images_run_as_somebody_and_tell_their_health(name: str) -> None:
    lines = (DEPLOY / name).read_text().splitlines()
    last_stage = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert "USER 10001" in last_stage
    assert 'ENTRYPOINT ["dashinfer_vlm_serve"]' in last_stage
    assert any(line.startswith("HEALTHCHECK ") for line in last_stage)
    assert not any("build-essential" in line for line in last_stage), "the compiler stays in the first stage"


def test_what_a_build_needs_is_given_to_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    given = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source
        for name in ("Dockerfile", "Dockerfile.cuda")
        for line in (DEPLOY / name).read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert copied == given
    assert all(Path(ROOT / name).exists() for name in copied)
