"""Exact answers per task on held-out pictures, and how far every way to answer agrees with `transformers`.

    PYTHONPATH=tools python tools/demo_model/evaluate.py --through engine --questions 2000

`make eval` asks through all of them; then the exit code is 1 when one agrees with fewer than 99.5 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from demo_model.cases import MAX_TOKENS, Case, held_out_cases, with_media, write_cases
from demo_model.questions import TASKS
from demo_model.scenes import COLOURS, SHAPES, WORDS

BUNDLED = Path(__file__).resolve().parents[2] / "src" / "dashinfer_vlm" / "demo_model"
# Share of right answers of a guess among what can be answered; for descriptions of one shape, the easiest
CHANCE = {
    "describe": 1 / (len(COLOURS) * len(SHAPES)),
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "count": 1 / 5,
    "read": 0.7 / len(WORDS),
    "where": 1 / 9,
    "at": 1 / (len(COLOURS) * len(SHAPES)),
    "exists": 1 / 2,
    "compare": 0.45,
    "earlier": 1 / (len(COLOURS) * len(SHAPES)),
    "move": 1 / 4,
    "chart": 1 / (len(COLOURS) - 1),
    "receipt": 1 / 90,
}


def through_transformers(folder: Path) -> Callable[[list[Case]], Iterable[str]]:
    """One greedy answer at a time in float32."""
    from demo_model.reference import Reference

    reference = Reference(folder)
    return lambda cases: (spoken.text for spoken in reference.answers(cases))


def through_engine(folder: Path) -> Callable[[list[Case]], Iterable[str]]:
    """Batches of 64 side by side; the prefix cache is on, as it is by default."""
    from dashinfer_vlm.offline.vlm import VLM
    from dashinfer_vlm.request import SamplingParams

    vlm = VLM(folder)
    greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)

    def answer(cases: list[Case]) -> Iterable[str]:
        for start in range(0, len(cases), 64):
            for result in vlm.chat([with_media(case) for case in cases[start : start + 64]], greedy):
                yield result.text

    return answer


def report(cases: list[Case], answers: list[str]) -> dict[str, Any]:
    """Shares of exact answers by task, and the commonest confusions."""
    right: dict[str, list[bool]] = defaultdict(list)
    confused: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for case, answer in zip(cases, answers, strict=True):
        right[case.task].append(answer == case.answer)
        if answer != case.answer:
            confused[case.task][(case.answer, answer)] += 1
    return {
        "questions": len(cases),
        "exact": round(float(np.mean([a == case.answer for case, a in zip(cases, answers, strict=True)])), 4),
        "tasks": {
            task: {
                "questions": len(right[task]),
                "exact": round(float(np.mean(right[task])), 3),
                "chance": round(CHANCE[task], 3),
                "confusions": [[*pair, count] for pair, count in confused[task].most_common(8)],
            }
            for task in TASKS
            if right[task]
        },
    }


def draw_confusions(cases: list[Case], answers: list[str], path: Path) -> None:
    """A figure of three tables, asked against told: colours, shapes and numbers."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    labels = {
        "colour": [f"{name.capitalize()}." for name in COLOURS],
        "shape": [f"The {name}." for name in SHAPES],
        "count": [str(number) for number in range(7)],
        "where": [
            "Top left.",
            "Top.",
            "Top right.",
            "Left.",
            "Centre.",
            "Right.",
            "Bottom left.",
            "Bottom.",
            "Bottom right.",
        ],
    }
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.6), layout="constrained")
    for axis, (task, names) in zip(axes, labels.items(), strict=True):
        table = np.zeros((len(names), len(names)))
        for case, answer in zip(cases, answers, strict=True):
            if case.task == task and case.answer in names and answer in names:
                table[names.index(case.answer), names.index(answer)] += 1
        axis.imshow(table / np.maximum(table.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(len(names)), [name.strip(".") for name in names], rotation=90)
        axis.set_yticks(range(len(names)), [name.strip(".") for name in names])
        axis.set(title=task, xlabel="told", ylabel="true")
    figure.savefig(path, dpi=80, bbox_inches="tight")


def show(summary: dict[str, Any]) -> None:
    print(f"{summary['exact']:.1%} of {summary['questions']} exact")
    for task, row in summary["tasks"].items():
        numbers = f"{row['exact']:6.1%}  chance {row['chance']:5.1%}  of {row['questions']}"
        print(f"{task:10} {numbers}  {row['confusions'][:3]}")


def answer_one_way(args: argparse.Namespace, cases: list[Case]) -> list[str]:
    answer = (through_engine if args.through == "engine" else through_transformers)(args.model)
    return list(tqdm(answer(cases), total=len(cases)))


def answer_all_ways(args: argparse.Namespace, cases: list[Case]) -> tuple[list[str], int]:
    """The answers of `transformers`, and the exit code."""
    from demo_model.agreement import LEAST_AGREEMENT, disagreeing, survey, write

    answers, rows = survey(args.model, cases, with_cluster=args.cluster)
    write(rows, args.model, len(cases), args.out / "agreement.json")
    for name in disagreeing(rows):
        print(f"{name}: agrees with transformers in fewer than {LEAST_AGREEMENT:.1%} of the answers")
    return answers, int(bool(disagreeing(rows)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=BUNDLED, help="folder of a checkpoint; the bundled one")
    parser.add_argument("--through", default="engine", choices=["engine", "transformers", "all"])
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--record", type=Path, help="folder for these questions and answers, as the tests read them")
    parser.add_argument("--cluster", action="store_true", help="of all: also two nodes of a Ray cluster")
    args = parser.parse_args()
    if args.questions < 1:
        parser.error(f"--questions is {args.questions}; it must be at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    cases = list(held_out_cases(args.questions))
    answers, code = (answer_all_ways(args, cases)) if args.through == "all" else (answer_one_way(args, cases), 0)
    summary = report(cases, answers)
    (args.out / f"evaluation_{args.through}.json").write_text(json.dumps(summary | {"answers": answers}, indent=1))
    draw_confusions(cases, answers, args.out / f"confusions_{args.through}.png")
    if args.record:
        write_cases(cases, answers, args.record)
    show(summary)
    return code


if __name__ == "__main__":
    sys.exit(main())
