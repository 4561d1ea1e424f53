#!/usr/bin/env python3
"""Hold structured output against the JSON Schema Test Suite, and write docs/json_schema.md.

    json_schema_suite.py FOLDER [--page docs/json_schema.md]

FOLDER is a draft of the suite, such as json/tests/draft2020-12 of jsonschema's source distribution (`pip download
--no-deps --no-binary :all: jsonschema`). Its optional folders are left out. A schema is compiled or refused; for those
that are compiled, each of the suite's values is written as JSON and followed. The worst that can be is an invalid value
that may be written; a valid one that may not be is narrower than JSON Schema, which has no order of fields, for one.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llguidance

from dashinfer_vlm.engine.grammars.forms import compile_for, complaint
from dashinfer_vlm.engine.grammars.trial import Trial
from dashinfer_vlm.request import Grammar


@dataclass
class Findings:
    """Of one keyword's file, or of all."""

    num_schemas: int = 0
    num_compiled: int = 0
    num_values: int = 0
    """Of compiled schemas."""
    too_wide: list[str] = field(default_factory=list)
    too_narrow: list[str] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    found: defaultdict[str, Findings] = defaultdict(Findings)
    trial, tokenizer = Trial(), llguidance.LLTokenizer("byte")
    for file in sorted(asked.folder.glob("*.json")):
        for group in json.loads(file.read_text()):
            look_at(group, trial, tokenizer, found[file.stem])
    trial.close()
    page = written(asked.folder.name, found)
    if asked.page:
        asked.page.write_text(page)
    else:
        print(page)


def look_at(group: dict[str, Any], trial: Trial, tokenizer: llguidance.LLTokenizer, found: Findings) -> None:
    found.num_schemas += 1
    grammar = Grammar.json_schema(json.dumps(group["schema"]))
    problem = trial.problem(grammar)
    if problem is not None:
        found.refusals[shortened(complaint(grammar, problem))] += 1
        return
    found.num_compiled += 1
    for test in group["tests"]:
        found.num_values += 1
        can = follows(compile_for(tokenizer, grammar), test["data"])
        name = f"{group['description']}: {test['description']}"
        if can and not test["valid"]:
            found.too_wide.append(name)
        if test["valid"] and not can:
            found.too_narrow.append(name)


def follows(matcher: llguidance.LLMatcher, value: Any) -> bool:
    data = list(json.dumps(value, ensure_ascii=False).encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def shortened(reason: str) -> str:
    """The same words for the same reason, whatever name or number was at fault."""
    reason = reason.removeprefix("the JSON schema cannot be used: ").split("\n")[0]
    return re.sub(r"'[^']*://[^']*'|`[^`]*`", "...", reason)


def written(draft: str, found: dict[str, Findings]) -> str:
    all_of = Findings(
        sum(f.num_schemas for f in found.values()),
        sum(f.num_compiled for f in found.values()),
        sum(f.num_values for f in found.values()),
        [f"{keyword}: {name}" for keyword, f in found.items() for name in f.too_wide],
        [f"{keyword}: {name}" for keyword, f in found.items() for name in f.too_narrow],
        sum((f.refusals for f in found.values()), Counter()),
    )
    rows = [
        f"| {keyword} | {f.num_compiled} of {f.num_schemas} | {len(f.too_wide)} | {len(f.too_narrow)} | "
        f"{'; '.join(f'{reason} ({n})' for reason, n in f.refusals.most_common())} |"
        for keyword, f in found.items()
    ]
    share = 100 * all_of.num_compiled / all_of.num_schemas
    wide = [f"- {name}" for name in all_of.too_wide]
    return "\n".join(
        [
            "# What of JSON Schema structured output covers",
            "",
            f"Made by `tools/json_schema_suite.py` from the JSON Schema Test Suite, {draft}, optional tests left out:",
            f"{all_of.num_compiled} of {all_of.num_schemas} schemas ({share:.0f} %) are accepted, the others are refused",  # noqa: E501
            f"with the reason that is shown. Of {all_of.num_values} values for accepted schemas, {len(all_of.too_wide)} that",  # noqa: E501
            f"are invalid could be written, and {len(all_of.too_narrow)} that are valid could not: an answer has the fields in",  # noqa: E501
            "the order of the schema and numbers spelled as it spells them, and `format` is kept, which the suite does not",  # noqa: E501
            "ask for.",
            "",
            "| file of the suite | accepted | invalid and possible | valid and impossible | refused, with the reason |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "## Invalid values that could be written",
            "",
            *(wide or ["None."]),
            "",
        ]
    )


if __name__ == "__main__":
    main()
