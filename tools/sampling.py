"""How long one step's sampling takes: `python tools/sampling.py` prints milliseconds per step, best and median.

Rows of random logits over Qwen's vocabulary, each of a sequence of its own with 700 prompt and 100 output tokens. The
kernels use as many threads as the process has cores; DASHINFER_KERNELS=reference measures numpy.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from dashinfer_vlm.engine.sampler import Sampler
from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.request import Request, SamplingParams

VOCAB = 151_936
KINDS = {
    "Qwen's recommendation": SamplingParams(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),
    "greedy": SamplingParams(temperature=0),
    "temperature 1": SamplingParams(),
    "top_p 0.8": SamplingParams(temperature=0.7, top_p=0.8),
    "top_p 0.95 at temperature 2": SamplingParams(temperature=2, top_p=0.95),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "greedy, 20 log probabilities": SamplingParams(temperature=0, logprobs=20),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    for num_rows in args.rows:
        logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
        for name, params in KINDS.items():
            times = measure(logits, params, args.repeats)
            print(f"{num_rows:4} rows, {name:30} {min(times):8.2f} {statistics.median(times):8.2f} ms")


def measure(logits: torch.Tensor, params: SamplingParams, repeats: int) -> list[float]:
    sampler = Sampler((VOCAB - 1,), torch.device("cpu"))
    groups = [(sequence(seed, params), ()) for seed in range(len(logits))]
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        sampler.sample(logits, groups)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def sequence(seed: int, params: SamplingParams) -> Sequence:
    ids = np.random.default_rng(seed).integers(0, VOCAB, 800).tolist()
    request = Request(id=str(seed), prompt_ids=ids[:700], params=params)
    made = Sequence(request, positions=torch.zeros(3, 700), offset=0, max_tokens=1000, seed=seed)
    for token in ids[700:]:
        made.append(token)
    return made


if __name__ == "__main__":
    main()
