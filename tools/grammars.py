#!/usr/bin/env python3
"""What structured output costs: the index of a vocabulary, compiling a schema, and the masks of a step.

    grammars.py FOLDER [--rows 8 32] [--repeats 5]

FOLDER holds the tokenizer, such as that of any Qwen checkpoint. Every sequence of a batch writes the same record under
the same schema, each a token behind the one before it, so that a step has rows in all places of the record. Times are
milliseconds: by the clock, which other work on the machine lengthens, and of this process's processors, which it hardly
does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from dashinfer_vlm.engine.grammars.compiler import Compiler, read_vocabulary
from dashinfer_vlm.engine.grammars.masks import Masks
from dashinfer_vlm.engine.grammars.matcher import Matcher
from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.request import Grammar, Request

LINE = {"article": "Bolts, M8 x 40, galvanised", "count": 12, "price": 4.75, "tags": ["metal", "small"]}
RECORD = {"number": "2026-00173", "date": "2026-11-26", "paid": False, "lines": [LINE, LINE, LINE], "remark": None}
LINE_SCHEMA = {
    "type": "object",
    "properties": {
        "article": {"type": "string", "maxLength": 80},
        "count": {"type": "integer", "minimum": 1},
        "price": {"type": "number"},
        "tags": {"type": "array", "items": {"enum": ["metal", "wood", "small", "large"]}},
    },
    "required": ["article", "count", "price", "tags"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "number": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{5}$"},
        "date": {"type": "string", "format": "date"},
        "paid": {"type": "boolean"},
        "lines": {"type": "array", "items": LINE_SCHEMA, "minItems": 1},
        "remark": {"type": ["string", "null"]},
    },
    "required": ["number", "date", "paid", "lines", "remark"],
    "additionalProperties": False,
}
FREE = {"type": "object"}

Made = TypeVar("Made")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    tokenizer = Tokenizer.from_folder(asked.folder)
    vocab_size = msgspec.json.decode((asked.folder / "config.json").read_bytes())["vocab_size"]
    eos = tokenizer.added["<|im_end|>"]
    compiler = told("index of the vocabulary", lambda: indexed(asked.folder, vocab_size, eos))
    ids = tokenizer.encode_text(json.dumps(RECORD, indent=2))
    print(f"{vocab_size} ids; the record has {len(ids)} tokens")
    for name, schema in (("record", SCHEMA), ("any object", FREE)):
        told(f"compile {name}, the first one", lambda schema=schema: compiler.matcher(Grammar.json_schema(schema)))
        again = {**schema, "title": "another"}
        told(f"compile {name}, again", lambda again=again: compiler.matcher(Grammar.json_schema(again)))
        for rows in asked.rows:
            report(name, rows, [t for _ in range(asked.repeats) for t in steps(compiler, schema, rows, ids, eos)])
    compiler.close()


def indexed(folder: Path, vocab_size: int, eos: int) -> Compiler:
    compiler = Compiler(lambda: read_vocabulary(folder), vocab_size, (eos,))
    compiler._tokenizer.result()
    return compiler


def told(name: str, make: Callable[[], Made]) -> Made:
    clock, processors = time.perf_counter(), time.process_time()
    made = make()
    print(
        f"{name}: {(time.perf_counter() - clock) * 1e3:.1f} ms, {(time.process_time() - processors) * 1e3:.1f} ms busy"
    )
    return made


def steps(compiler: Compiler, schema: dict[str, Any], rows: int, ids: list[int], eos: int) -> list[tuple[float, float]]:
    """Clock and processor seconds of every step's masks and of following its tokens."""
    masks = Masks(compiler._tokenizer.result().vocab_size, (eos,))
    sequences = [following(compiler.matcher(Grammar.json_schema(schema))) for _ in range(rows)]
    matchers = [sequence.matcher for sequence in sequences if sequence.matcher]
    for behind, matcher in enumerate(matchers):
        for token in ids[: behind % (len(ids) // 2)]:
            matcher.accept(token)
    times = []
    for step in range(len(ids) // 2):
        clock, processors = time.perf_counter(), time.process_time()
        masks.begin([(sequence, ()) for sequence in sequences])()
        for behind, matcher in enumerate(matchers):
            matcher.accept(ids[step + behind % (len(ids) // 2)])
        times.append((time.perf_counter() - clock, time.process_time() - processors))
    assert not any(matcher.problem for matcher in matchers)
    return times


def following(matcher: Matcher) -> Sequence:
    request = Request(id="", prompt_ids=[0])
    return Sequence(request, positions=torch.zeros(3, 1), offset=0, max_tokens=1 << 20, seed=0, matcher=matcher)


def report(name: str, rows: int, times: list[tuple[float, float]]) -> None:
    clocks, processors = ([value * 1e3 for value in column] for column in zip(*times, strict=True))
    print(
        f"{name}, {rows} rows: median {statistics.median(clocks):.2f}, best {min(clocks):.2f}, "
        f"99 of 100 below {statistics.quantiles(clocks, n=100)[-1]:.2f} ms a step; "
        f"{statistics.mean(processors):.2f} ms busy on average"
    )


if __name__ == "__main__":
    main()
