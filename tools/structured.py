"""What structured output costs a step of a whole batch, by the clock.

    .venv/bin/python tools/structured.py --model FOLDER --quant-type a8w8

The same streams are answered with a JSON schema and without, in turns, by one engine; each time is that of a batch's
tokens, its prompts and the schema's grammar being known. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import msgspec

from dashinfer_vlm import VLM, SamplingParams
from dashinfer_vlm.request import Grammar

LINE = {
    "type": "object",
    "properties": {
        "article": {"type": "string", "maxLength": 40},
        "count": {"type": "integer", "minimum": 1, "maximum": 100_000},
        "price": {"type": "number"},
        "tags": {"type": "array", "items": {"enum": ["metal", "wood", "small", "large"]}, "maxItems": 4},
    },
    "required": ["article", "count", "price", "tags"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {"lines": {"type": "array", "items": LINE, "minItems": 1000}},
    "required": ["lines"],
    "additionalProperties": False,
}
"""No answer comes to its end by itself."""


def main() -> None:
    options = parse()
    free = SamplingParams(temperature=options.temperature, max_tokens=options.tokens, seed=1, ignore_eos=True)
    formed = msgspec.structs.replace(free, grammar=Grammar.json_schema(SCHEMA))
    chats = [[{"role": "user", "content": f"Write order {i} as JSON."}] for i in range(options.streams)]
    times: dict[str, list[float]] = {"free": [], "formed": []}
    with VLM(options.model, quant_type=options.quant_type, dtype=options.dtype, progress=False) as vlm:
        for number in range(options.rounds + 1):  # the first warms up
            for name, params in (("free", free), ("formed", formed))[:: 1 if number % 2 else -1]:
                took_ms = timed(vlm, chats, params)
                if number:
                    times[name].append(took_ms)
    a, b = (median(times[name]) for name in ("free", "formed"))
    ratios = [y / x for x, y in zip(times["free"], times["formed"], strict=True)]
    print(f"a token of each of {options.streams} streams: {a:.2f} ms, with a schema {b:.2f} ms ({b / a - 1:+.1%})")
    print(f"of pairs: {median(ratios) - 1:+.1%}, {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%}")
    print(json.dumps({"bench": "structured", "settings": vars(options), "ms": times}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder or id; the bundled demo model when absent")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quant-type", default="none")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--temperature", type=float, default=0.0)
    return parser.parse_args()


def timed(vlm: VLM, chats: list[list[dict[str, Any]]], params: SamplingParams) -> float:
    """Milliseconds a token of all streams."""
    start_s = time.perf_counter()
    results = vlm.chat(chats, params)
    wall_s = time.perf_counter() - start_s
    lengths = {len(result.token_ids) for result in results}
    assert lengths == {params.max_tokens}, lengths
    return wall_s * 1e3 / lengths.pop()


if __name__ == "__main__":
    main()
