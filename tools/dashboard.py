"""Makes Grafana's dashboard out of the table below: `python tools/dashboard.py > deploy/grafana/dashboard.json`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

WHERE = 'model_name="$model_name",instance=~"$instance"'
OURS = 'instance=~"$instance"'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

Query = tuple[str, str]
"""PromQL, and the name of what it gives."""


def quantiles(metric: str, where: str, by: str = "") -> list[Query]:
    group = f"le, {by}" if by else "le"
    return [
        (
            f"histogram_quantile({q}, sum by ({group}) (rate({metric}_bucket{{{where}}}[$__rate_interval])))",
            f"p{q * 100:g} {{{{{by}}}}}" if by else f"p{q * 100:g}",
        )
        for q in (0.5, 0.95, 0.99)
    ]


def rate(metric: str, where: str, by: str = "") -> str:
    inner = f"rate({metric}{{{where}}}[$__rate_interval])"
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


STAGES = (
    f"sum by (stage) (rate(dashinfer_stage_seconds_sum{{{OURS}}}[$__rate_interval])) / "
    f"sum by (stage) (rate(dashinfer_stage_seconds_count{{{OURS}}}[$__rate_interval]))"
)
FREE = f"sum(dashinfer_engine_num_free_blocks{{{OURS}}}) / sum(dashinfer_engine_num_blocks{{{OURS}}})"

ROWS: tuple[tuple[str, tuple[tuple[str, str, list[Query]], ...]], ...] = (
    (
        "What clients feel",
        (
            ("Time to the first token", "s", quantiles("vllm:time_to_first_token_seconds", WHERE)),
            ("Time between tokens", "s", quantiles("vllm:inter_token_latency_seconds", WHERE)),
            ("Time of whole requests", "s", quantiles("vllm:e2e_request_latency_seconds", WHERE)),
            ("Answers by status", "reqps", [(rate("dashinfer_http_replies_total", OURS, "status"), "{{status}}")]),
        ),
    ),
    (
        "Load",
        (
            (
                "Requests",
                "short",
                [
                    (f"sum(vllm:num_requests_running{{{WHERE}}})", "running"),
                    (f"sum(vllm:num_requests_waiting{{{WHERE}}})", "waiting"),
                    (f"sum(dashinfer_requests_in_flight{{{OURS}}})", "in flight, with media under way"),
                ],
            ),
            (
                "Tokens per second",
                "short",
                [
                    (rate("vllm:prompt_tokens_total", WHERE), "prompts"),
                    (rate("vllm:generation_tokens_total", WHERE), "answers"),
                    (rate("dashinfer_engine_num_cached_tokens_total", OURS), "found in the prefix cache"),
                ],
            ),
            ("Refusals by reason", "reqps", [(rate("dashinfer_refusals_total", OURS, "reason"), "{{reason}}")]),
            ("Answers by how they ended", "reqps", [(rate("dashinfer_choices_total", OURS, "reason"), "{{reason}}")]),
        ),
    ),
    (
        "Where the time goes",
        (
            ("Mean of each stage", "s", [(STAGES, "{{stage}}")]),
            ("95th percentile of each stage", "s", quantiles("dashinfer_stage_seconds", OURS, "stage")[1:2]),
            (
                "Share of steps that the vision encoder takes",
                "percentunit",
                [
                    (
                        f"{rate('dashinfer_engine_encoder_seconds_total', OURS)} / "
                        f"({rate('dashinfer_engine_step_seconds_total', OURS)} + "
                        f"{rate('dashinfer_engine_encoder_seconds_total', OURS)})",
                        "encoder",
                    )
                ],
            ),
            (
                "Expected wait",
                "s",
                [(f"sum(dashinfer_queued_encoder_seconds{{{OURS}}})", "for the vision encoder")],
            ),
        ),
    ),
    (
        "Memory and caches",
        (
            (
                "KV cache",
                "percentunit",
                [(f"avg(vllm:kv_cache_usage_perc{{{WHERE}}})", "held"), (FREE, "free or holding prefixes")],
            ),
            (
                "Found in caches",
                "percentunit",
                [
                    (
                        f"{rate('vllm:prefix_cache_hits_total', WHERE)} / "
                        f"{rate('vllm:prefix_cache_queries_total', WHERE)}",
                        "tokens of prompts",
                    ),
                    (
                        f"{rate('vllm:mm_cache_hits_total', WHERE)} / {rate('vllm:mm_cache_queries_total', WHERE)}",
                        "decoded media",
                    ),
                    (
                        f"{rate('dashinfer_engine_embedding_hits_total', OURS)} / "
                        f"({rate('dashinfer_engine_embedding_hits_total', OURS)} + "
                        f"{rate('dashinfer_engine_embedding_misses_total', OURS)})",
                        "embeddings",
                    ),
                ],
            ),
            (
                "Bytes",
                "bytes",
                [
                    (f"sum(dashinfer_media_cache_bytes{{{OURS}}})", "decoded media"),
                    (f"sum(dashinfer_engine_embedding_bytes{{{OURS}}})", "embeddings"),
                    (f'sum(process_resident_memory_bytes{{job=~".*dashinfer.*",{OURS}}})', "HTTP process"),
                ],
            ),
            (
                "What went wrong",
                "short",
                [
                    (rate("dashinfer_engine_num_preemptions_total", OURS), "preemptions"),
                    (rate("dashinfer_media_failures_total", OURS), "media that could not be used"),
                    (rate("dashinfer_engine_num_encoder_failures_total", OURS), "items that could not be encoded"),
                    (rate("dashinfer_media_worker_restarts_total", OURS), "decoding processes started again"),
                ],
            ),
        ),
    ),
)


def panel(number: int, place: tuple[int, int], title: str, unit: str, queries: list[Query]) -> dict[str, Any]:
    x, y = place
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": DATASOURCE,
        "gridPos": {"h": 8, "w": 6, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"showPoints": "never"}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"datasource": DATASOURCE, "expr": expression, "legendFormat": name, "refId": chr(ord("A") + i)}
            for i, (expression, name) in enumerate(queries)
        ],
    }


def variable(name: str, label: str, query: str, *, several: bool) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "includeAll": several,
        "multi": several,
        **({"current": {"text": "All", "value": "$__all"}} if several else {}),
    }


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    for row, (title, cells) in enumerate(ROWS):
        y = row * 9
        place = {"h": 1, "w": 24, "x": 0, "y": y}
        panels.append({"id": 100 + row, "type": "row", "title": title, "gridPos": place, "panels": []})
        panels += [panel(row * 4 + i + 1, (6 * i, y + 1), *cell) for i, cell in enumerate(cells)]
    instances = 'label_values(vllm:num_requests_running{model_name="$model_name"}, instance)'
    return {
        "uid": "dashinfer-vlm",
        "title": "DashInfer-VLM",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                variable("model_name", "Model", "label_values(vllm:num_requests_running, model_name)", several=False),
                variable("instance", "Server", instances, several=True),
            ]
        },
        "panels": panels,
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    json.dump(dashboard(), sys.stdout, indent=2)
    sys.stdout.write("\n")
