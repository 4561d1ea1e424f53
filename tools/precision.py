"""What quantisation costs: the error of the logits, and the bundled model's answers, for every precision.

    PYTHONPATH=.:tools python tools/precision.py --questions 500

The error is ||logits - whole|| / ||logits of whole weights||, over prompts of random words and a picture of noise. With
random weights that is the rounding alone; answers say what it does to a model that has learnt something. Exits with 1
when int8 loses more than one point of exact answers against whole weights, or int4 more than two.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tests.models.driving import Driver, image, prompt

from dashinfer_vlm.bench.spans import replaced
from dashinfer_vlm.config import EngineConfig, KVCacheDTypeName, QuantTypeName, VisionQuantTypeName
from dashinfer_vlm.hub import DEMO_MODEL
from dashinfer_vlm.layers import fp8
from dashinfer_vlm.layers.backend import Backend, choose_backend
from dashinfer_vlm.layers.card_backend import float_linears
from dashinfer_vlm.models import loading
from dashinfer_vlm.models.loading import load_model
from demo_model.cases import Case, held_out_cases
from demo_model.placements import GREEDY, loaded, with_media
from make_checkpoint import write_checkpoint

CASES = [prompt(9, image(112, 84, seed), 40, seed=seed) for seed in range(3)]
RANDOM_MODELS = Path("build/precision")


@dataclass(frozen=True, slots=True)
class Precision:
    text: QuantTypeName
    vision: VisionQuantTypeName
    most_points: float
    """Of exact answers that it may lose against whole weights."""
    kv: KVCacheDTypeName = "auto"

    @property
    def name(self) -> str:
        text = "bf16" if self.text == "none" else self.text
        vision = "" if self.vision == "none" else f", vision {self.vision}"
        return text + vision + ("" if self.kv == "auto" else f", KV {self.kv}")


WHOLE = Precision("none", "none", 0)
PRECISIONS = (
    WHOLE,
    Precision("none", "a8w8", 1),
    Precision("a8w8", "none", 1),
    Precision("a8w8", "a8w8", 1),
    Precision("a16w8", "none", 1),
    Precision("a16w8", "a8w8", 1),
    Precision("a16w4", "none", 2),
    Precision("a16w4", "a8w8", 2),
    Precision("fp8", "none", 1),
    Precision("none", "none", 1, kv="int8"),
    Precision("a8w8", "a8w8", 1, kv="int8"),
    Precision("fp8", "none", 1, kv="int8"),
)
"""fp8 is computed in plain torch, as a card would: its layers alone are rounded, activations are float32 elsewhere."""


@dataclass(frozen=True, slots=True)
class Row:
    precision: str
    errors: dict[str, float]
    """Of the logits, per model."""
    exact: float
    """Share of exact answers of the bundled model."""
    same: float
    """Share of answers that are those of whole weights, right or wrong."""
    is_within: bool

    def __str__(self) -> str:
        errors = "".join(f"{error:12.4f}" for error in self.errors.values())
        verdict = "" if self.is_within else "  too many lost"
        return f"{self.precision:28}{errors}{self.exact:10.2%}{self.same:10.2%}{verdict}"


@contextmanager
def computing(precision: Precision) -> Iterator[dict[str, Any]]:
    """Options of an engine that computes so on this machine."""
    text = "none" if precision.text == "fp8" else precision.text
    options = {
        "device": "cpu",
        "quant_type": text,
        "vision_quant_type": precision.vision,
        "kv_cache_dtype": precision.kv,
        "quant_cache_gib": 0.0,
    }
    chosen = loading.choose_backend if precision.text != "fp8" else with_plain_floats
    with replaced(loading, "choose_backend", chosen):
        yield options


def with_plain_floats(device: torch.device, dtype: torch.dtype, *_: object) -> Backend:
    linears = float_linears(device, torch.float32, fp8.REFERENCE)
    return replace(choose_backend(device, dtype), make_linear=linears)


def logits(folder: Path, precision: Precision) -> torch.Tensor:
    """float32 [T, vocab] over all prompts."""
    with computing(precision) as options:
        driver = Driver(
            load_model(EngineConfig(model=str(folder), **options)),
            kv_dtype=torch.int8 if precision.kv == "int8" else None,
        )
    return torch.cat([driver.run(driver.start(case)) for case in CASES])


def answers(folder: Path, precision: Precision, cases: list[Case]) -> list[str]:
    with computing(precision) as options, loaded(folder, **options) as vlm:
        return [result.text for result in vlm.chat([with_media(case) for case in cases], GREEDY)]


def survey(models: dict[str, Path], demo: Path, cases: list[Case]) -> Iterator[Row]:
    whole = {name: logits(folder, WHOLE) for name, folder in models.items()}
    said = answers(demo, WHOLE, cases)
    exact_whole = exact_share(said, cases)
    for precision in PRECISIONS:
        errors = {
            name: float((logits(folder, precision) - whole[name]).norm() / whole[name].norm())
            for name, folder in models.items()
        }
        now = said if precision is WHOLE else answers(demo, precision, cases)
        exact = exact_share(now, cases)
        same = sum(a == b for a, b in zip(now, said, strict=True)) / len(cases)
        yield Row(precision.name, errors, exact, same, 100 * (exact_whole - exact) <= precision.most_points)


def exact_share(said: list[str], cases: list[Case]) -> float:
    return sum(answer == case.answer for answer, case in zip(said, cases, strict=True)) / len(cases)


def random_model(arch: str) -> Path:
    folder = RANDOM_MODELS / arch
    if not (folder / "config.json").exists():
        write_checkpoint(folder, arch, "small", seed=0, dtype="bfloat16")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=DEMO_MODEL, help="a checkpoint that answers")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RANDOM_MODELS / "precision.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    models = {"qwen2_vl": random_model("qwen2_vl"), "qwen2_5_vl": random_model("qwen2_5_vl"), "demo": args.model}
    print(f"{'':28}{''.join(f'{name:>12}' for name in models)}{'exact':>10}{'same':>10}", flush=True)
    rows = []
    for row in survey(models, args.model, list(held_out_cases(args.questions))):
        rows.append(row)
        print(row, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"questions": args.questions, "rows": [asdict(row) for row in rows]}, indent=1))
    return 0 if all(row.is_within for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
