"""The real server of a tiny random model, and its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tests.e2e.serving import Server

import make_checkpoint

__all__ = ["TIMEOUT_S", "Metrics", "model_folder", "serving"]

TIMEOUT_S = 300.0
"""A request that takes longer hangs; a busy machine answers the slowest in a few seconds."""
MODELS = Path("build/trust/models")


class Metrics(dict[str, float]):
    """`/metrics` at a moment: values without labels by name."""

    labelled: dict[str, float]
    """Sums over labels."""

    @classmethod
    def of(cls, url: str) -> Metrics:
        text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S, trust_env=False).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        found = cls({sample.name: sample.value for sample in samples if not sample.labels})
        found.labelled = {}
        for sample in samples:
            found.labelled[sample.name] = found.labelled.get(sample.name, 0.0) + sample.value
        return found

    def sum(self, name: str) -> float:
        return self.labelled.get(name, 0.0)


def model_folder(arch: str) -> Path:
    """A tiny checkpoint, made once."""
    folder = MODELS / arch
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        make_checkpoint.write_checkpoint(folder, arch, "tiny", seed=0, dtype="bfloat16")
    return folder


@contextmanager
def serving(
    folder: Path, *flags: str, env: Mapping[str, str] | None = None, under: Sequence[str] = ()
) -> Iterator[Server]:
    """A server that is ready, on a free port; it is killed where the block leaves it running."""
    server = Server("--model", str(folder), "--port", "0", *flags, env=env, under=under)
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()
