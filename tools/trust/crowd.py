"""A thousand streams at once, and five thousand connections that say nothing: how late does HTTP make the tokens?

    python tools/trust/crowd.py --page docs/reliability.md

The server is the real one; its engine (`paced.py`) gives every stream a token at the same moment, again and again, and
notes the moment. The clients are bare sockets that note when bytes come and parse them once all is over, so that they
cost little of the machine that they share with the server. How late a token is, is the time from the one to the other;
what HTTP adds to the gap between two tokens is how much later the second was than the first. Only the time in which all
streams flow counts.
"""

from __future__ import annotations

import gc
import os
import re
import select
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from urllib.parse import urlsplit

import msgspec
import rich_click as click
from tests.e2e.serving import Server

from dashinfer_vlm.bench.processes import ProcessTree
from dashinfer_vlm.cli.command import CONTEXT
from dashinfer_vlm.server.connection import raise_file_limit
from trust import paced
from trust.mix import CHAT
from trust.page import write_section
from trust.server import TIMEOUT_S, model_folder, serving

MOST_ADDED_S = 0.020
FLAGS = ["--keep-alive-s", "900"]
"""The idle ones would be let go."""
_PACED = (sys.executable, str(Path(paced.__file__)))
_TEXT = re.compile(rb'"content":"(\w+)"')


class Stream:
    """One request on one connection, and what came when."""

    def __init__(self, url: str, number: int) -> None:
        address = urlsplit(url)
        self.socket = socket.create_connection((address.hostname, address.port), timeout=TIMEOUT_S)
        self.socket.sendall(_request(address.netloc, number))
        self.pieces: list[tuple[float, bytes]] = []
        self.flows = self.is_over = False

    def read(self) -> None:
        """What is there; called when something is."""
        data = self.socket.recv(1 << 16)
        self.pieces.append((time.perf_counter(), data))
        self.flows = self.flows or _TEXT.search(data) is not None
        self.is_over = not data or data.endswith(b"0\r\n\r\n")  # the end of a chunked body

    def fault(self) -> str:
        """What is wrong with the answer; empty where it is whole."""
        whole = b"".join(data for _, data in self.pieces)
        if not whole.startswith(b"HTTP/1.1 200 "):
            return whole[:60].decode(errors="replace") or "no answer"
        ends = whole.count(b'"finish_reason":"length"'), whole.count(b"data: [DONE]")
        if ends != (1, 1):
            return f"{ends[0]} final events, {ends[1]} times [DONE]"
        text = b"".join(_TEXT.findall(whole)).decode()
        return "" if text in paced.LETTERS * (len(text) // len(paced.LETTERS) + 2) else "tokens are missing"

    def delays(self, stamps: Sequence[float], start_s: float, end_s: float) -> list[float]:
        """How late each token was that came between the two moments, in their order."""
        found = []
        step = None
        for at_s, data in self.pieces:
            for letter in b"".join(_TEXT.findall(data)).decode():
                step = _latest(stamps, at_s, letter) if step is None else step + 1
                if start_s <= at_s < end_s:
                    found.append(at_s - stamps[step])
        return found


def _latest(stamps: Sequence[float], at_s: float, letter: str) -> int:
    """The step before `at_s` that gave this letter last."""
    index = paced.LETTERS.index(letter)
    return max(step for step in range(index, len(stamps), len(paced.LETTERS)) if stamps[step] <= at_s)


class Crowd:
    """Streams that are read together."""

    def __init__(self, url: str, num_streams: int) -> None:
        self._poll = select.epoll()
        self._by_file: dict[int, Stream] = {}
        for number in range(num_streams):
            stream = Stream(url, number)
            self._by_file[stream.socket.fileno()] = stream
            self._poll.register(stream.socket.fileno(), select.EPOLLIN)
        self.streams = list(self._by_file.values())

    def read(self, seconds: float, until: Callable[[Stream], bool] | None = None) -> None:
        """For so long, or until every stream is so."""
        end_s = time.perf_counter() + seconds
        while (now_s := time.perf_counter()) < end_s:
            for file, _ in self._poll.poll(end_s - now_s):
                stream = self._by_file[file]
                stream.read()
                if stream.is_over:
                    self._poll.unregister(file)
                    stream.socket.close()
            if until is not None and all(stream.is_over or until(stream) for stream in self.streams):
                return


def _request(host: str, number: int) -> bytes:
    messages = [{"role": "user", "content": f"{number} says the same as all the others do"}]
    body = msgspec.json.encode({"messages": messages, "max_tokens": 100_000, "stream": True})
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


@dataclass(frozen=True, slots=True)
class Row:
    """What one pace showed."""

    every_s: float
    num_streams: int
    delays: list[list[float]]
    """Of each stream's tokens, in seconds."""
    faults: Counter[str]
    cpu_s: float
    """Processor time of the HTTP process for one token."""
    share: float
    """Of a core, that it took."""

    def cells(self) -> str:
        late = [seconds for delays in self.delays for seconds in delays]
        cuts = quantiles(late, n=100)
        times = " | ".join(f"{seconds * 1000:.1f}" for seconds in (cuts[49], cuts[98], max(late), self.added_s))
        rate = f"{self.num_streams / self.every_s:,.0f}"
        return f"| {self.every_s:g} | {rate} | {times} | {self.cpu_s * 1e6:.0f} | {self.share:.0%} |"

    @property
    def added_s(self) -> float:
        """To the 99th percentile of the gaps between two tokens of a stream."""
        return quantiles([after - before for delays in self.delays for before, after in pairwise(delays)], n=100)[98]


def measure(every_s: float, num_streams: int, num_idle: int, seconds: float) -> tuple[Row, int]:
    """A server of its own, and how many of the idle connections were still open at the end."""
    with ExitStack() as stack:
        stamps = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "stamps"
        env = {paced.EVERY_S: str(every_s), paced.STAMPS: str(stamps)}
        server = stack.enter_context(serving(model_folder("qwen2_vl"), *FLAGS, env=env, under=_PACED))
        idle = [stack.enter_context(_idle(server.address)) for _ in range(num_idle)]
        crowd = Crowd(server.address, num_streams)
        crowd.read(TIMEOUT_S, lambda stream: stream.flows)
        crowd.read(2 * every_s)  # those that came meanwhile
        start_s, before_s = time.perf_counter(), _cpu_s(server.process.pid)
        crowd.read(seconds)
        end_s, used_s = time.perf_counter(), _cpu_s(server.process.pid) - before_s
        _end_streams(server)
        crowd.read(TIMEOUT_S, lambda stream: stream.is_over)
        times = paced.read_stamps(stamps)
        delays = [stream.delays(times, start_s, end_s) for stream in crowd.streams]
        faults = Counter(fault for stream in crowd.streams if (fault := stream.fault() or _hangs(stream)))
        row = Row(every_s, num_streams, delays, faults, used_s / sum(map(len, delays)), used_s / (end_s - start_s))
        return row, sum(_is_open(connection) for connection in idle)


def _hangs(stream: Stream) -> str:
    return "" if stream.is_over else "hangs"


def _end_streams(server: Server) -> None:
    for pid in ProcessTree(server.process.pid).members():
        if "be_engine" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGUSR1)


def page(rows: Sequence[Row], num_idle: int, num_open: int, load: float) -> str:
    lines = [
        "| a token for each stream, every s | tokens/s in all | late by, median ms | 99th percentile | the latest "
        "| added to the 99th percentile of the gaps, ms | processor time of the HTTP process, µs/token | of a core |",
        "|---|---|---|---|---|---|---|---|",
        *(row.cells() for row in rows),
        "",
    ]
    faults = sum((row.faults for row in rows), Counter[str]())
    lines.append(f"{rows[0].num_streams:,} streams, errors: {dict(faults) or 'none'}.")
    lines.append(f"{num_idle:,} idle connections meanwhile, at least {num_open:,} of them open at the end.")
    lines.append(f"Before it, {load:.1f} programs wanted one of the {os.cpu_count()} cores.")
    return "\n".join(lines)


def _idle(url: str) -> socket.socket:
    """A connection that has had an answer and says nothing any more."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=TIMEOUT_S)
    connection.sendall(f"GET /health HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
    connection.recv(4096)
    return connection


def _cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _is_open(connection: socket.socket) -> bool:
    try:
        connection.setblocking(False)
        return bool(connection.recv(4096))
    except BlockingIOError:
        return True


@click.command(context_settings=CONTEXT)
@click.option("--streams", "num_streams", default=1000, show_default=True)
@click.option(
    "--every",
    "paces",
    default=(0.4, 0.2, 0.1),
    multiple=True,
    show_default=True,
    help="Seconds between two tokens of a stream. Repeatable; the first one is the one that must be in time.",
)
@click.option("--seconds", default=20.0, show_default=True)
@click.option("--idle", "num_idle", default=5000, show_default=True)
@click.option("--page", "path", default="", help="Page whose section is written anew.")
def main(num_streams: int, paces: tuple[float, ...], seconds: float, num_idle: int, path: str) -> None:
    raise_file_limit()
    gc.disable()  # the clients keep all that comes, and going through it would make tokens late by a tenth of a second
    load = os.getloadavg()[0]
    rows, opens = zip(*(measure(every_s, num_streams, num_idle, seconds) for every_s in paces), strict=True)
    text = page(rows, num_idle, min(opens), load)
    print(text)
    if path:
        write_section(path, "crowd", text)
    sys.exit(any(row.faults for row in rows) or rows[0].added_s > MOST_ADDED_S)


if __name__ == "__main__":
    main()
