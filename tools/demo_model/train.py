"""Train the demo model on a CPU, in pieces that resume where they stopped.

PYTHONPATH=tools python tools/demo_model/train_vision.py     # first the vision tower alone
PYTHONPATH=tools python tools/demo_model/train.py --minutes 60
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from demo_model.batches import DIFFERENCES, NO_TARGET, Batch, Batches, draw_batch
from demo_model.checkpoint import save_atomically
from demo_model.export import read_published
from demo_model.model import CellHeads, Shape, Text, TextBlock, Vision, initialise, rotate, text_rotary, vision_rotary
from demo_model.optimiser import Optimiser
from demo_model.parallel import average_gradients, keep_memory, launch
from demo_model.scenes import COLOURS, SHAPES
from demo_model.vocabulary import load_tokenizer, special_id

HEAD_WEIGHT = 0.2
CHECK_SEED = 70_001  # pictures, fonts and phrasings of the checks are never trained on


class DemoModel(nn.Module):
    """Vision tower, text model and the extra heads that only training uses."""

    def __init__(self, shape: Shape, pad_ids: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.pad_ids = shape, pad_ids
        self.vision, self.text, self.heads = Vision(shape), Text(shape), CellHeads(shape.hidden_size)
        self.differs = nn.Linear(shape.hidden_size, len(DIFFERENCES))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, T, hidden] after the last norm and halfway, and merged picture tokens [N, P / 4,
        hidden]."""
        rotary = vision_rotary(*batch.grid, self.vision.head_dim)
        tokens: Tensor = self.vision(batch.patches, *rotary)
        x = self.text.embed(batch.ids)
        is_pad = (batch.ids == self.pad_ids[0]) | (batch.ids == self.pad_ids[1])
        x = x.masked_scatter(is_pad[..., None], tokens)
        return (*self.text(x, batch.positions, batch.mask()), tokens)

    def difference_loss(self, batch: Batch, halfway: Tensor) -> Tensor:
        """How badly the tokens of the second picture tell what differs there from the first.

        Read halfway, so that the later blocks can gather it from all cells.
        """
        assert batch.differs is not None
        seen = halfway[batch.ids == self.pad_ids[0]].view(len(batch.differs), 2, -1, halfway.shape[-1])[:, 1]
        logits = self.differs(seen).flatten(0, 1)
        # most cells are alike: without the weights "nothing" everywhere would be a good answer
        weight = torch.tensor([0.15, 1.0, 1.0, 1.0])
        return F.cross_entropy(logits, batch.differs.flatten(), weight=weight)

    def looks_loss(self, batch: Batch, halfway: Tensor) -> Tensor:
        """How far the first head of the middle block is from looking, before an answer, at what the question is
        about."""
        assert batch.looks is not None
        block, rows, queries = self.text.blocks[len(self.text.blocks) // 2], batch.looks.rows, batch.looks.queries
        assert isinstance(block, TextBlock)
        cos, sin = text_rotary(batch.positions, self.shape)
        normed = block.norm1(halfway)
        query = block.q(normed[rows, queries])[:, : self.shape.head_dim]
        query = rotate(query, cos[rows, queries], sin[rows, queries])
        key = rotate(block.k(normed), cos, sin)[rows]
        scores = (key @ query[..., None]).squeeze(-1) / self.shape.head_dim**0.5
        scores = scores.masked_fill(~batch.mask()[rows, 0, queries], -1e9).log_softmax(-1)
        found: Tensor = scores.masked_fill(~batch.looks.keys, -1e9).logsumexp(-1)
        return -found.mean()

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.text.embed.weight)


def share_of(name: str) -> float:
    """Share of the rates: what the first stage taught moves slowly."""
    return 0.3 if name.startswith(("vision.patch_embed", "vision.blocks.")) else 1.0


def build_model(tokenizer: Tokenizer) -> DemoModel:
    pads = (special_id(tokenizer, "image_pad"), special_id(tokenizer, "video_pad"))
    return DemoModel(Shape(), pads)


def loss_of(model: DemoModel, batch: Batch, *, with_heads: bool = True) -> tuple[Tensor, dict[str, float]]:
    """`with_heads` adds what the extra heads say; a published checkpoint has none, and new ones would only disturb
    it."""
    hidden, halfway, tokens = model(batch)
    learned = batch.targets != NO_TARGET
    logits, targets = model.logits(hidden[learned]), batch.targets[learned]
    loss = F.cross_entropy(logits, targets)
    told = {"loss": loss.item(), "right": (logits.argmax(-1) == targets).float().mean().item()}
    if with_heads and batch.cells is not None:
        seen_loss, seen = model.heads.loss(tokens, *batch.cells)
        loss = loss + HEAD_WEIGHT * seen_loss
        told |= {"cells": seen_loss.item(), "char": seen["char"]}
    if batch.looks is not None:
        looks_loss = model.looks_loss(batch, halfway)
        loss = loss + HEAD_WEIGHT * looks_loss
        told["looks"] = looks_loss.item()
    if with_heads and batch.differs is not None:
        differs_loss = model.difference_loss(batch, halfway)
        loss = loss + HEAD_WEIGHT * differs_loss
        told["differs"] = differs_loss.item()
    return loss, told


@torch.no_grad()
def exact_answers(model: DemoModel, batches: list[Batch]) -> dict[str, float]:
    """Share of wholly right answers per task: every token of the answer is the likeliest one after those before it."""
    right: dict[str, list[bool]] = defaultdict(list)
    for batch in batches:
        hidden, _, _ = model(batch)
        learned = batch.targets != NO_TARGET
        wrong = torch.zeros_like(learned)
        wrong[learned] = model.logits(hidden[learned]).argmax(-1) != batch.targets[learned]
        for row, tasks in enumerate(batch.tasks):
            for segment, task in enumerate(tasks, 1):
                mine = batch.segments[row] == segment
                right[task].append(not bool(wrong[row][mine].any()))
    return {task: round(float(np.mean(values)), 3) for task, values in sorted(right.items())}


def held_out_batches(tokenizer: Tokenizer) -> list[Batch]:
    kinds = ["shapes", "shapes", "text", "text", "pair", "history", "frames", "video", "chart", "receipt"]
    return [
        draw_batch(np.random.default_rng((CHECK_SEED, i)), kind, tokenizer, 40, 1.0, 6, held_out=True)
        for i, kind in enumerate(kinds)
    ]


@torch.no_grad()
def begin(model: DemoModel, tokenizer: Tokenizer, out: Path, batch: Batch) -> None:
    """A fresh start on top of the vision stage where there is one."""
    initialise(model.vision, model.text, batch.patches)
    path = out / "vision.pt"
    if not path.exists():
        return
    saved = torch.load(path, weights_only=True)
    model.vision.load_state_dict(saved["vision"])
    model.heads.load_state_dict(saved["heads"])
    tokens = model.vision(batch.patches, *vision_rotary(*batch.grid, model.vision.head_dim))
    last = model.vision.merger.second
    scale = 0.5 / tokens.pow(2).mean().sqrt()
    last.weight.mul_(scale)
    last.bias.mul_(scale)
    name_what_is_seen(model, tokenizer)


def name_what_is_seen(model: DemoModel, tokenizer: Tokenizer) -> None:
    """Colour and shape words begin near the directions by which the extra heads tell colours and shapes apart."""
    kinds, colours, *_ = torch.split(model.heads.centre.weight, list(CellHeads.SIZES))
    rows = {name: kinds[1 + i] - kinds.mean(0) for i, name in enumerate(SHAPES)}
    rows |= {name: colours[1 + i] - colours.mean(0) for i, name in enumerate(COLOURS)}
    table = model.text.embed.weight
    for name, row in rows.items():
        direction = row * model.heads.norm.weight
        for text in (f" {name}", name.capitalize(), f" {name}s" if name in SHAPES else name):
            ids = tokenizer.encode(text).ids
            if len(ids) == 1:
                table[ids[0]] = 0.5 * table[ids[0]] + 0.05 * direction / direction.pow(2).mean().sqrt()


def work(rank: int, num_processes: int, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.out)
    model = build_model(tokenizer)
    first_progress = 0.0 if args.start is None else 1.0
    data = Batches(args.seed, tokenizer, args.batch, args.steps, num_processes, first_progress)
    named = list(model.named_parameters())
    optimiser = Optimiser([(name, value, share_of(name)) for name, value in named])
    first, path = 0, args.out / "train.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load(saved["optimiser"])
        first = saved["step"]
    elif args.start is None:
        begin(model, tokenizer, args.out, data[0])
    else:
        model.load_state_dict(read_published(args.start, model.state_dict()), strict=False)
    checks = held_out_batches(tokenizer) if rank == 0 else []
    mine = range(first * num_processes + rank, args.steps * num_processes, num_processes)
    loader = DataLoader(data, batch_size=None, sampler=mine, num_workers=1, prefetch_factor=4)
    start = last_save = time.monotonic()
    last_check = start - 150
    with (
        (args.out / "train.jsonl").open("a") as log,
        tqdm(total=args.steps, initial=first, mininterval=10, disable=rank > 0) as bar,
    ):
        for step, batch in enumerate(loader, first):
            loss, told = loss_of(model, batch, with_heads=args.start is None)
            torch.autograd.backward(loss)
            now = time.monotonic()
            stop = average_gradients([value for _, value in named], now - start > 60 * args.minutes)
            optimiser.step(args.rate * min(1.0, (step + 1) / 50, (1 - step / args.steps) / 0.75))
            bar.update()
            if rank > 0:
                if stop:
                    break
                continue
            line = {"step": step, "kind": batch.kind, "s": round(now - start)} | {
                k: round(v, 3) for k, v in told.items()
            }
            if now - last_check > 240:
                line["held_out"] = exact_answers(model, checks)
                last_check = time.monotonic()
            if step % 5 == 0 or "held_out" in line:
                log.write(json.dumps(line) + "\n")
                log.flush()
            if now - last_save > 120 or step + 1 == args.steps or stop:
                save_atomically({"model": model.state_dict(), "optimiser": optimiser.state(), "step": step + 1}, path)
                last_save = now
            if stop:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--steps", type=int, default=1500, help="length of the whole run, all pieces together")
    parser.add_argument("--batch", type=int, default=24, help="samples per process and step")
    parser.add_argument("--minutes", type=float, default=600, help="length of this piece")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--start", type=Path, help="checkpoint folder to go on from, with all kinds of data at once")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rates")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.start is not None:  # its vocabulary, whatever the present phrasings would give
        shutil.copy(args.start / "tokenizer.json", args.out)
    load_tokenizer(args.out)
    launch(work, args.processes, args)


if __name__ == "__main__":
    keep_memory()
    main()
