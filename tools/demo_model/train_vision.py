"""First stage: the vision tower alone learns what stands in each cell (no text model, several times the pictures per
second).

PYTHONPATH=tools python tools/demo_model/train_vision.py --minutes 20
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from demo_model.batches import in_token_order
from demo_model.checkpoint import save_atomically
from demo_model.model import CellHeads, Shape, Vision, initialise, patches_of, vision_rotary
from demo_model.optimiser import Optimiser
from demo_model.parallel import average_gradients, keep_memory, launch
from demo_model.scenes import (
    HELD_OUT_FONTS,
    PATCH,
    SHAPE_SIZES,
    TEXT_SIZES,
    TRAIN_FONTS,
    cell_labels,
    random_letters,
    random_shapes,
    random_text,
    render,
    size_of,
)


class CellPictures(Dataset[tuple[torch.Tensor, ...]]):
    """Batch number `i` is drawn from (seed, i) alone, so that a resumed run sees what an unbroken one would."""

    def __init__(self, seed: int, batch: int, num_batches: int, fonts: tuple[str, ...]) -> None:
        self.seed, self.batch, self.num_batches, self.fonts = seed, batch, num_batches, fonts

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        rng = np.random.default_rng((self.seed, index))
        hardness = min(1.0, index / (0.5 * self.num_batches))
        of_text = rng.random() < 0.72
        width, height = size_of(rng, TEXT_SIZES if of_text else SHAPE_SIZES)
        pictures, kinds, colours, centres = [], [], [], []
        for _ in range(self.batch):
            if not of_text:
                scene = random_shapes(rng, width, height, int(rng.integers(1, 8)), hardness)
            else:
                with_shape = rng.random() < 0.3
                scene = random_text(rng, random_letters(rng, width), width, height, self.fonts, with_shape)
            labels = cell_labels(scene)
            pictures.append(render(rng, scene, hardness))
            kinds.append(in_token_order(labels.kind))
            colours.append(in_token_order(labels.colour))
            centres.append(labels.centre.reshape(-1, 4))
        arrays = (patches_of(np.stack(pictures)), np.stack(kinds), np.stack(colours), np.stack(centres))
        return (*(torch.from_numpy(array) for array in arrays), torch.tensor((height // PATCH, width // PATCH)))


def rotary_of(vision: Vision, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = grid.tolist()
    return vision_rotary(rows, columns, vision.head_dim)


def held_out(vision: Vision, heads: CellHeads, checks: list[tuple[torch.Tensor, ...]]) -> dict[str, float]:
    with torch.no_grad():
        seen = [heads.loss(vision(c[0], *rotary_of(vision, c[4])), *c[1:4])[1] for c in checks]
    return {f"held_{name}": round(float(np.nanmean([values[name] for values in seen])), 3) for name in seen[0]}


def work(rank: int, num_processes: int, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    shape = Shape()
    vision, heads = Vision(shape), CellHeads(shape.hidden_size)
    data = CellPictures(args.seed, args.batch, args.steps * num_processes, TRAIN_FONTS)
    named = [*vision.named_parameters(), *heads.named_parameters()]
    optimiser = Optimiser([(name, value, 1.0) for name, value in named])
    first, path = 0, args.out / "vision.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        vision.load_state_dict(saved["vision"])
        heads.load_state_dict(saved["heads"])
        optimiser.load(saved["optimiser"])
        first = saved["step"]
    else:
        initialise(vision, None, torch.cat([data[i][0].flatten(0, 1) for i in range(8)]))
    checks = [CellPictures(args.seed + 1000, 32, 1, HELD_OUT_FONTS)[i] for i in range(6)] if rank == 0 else []
    mine = range(first * num_processes + rank, args.steps * num_processes, num_processes)
    start = last_save = time.monotonic()
    log = (args.out / "vision.jsonl").open("a")
    for step, batch in enumerate(
        DataLoader(data, batch_size=None, sampler=mine, num_workers=1, prefetch_factor=4), first
    ):
        patches, kind, colour, centre, grid = batch
        loss, seen = heads.loss(vision(patches, *rotary_of(vision, grid)), kind, colour, centre)
        torch.autograd.backward(loss)
        now = time.monotonic()
        stop = average_gradients([value for _, value in named], now - start > 60 * args.minutes)
        optimiser.step(min(1.0, (step + 1) / 40, (1 - step / args.steps) / 0.35))
        if rank == 0 and step % 10 == 0:
            pictures = (step - first) * args.batch * num_processes
            line = {
                "step": step,
                "loss": round(loss.item(), 3),
                "s": round(now - start),
                "per_s": round(pictures / (now - start), 1),
            }
            line |= {name: round(value, 3) for name, value in seen.items()}
            log.write(json.dumps(line | (held_out(vision, heads, checks) if step % 50 == 0 else {})) + "\n")
            log.flush()
        if rank == 0 and (now - last_save > 90 or step + 1 == args.steps or stop):
            state = {
                "vision": vision.state_dict(),
                "heads": heads.state_dict(),
                "optimiser": optimiser.state(),
                "step": step + 1,
            }
            save_atomically(state, path)
            last_save = now
        if stop:
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--steps", type=int, default=800, help="length of the whole run, all pieces together")
    parser.add_argument("--batch", type=int, default=32, help="pictures per process and step")
    parser.add_argument("--minutes", type=float, default=600, help="length of this piece")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    launch(work, args.processes, args)


if __name__ == "__main__":
    keep_memory()
    main()
