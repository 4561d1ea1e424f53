"""How far other ways to answer agree with `transformers` in float32: the table and the JSON of `make eval`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dashinfer_vlm.bench.machine import Machine
from demo_model.cases import Case
from demo_model.placements import Asked, Skipped, Way, caches, cluster, precisions, redis, server, workers
from demo_model.reference import Reference, Spoken

WAYS: tuple[Way, ...] = (precisions, caches, workers, server, redis)
LEAST_AGREEMENT = 0.995
HEAD = f"{'':30} {'exact':>7} {'agreement':>10} {'other':>6} {'ties':>5} {'seconds':>8}"


@dataclass(frozen=True, slots=True)
class Row:
    """One way to answer; shares of all questions."""

    name: str
    exact: float
    agreement: float
    """With `transformers`, ties aside."""
    num_ties: int
    """Answers that leave the reference's where its two best tokens are closer than bfloat16 can tell apart."""
    others: list[dict[str, str]]
    """Every other answer that differs: the question, what the reference said and what was said here."""
    seconds: float
    proof: str

    @classmethod
    def of(cls, asked: Asked, cases: Sequence[Case], reference: Sequence[Spoken]) -> Row:
        exact, num_ties = 0, 0
        others = []
        for case, spoken, said in zip(cases, reference, asked.answers, strict=True):
            exact += said == case.answer
            if said != spoken.text:
                is_tie = spoken.differs_by_a_tie(said)
                num_ties += is_tie
                others += [] if is_tie else [{"task": case.task, "reference": spoken.text, "said": said}]
        agreement = 1 - len(others) / len(cases)
        return cls(asked.name, exact / len(cases), agreement, num_ties, others, asked.seconds, asked.proof)

    def __str__(self) -> str:
        return (
            f"{self.name:30} {self.exact:7.2%} {self.agreement:10.2%} {len(self.others):6} {self.num_ties:5} "
            f"{self.seconds:8.1f}   {self.proof}"
        )


def survey(folder: Path, cases: list[Case], *, with_cluster: bool) -> tuple[list[str], list[Row]]:
    """The reference's answers and a row for each way, printed as they come; what is not installed is skipped."""
    start = time.perf_counter()
    reference = list(Reference(folder).answers(cases))
    said = [spoken.text for spoken in reference]
    print(f"{len(cases)} questions to {folder}\n{HEAD}")
    rows = [
        Row.of(Asked("transformers, float32", said, time.perf_counter() - start, "the reference"), cases, reference)
    ]
    print(rows[0], flush=True)
    for asked in answered(folder, cases, (*WAYS, cluster) if with_cluster else WAYS):
        if isinstance(asked, Skipped):
            print(f"{asked.name:30} skipped: {asked.why}", flush=True)
            continue
        rows.append(Row.of(asked, cases, reference))
        print(rows[-1], flush=True)
        for other in rows[-1].others[:5]:
            print(f"    {other['task']}: {other['reference']!r} became {other['said']!r}")
    return said, rows


def answered(folder: Path, cases: list[Case], ways: Sequence[Way]) -> Iterator[Asked | Skipped]:
    for way in ways:
        yield from way(folder, cases)


def write(rows: Sequence[Row], folder: Path, num_questions: int, path: Path) -> None:
    result: dict[str, Any] = {"model": str(folder), "questions": num_questions, "machine": asdict(Machine.here())}
    path.write_text(json.dumps(result | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def disagreeing(rows: Sequence[Row]) -> list[str]:
    """Names of the rows below the bar."""
    return [row.name for row in rows if row.agreement < LEAST_AGREEMENT]
