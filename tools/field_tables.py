#!/usr/bin/env python3
"""Write the tables of fields in docs/api.md from the models that check requests.

    field_tables.py [--check]

With --check nothing is written; the exit code is 1 when the page is not what the source says.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dashinfer_vlm.frontend.schema import Only, state_of
from dashinfer_vlm.server.anthropic.routes import COUNT_TOKENS, MESSAGES
from dashinfer_vlm.server.batches.batch_routes import CREATE_BATCH
from dashinfer_vlm.server.chat import CHAT
from dashinfer_vlm.server.completions import COMPLETIONS
from dashinfer_vlm.server.described import Operation
from dashinfer_vlm.server.embeddings import EMBEDDINGS
from dashinfer_vlm.server.responses.routes import COUNT, CREATE
from dashinfer_vlm.server.scores import RERANK, SCORE
from dashinfer_vlm.server.tokenize import DETOKENIZE, TOKENIZE

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "api.md"
BEGIN, END = "<!-- fields: made by tools/field_tables.py -->\n", "<!-- end of fields -->\n"
OPERATIONS: dict[str, Operation] = {
    "POST /v1/chat/completions": CHAT,
    "POST /v1/completions": COMPLETIONS,
    "POST /v1/embeddings": EMBEDDINGS,
    "POST /v1/rerank": RERANK,
    "POST /v1/score": SCORE,
    "POST /v1/responses": CREATE,
    "POST /v1/responses/input_tokens": COUNT,
    "POST /v1/messages": MESSAGES,
    "POST /v1/messages/count_tokens": COUNT_TOKENS,
    "POST /v1/batches": CREATE_BATCH,
    "POST /tokenize": TOKENIZE,
    "POST /detokenize": DETOKENIZE,
}


def tables() -> str:
    """One table for each endpoint; an object that several of them take is told of once."""
    told: set[type[BaseModel]] = set()
    return "".join(table for name, operation in OPERATIONS.items() for table in _tables(name, operation, told))


def _tables(name: str, operation: Operation, told: set[type[BaseModel]]) -> Iterator[str]:
    assert operation.body is not None, name
    rows = "".join(_row(path, model) for path, model in objects(operation.body, told))
    yield f"\n**`{name}`**\n\n| object | works | no effect | refused, unless null or |\n|---|---|---|---|\n{rows}"


def objects(body: type[BaseModel], told: set[type[BaseModel]], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """`body` and all objects in it, each with its path, but for those that are in `told`; they are added to it."""
    if body in told:
        return
    told.add(body)
    yield path, body
    for name, field in _fields(body).items():
        for suffix, model in _models(field.annotation):
            yield from objects(model, told, f"{path}.{name}{suffix}" if path else f"{name}{suffix}")


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """By the names that clients write."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _models(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """Objects that a field may hold, alone or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "", annotation
    suffix = "[]" if get_origin(annotation) is list else ""
    for inner in get_args(annotation):
        for more, model in _models(inner):
            yield suffix + more, model


def _row(path: str, model: type[BaseModel]) -> str:
    fields = _fields(model)
    columns = [
        ", ".join(_cell(name, field) for name, field in fields.items() if state_of(field) == state)
        for state in ("works", "no effect", "refused")
    ]
    where = f"`{path}`{_kind(fields)}" if path else "the body"
    return f"| {where} | {' | '.join(columns)} |\n"


def _kind(fields: dict[str, FieldInfo]) -> str:
    """` of type ...`, where that tells objects of one path apart."""
    annotation = fields["type"].annotation if "type" in fields else None
    values = get_args(annotation) if get_origin(annotation) is Literal else ()
    return f" of type `{values[0]}`" if len(values) == 1 else ""


def _cell(name: str, field: FieldInfo) -> str:
    neutral = [value for note in field.metadata if isinstance(note, Only) for value in note.neutral]
    values = f" ({', '.join(f'`{json.dumps(value)}`' for value in neutral)})" if neutral else ""
    return f"`{name}`{values}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    checks = parser.parse_args(arguments).check
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = f"{before}{BEGIN}{tables()}{END}{after}"
    if checks:
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
