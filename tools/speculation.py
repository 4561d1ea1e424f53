"""What speculative decoding gains where answers repeat what stands in their chat: tokens per step, and time.

    .venv/bin/python tools/speculation.py

Pictures are described, and described again in later turns of the same chats, by two engines in this process that take
turns: one guesses, one does not. Every answer must be the same from both. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from dashinfer_vlm import VLM, SamplingParams

PICTURES = Path(__file__).resolve().parents[1] / "tests" / "demo_model" / "held_out"
QUESTION = "Describe the image."


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
    pictures = sorted(PICTURES.glob("*.png"))[: options.chats]
    settings = {"dtype": options.dtype, "progress": False, "allowed_local_media_path": str(PICTURES)}
    params = SamplingParams(temperature=options.temperature, max_tokens=64, seed=1)
    results = []
    with (
        VLM(options.model, **settings) as plain,
        VLM(options.model, speculative_config=guessing, **settings) as guesser,
    ):
        for clients in options.clients:
            rounds: list[tuple[Round, Round]] = []
            for number in range(options.rounds + 1):  # the first warms up
                pair = (
                    run(plain, pictures, options.turns, clients, params),
                    run(guesser, pictures, options.turns, clients, params),
                )
                rounds += [pair] if number else []
                if pair[0].answers != pair[1].answers:
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
    parser.add_argument("--chats", type=int, default=24, help="pictures that are described")
    parser.add_argument("--turns", type=int, default=3, help="turns of each chat")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="chats that run at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    return parser.parse_args()


def run(vlm: VLM, pictures: list[Path], num_turns: int, clients: int, params: SamplingParams) -> Round:
    before, start_s = vlm.stats(), time.perf_counter()
    answers = []
    for first in range(0, len(pictures), clients):
        chats = [[picture_and_question(path)] for path in pictures[first : first + clients]]
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
    }


if __name__ == "__main__":
    sys.exit(main())
