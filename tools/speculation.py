"""What speculative decoding gains where answers repeat what stands in their chat: tokens per step, and time.

    .venv/bin/python tools/speculation.py
    .venv/bin/python tools/speculation.py --model FOLDER --quant-type a8w8 --quote 4

Pictures are described, and described again in later turns of the same chats, by two engines in this process that take
turns: one guesses, one does not. Every answer must be the same from both. With `--quote` words are repeated instead,
which a grammar sees to, so that any model does; at every so many of them it leaves another one to the model, which a
model of random weights takes half of the time. Answers that differ by rounding are counted. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from dashinfer_vlm import VLM, SamplingParams
from dashinfer_vlm.request import Grammar

PICTURES = Path(__file__).resolve().parents[1] / "tests" / "demo_model" / "held_out"
QUESTION = "Describe the image."
WORDS = 60
"""Of an answer that quotes."""


class Talk(NamedTuple):
    """How a chat begins, and what its answers may be."""

    first: dict[str, Any]
    params: SamplingParams


class Round(NamedTuple):
    """What one engine did in one round, over all chats."""

    answers: list[str]
    num_tokens: int
    num_steps: int
    num_drafted: int
    num_accepted: int
    step_s: float
    wall_s: float


def main() -> int:
    options = parse()
    guessing = {"method": "ngram", "num_speculative_tokens": options.num_speculative_tokens}
    settings = {"dtype": options.dtype, "quant_type": options.quant_type, "kv_cache_gib": options.kv_cache_gib}
    settings |= {"progress": False, "allowed_local_media_path": str(PICTURES)}
    turns = 1 if options.quote else options.turns
    results = []
    with (
        VLM(options.model, **settings) as plain,
        VLM(options.model, speculative_config=guessing, **settings) as guesser,
    ):
        for clients in options.clients:
            rounds: list[tuple[Round, Round]] = []
            for number in range(options.rounds + 1):  # the first warms up
                talks = quotes(options, number) if options.quote else descriptions(options)
                pair = run(plain, talks, turns, clients), run(guesser, talks, turns, clients)
                rounds += [pair] if number else []
                if pair[0].answers != pair[1].answers and not options.quote:
                    print(f"{clients} clients: the answers differ", file=sys.stderr)
                    return 1
            results.append(summary(clients, rounds))
            print(" ".join(f"{key}={value:.3g}" for key, value in results[-1].items()), flush=True)
    print(json.dumps({"bench": "speculation", "settings": vars(options), "results": results}))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder or id; the bundled demo model when absent")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quant-type", default="none")
    parser.add_argument("--kv-cache-gib", type=float, help="of each engine")
    parser.add_argument(
        "--quote", type=int, default=0, metavar="N", help="quote words, at every N-th of them perhaps not"
    )
    parser.add_argument("--chats", type=int, default=24, help="pictures that are described")
    parser.add_argument("--turns", type=int, default=3, help="turns of each chat")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="chats that run at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    return parser.parse_args()


def descriptions(options: argparse.Namespace) -> list[Talk]:
    params = SamplingParams(temperature=options.temperature, max_tokens=64, seed=1)
    pictures = sorted(PICTURES.glob("*.png"))[: options.chats]
    return [Talk(picture_and_question(path), params) for path in pictures]


def quotes(options: argparse.Namespace, number: int) -> list[Talk]:
    """Words that no chat of another round has."""
    source = random.Random(number)
    talks = []
    for _ in range(options.chats):
        words = [word(source) for _ in range(WORDS)]
        said = words[:]
        for i in range(options.quote - 1, WORDS, options.quote):
            said[i] = f"({words[i]}|{word(source)})"
        grammar = Grammar("regex", " ".join(said))
        params = SamplingParams(temperature=options.temperature, max_tokens=1024, seed=1, grammar=grammar)
        talks.append(Talk({"role": "user", "content": " ".join(words)}, params))
    return talks


def word(source: random.Random) -> str:
    return "".join(source.choices(string.ascii_lowercase, k=source.randint(3, 7)))


def run(vlm: VLM, talks: list[Talk], num_turns: int, clients: int) -> Round:
    before, start_s = vlm.stats(), time.perf_counter()
    answers = []
    for first in range(0, len(talks), clients):
        chats = [[talk.first] for talk in talks[first : first + clients]]
        params = [talk.params for talk in talks[first : first + clients]]
        for _ in range(num_turns):
            for chat, result in zip(chats, vlm.chat(chats, params), strict=True):
                answers.append(result.text)
                chat += [{"role": "assistant", "content": result.text}, {"role": "user", "content": QUESTION}]
    wall_s, after = time.perf_counter() - start_s, vlm.stats()
    return Round(
        answers,
        after.num_output_tokens_total - before.num_output_tokens_total,
        after.num_steps_total - before.num_steps_total,
        after.num_draft_tokens_total - before.num_draft_tokens_total,
        after.num_accepted_draft_tokens_total - before.num_accepted_draft_tokens_total,
        after.step_seconds_total - before.step_seconds_total,
        wall_s,
    )


def picture_and_question(path: Path) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": path.as_uri()}}
    return {"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}


def summary(clients: int, rounds: list[tuple[Round, Round]]) -> dict[str, float]:
    """Ratios are of the engine that guesses to the other, medians over the rounds."""
    return {
        "clients": clients,
        "tokens_per_step": median(a.num_tokens / a.num_steps for a, _ in rounds),
        "tokens_per_step_guessing": median(b.num_tokens / b.num_steps for _, b in rounds),
        "accepted": median(b.num_accepted / max(1, b.num_drafted) for _, b in rounds),
        "steps_ratio": median(b.num_steps / a.num_steps for a, b in rounds),
        "step_time_ratio": median(b.step_s / a.step_s for a, b in rounds),
        "wall_time_ratio": median(b.wall_s / a.wall_s for a, b in rounds),
        "least_step_time_ratio": min(b.step_s / a.step_s for a, b in rounds),
        "most_step_time_ratio": max(b.step_s / a.step_s for a, b in rounds),
        "differ": sum(x != y for a, b in rounds for x, y in zip(a.answers, b.answers, strict=True)),
    }


if __name__ == "__main__":
    sys.exit(main())
