"""One model in several processes: over NCCL on cards, over gloo in a rehearsal.

Two ranks need two cards. On one card a group of one does what it can: NCCL is asked for every sum, and has nothing to
add. What may wait for ever runs in a process of its own, `python -m card_checks.ranks`, which ends with the one that
started it, or when its time is up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from card_checks.models import (
    WAYS,
    RandomWeights,
    engine_for,
    make_engine,
    make_model,
    published_config,
    request,
    tokens_of,
)
from card_checks.results import Check, Setting
from card_checks.rows import Row
from dashinfer_vlm.child_process import exit_with_parent, how_it_ended, running
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.engine.parallel.meeting import leave, meet
from dashinfer_vlm.layers.backend import choose_backend
from dashinfer_vlm.layers.ranks import ALONE, Ranks
from dashinfer_vlm.models.config import CheckpointConfig, read_config
from dashinfer_vlm.request import Request
from make_checkpoint import write_configs

ARCH = "qwen2_vl"
MOST_S = 100.0
"""For which a process may run, which is less than `gpu_check.py` waits for a word; in a rehearsal `REHEARSAL_S`."""
REHEARSAL_S = 600.0
STEPS = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 64}
"""Few graphs, and prompts in several chunks."""


class OneOfOne(Ranks):
    """The only rank of a group, which asks the group all the same."""

    are_several = True


def ranks(setting: Setting) -> Iterator[Check]:
    """Tokens of ranks are those of a model alone; float32, with a picture."""
    yield "collectives and tokens of a group of one", partial(_apart, setting, "of_one")
    count = 2 if setting.device.type == "cpu" else torch.cuda.device_count()
    if count < 2:
        yield "tokens of two ranks", lambda: Row(note="two ranks need two cards")
    else:
        yield "tokens of two ranks", partial(_apart, setting, "of_two")


def _apart(setting: Setting, what: str) -> Row:
    """What a process of its own finds, which has ended when this returns."""
    with tempfile.TemporaryDirectory() as temporary:
        found, said = Path(temporary, "row"), Path(temporary, "said")
        options = ["--tiny"] if setting.tiny else []
        command = running("card_checks.ranks", what, str(found), "--device", setting.device.type, *options)
        with said.open("w") as out:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT)
            try:
                process.wait(REHEARSAL_S if setting.tiny else MOST_S)
            except subprocess.TimeoutExpired:
                pass
            finally:
                process.kill()
                status = process.wait()
                process.stdin.close()
        if status != 0 or not found.exists():
            raise RuntimeError(f"the process {how_it_ended(status)}; it said: {said.read_text()[-4000:]}")
        return Row(**json.loads(found.read_text()))


def of_one(setting: Setting, folder: Path) -> Row:
    """A group asked for what layers ask for, outside and inside of graphs; then by a model, whose tokens are those of a
    processor by itself."""
    one = OneOfOne()
    meet(str(folder / "meeting"), one, setting.device, EngineConfig(step_timeout_s=60))
    wrong = _wrong_collectives(setting, one)
    config = published_config(ARCH, "tiny")
    requests = _requests(config)
    model, plain = (
        make_model(config, choose_backend(device, torch.float32, ranks=who), small=True)
        for device, who in ((setting.device, one), (torch.device("cpu"), ALONE))
    )
    want = _tokens(make_engine(plain, 4096, STEPS["max_model_len"]), requests)
    wrong += [f"tokens {way}" for way in WAYS if _tokens(engine_for(model, way, 4096, **STEPS), requests) != want]
    leave()
    return Row(error=float(len(wrong)), allowed=0, note=f"{_library(setting)}; wrong: {', '.join(wrong) or 'none'}")


def _wrong_collectives(setting: Setting, one: Ranks) -> list[str]:
    """Those that do not give what they are given, as a group of one does."""
    given = torch.zeros(5, 7, device=setting.device)
    found = torch.zeros(3, 5, 7, device=setting.device)

    def ask() -> None:
        told = given.clone()
        one.broadcast(told)
        torch.stack([one.sum(given.clone()), one.join_columns(given), told], out=found)

    wrong = ["least"] if one.least(7, setting.device) != 7 else []
    for where, run in (("outside", ask), ("inside", None)):
        run = run or setting.captured(ask)  # when NCCL has been asked once: it cannot begin within a graph
        given.normal_()
        found.zero_()
        run()
        setting.wait()
        names = ("sum", "join_columns", "broadcast")
        wrong += [
            f"{name} {where} of graphs" for name, x in zip(names, found, strict=True) if not torch.equal(x, given)
        ]
    return wrong


def _tokens(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    try:
        return tokens_of(engine, requests)
    finally:
        engine.close()


def of_two(setting: Setting, folder: Path) -> Row:
    """A checkpoint loaded by one process, then by two, as a server does it."""
    _write_checkpoint(folder)
    device = setting.device.type
    config = EngineConfig(
        model=str(folder), dtype="float32", device=device, kv_cache_gib=0.01, threads=1, step_timeout_s=60, **STEPS
    )
    requests = _requests(read_config(folder))
    found = []
    for count in (1, 2):
        engine, _ = load_engine(replace(config, parallel_size=count), lambda *_: None)
        found.append(_tokens(engine, requests))
    want, got = found
    apart = sum(a != b for name in want for a, b in zip(want[name], got[name], strict=True))
    total = sum(map(len, want.values()))
    return Row(error=apart / total, allowed=0, note=f"{_library(setting)}; {total} tokens")


class _Kept(RandomWeights):
    """Keeps all that was asked for."""

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__(config, torch.device("cpu"), same_everywhere=True)
        self.taken: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        self.taken[name] = super().take(name, *shape)
        return self.taken[name]


def _write_checkpoint(folder: Path) -> None:
    """Random, without the libraries that `make_checkpoint.py` takes."""
    write_configs(folder, ARCH, "tiny", "float32")
    config = read_config(folder)
    weights, backend = _Kept(config), choose_backend(torch.device("cpu"), torch.float32)
    assert config.vision is not None
    config.family.encoder(config.vision, weights, backend)
    config.family.decoder(config, weights, backend)
    save_file(weights.taken, folder / "model.safetensors")


def _requests(config: CheckpointConfig) -> list[Request]:
    """The second one has pictures, two of them, which ranks share."""
    return [request(config, str(i), [(1, 4, 6), (1, 8, 4)] * (i == 1), 4 + 40 * i, 16, i) for i in range(3)]


def _library(setting: Setting) -> str:
    return f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if setting.device.type == "cuda" else "gloo"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("of_one", "of_two"))
    parser.add_argument("found", type=Path, help="file that gets the row, in a folder for whatever else there is")
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    exit_with_parent(1)
    setting = Setting(torch.device(options.device), options.tiny)
    with torch.inference_mode():
        row = {"of_one": of_one, "of_two": of_two}[options.what](setting, options.found.parent)
    options.found.write_text(json.dumps(asdict(row)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
