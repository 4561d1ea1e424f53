"""What the prefix cache spares of chats about a picture: the time of a first turn, and to the first token of a second.

    .venv/bin/python tools/turns.py --model FOLDER --quant-type a8w8

Two engines in this process hold the same chats in turns; one of them has no prefix cache. The second turn has other
words in place of the first one's answer. Processor time is that of this process: other programs change it little. Ends
with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from dashinfer_vlm import VLM, SamplingParams
from dashinfer_vlm.bench.pictures import data_url, draw
from dashinfer_vlm.frontend.deltas import Usage

WORDS = "The same picture once more: what was said of it may be right, and yet look again. "


@dataclass(frozen=True)
class Times:
    """Seconds by the clock, and of processor time."""

    wall_s: float
    busy_s: float


@dataclass(frozen=True)
class Chat:
    """What one engine took for the two turns of a chat."""

    first: Times
    second: Times
    num_prompt_tokens: int
    """Of the second turn, and how many of them were found."""
    num_cached_tokens: int


def main() -> None:
    options = parse()
    settings = {"quant_type": options.quant_type, "max_model_len": 4096, "progress": False}
    pairs = []
    with VLM(options.model, **settings) as caching, VLM(options.model, prefix_cache=False, **settings) as plain:
        for number in range(options.rounds + 1):  # the first warms up
            picture = data_url(draw((options.side, options.side), (options.seed, number)), "png")
            order = (caching, plain) if number % 2 else (plain, caching)
            told = {vlm: chat(vlm, picture, options.tokens) for vlm in order}
            pairs += [(told[plain], told[caching])] if number else []
    results = [summary("no prefix cache", [a for a, _ in pairs]), summary("prefix cache", [b for _, b in pairs])]
    for result in results:
        print(" ".join(f"{key}={value if isinstance(value, str) else f'{value:.3g}'}" for key, value in result.items()))
    print(json.dumps({"bench": "turns", "settings": vars(options), "results": results}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder or id; the bundled demo model when absent")
    parser.add_argument("--quant-type", default="none")
    parser.add_argument("--side", type=int, default=448, help="of the picture, in pixels")
    parser.add_argument("--tokens", type=int, default=40, help="of the first answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def chat(vlm: VLM, picture: str, num_tokens: int) -> Chat:
    messages: list[dict[str, Any]] = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": WORDS}],
        }
    ]
    _, first = answer(vlm, messages, num_tokens)
    messages += [{"role": "assistant", "content": WORDS}, {"role": "user", "content": WORDS}]
    usage, second = answer(vlm, messages, 1)
    return Chat(first, second, usage.num_prompt_tokens, usage.num_cached_tokens)


def answer(vlm: VLM, messages: list[dict[str, Any]], num_tokens: int) -> tuple[Usage, Times]:
    start_s, start_busy_s = time.perf_counter(), time.process_time()
    result = vlm.chat(messages, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))
    return result.usage, Times(time.perf_counter() - start_s, time.process_time() - start_busy_s)


def summary(name: str, chats: list[Chat]) -> dict[str, str | float]:
    return {
        "engine": name,
        "first_s": median(one.first.wall_s for one in chats),
        "second_s": median(one.second.wall_s for one in chats),
        "first_busy_s": median(one.first.busy_s for one in chats),
        "second_busy_s": median(one.second.busy_s for one in chats),
        "prompt_tokens": median(one.num_prompt_tokens for one in chats),
        "cached_tokens": median(one.num_cached_tokens for one in chats),
    }


if __name__ == "__main__":
    main()
