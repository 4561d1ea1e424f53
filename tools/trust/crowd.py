"""A thousand streams at once, and five thousand connections that say nothing: what does HTTP add to the gaps of tokens?

    python tools/trust/crowd.py --page docs/reliability.md

The same requests go to the engine's process alone, and then to a server with the same engine. Its clients are sockets
that note when bytes come and parse them once all is over, so that they cost little of the machine that they share with
the server. What HTTP adds is the difference between the 99th percentiles of the gaps.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections import Counter
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit

import rich_click as click

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.host.process import ProcessEngine
from dashinfer_vlm.request import Request, SamplingParams
from dashinfer_vlm.server.connection import raise_file_limit
from trust.mix import CHAT
from trust.page import write_section
from trust.server import TIMEOUT_S, model_folder, serving

NUM_PROMPT_TOKENS = 32
MOST_ADDED_S = 0.020
ENGINE = {
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 2048,
    "kv_cache_gib": 2.0,
    "max_model_len": 4096,
    "threads": 1,
}


@dataclass(frozen=True, slots=True)
class Gaps:
    """Between two tokens of a stream, over all streams, in seconds."""

    middle: float
    p99: float

    @classmethod
    def of(cls, streams: list[list[float]]) -> Gaps:
        """Of the times at which each stream's pieces came, while all of them flowed."""
        start_s, end_s = max(times[0] for times in streams), min(times[-1] for times in streams)
        flowing = [[at_s for at_s in times if start_s <= at_s <= end_s] for times in streams]
        if start_s >= end_s:
            sys.exit(f"no moment saw all streams flow, by {start_s - end_s:.1f} s: more --tokens are needed")
        cuts = quantiles([after - before for times in flowing for before, after in pairwise(times)], n=100)
        return cls(cuts[49], cuts[98])


class Client(asyncio.Protocol):
    """One request on one connection."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._pieces: list[tuple[float, bytes]] = []
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._pieces.append((time.perf_counter(), data))
        if data.endswith(b"0\r\n\r\n"):  # the end of a chunked body
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set_result(None)

    def fault(self) -> str:
        """What is wrong with the answer; empty where it is whole."""
        whole = b"".join(data for _, data in self._pieces)
        if not whole.startswith(b"HTTP/1.1 200 "):
            return whole[:60].decode(errors="replace") or "no answer"
        ends = whole.count(b'"finish_reason":"length"'), whole.count(b"data: [DONE]")
        return "" if ends == (1, 1) else f"{ends[0]} final events, {ends[1]} times [DONE]"

    def times(self) -> list[float]:
        """When each piece with a token came; the first event, of the role alone, comes with the first token."""
        return [at_s for at_s, data in self._pieces if b'"content":' in data]


async def engine_alone(num_streams: int, num_tokens: int) -> Gaps:
    """In processes as the server has them, with nothing done about the tokens."""
    engine = await ProcessEngine.start(EngineConfig(model=str(model_folder("qwen2_vl")), **ENGINE))
    times: list[list[float]] = [[] for _ in range(num_streams)]
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)

    async def stream(number: int) -> None:
        prompt = [number % 200 + 300, *range(300, 300 + NUM_PROMPT_TOKENS)]
        async with aclosing(engine.generate(Request(id=str(number), prompt_ids=prompt, params=params))) as outputs:
            async for output in outputs:
                if output.token_ids:
                    times[number].append(time.perf_counter())

    await asyncio.gather(*(stream(number) for number in range(num_streams)))
    await engine.close()
    return Gaps.of(times)


async def over_http(url: str, num_streams: int, num_tokens: int) -> tuple[Gaps, Counter[str]]:
    """Gaps, and what went wrong how often."""
    address = urlsplit(url)
    loop = asyncio.get_running_loop()
    requests = [_request(address.netloc, number, num_tokens) for number in range(num_streams)]
    made = [
        loop.create_connection(lambda request=request: Client(request), address.hostname, address.port)
        for request in requests
    ]
    clients = [client for _, client in await asyncio.gather(*made)]
    await asyncio.wait([client.over for client in clients], timeout=TIMEOUT_S)
    faults = Counter(client.fault() if client.over.done() else "hangs" for client in clients)
    faults.pop("", None)
    return Gaps.of([client.times() for client in clients]), faults


def _request(host: str, number: int, num_tokens: int) -> bytes:
    content = f"{number} " + "the " * (NUM_PROMPT_TOKENS // 2)
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def page(alone: Gaps, http: Gaps, faults: Counter[str], num_streams: int, idle: tuple[int, int], load: float) -> str:
    lines = ["| gap between two tokens of a stream | median, ms | 99th percentile, ms |", "|---|---|---|"]
    for name, gaps in (("engine's process alone", alone), ("over HTTP", http)):
        lines.append(f"| {name} | {gaps.middle * 1000:.0f} | {gaps.p99 * 1000:.0f} |")
    lines += [f"| added | {(http.middle - alone.middle) * 1000:+.0f} | {(http.p99 - alone.p99) * 1000:+.0f} |", ""]
    lines.append(f"{num_streams:,} streams, errors: {dict(faults) or 'none'}.")
    lines.append(f"{idle[0]:,} idle connections meanwhile, {idle[1]:,} of them open at the end.")
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
        return bool(connection.recv(4096, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True


@click.command()
@click.option("--streams", "num_streams", default=1000, show_default=True)
@click.option("--tokens", "num_tokens", default=1500, show_default=True)
@click.option("--idle", "num_idle", default=5000, show_default=True)
@click.option("--page", "path", default="", help="Page whose section is written anew.")
def main(num_streams: int, num_tokens: int, num_idle: int, path: str) -> None:
    raise_file_limit()
    load = os.getloadavg()[0]
    alone = asyncio.run(engine_alone(num_streams, num_tokens))
    flags = ["--keep-alive-s", "900"]  # the idle ones would be let go
    flags += [text for name, value in ENGINE.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with ExitStack() as stack:
        server = stack.enter_context(serving(model_folder("qwen2_vl"), *flags))
        idle = [stack.enter_context(_idle(server.address)) for _ in range(num_idle)]
        before_s = _cpu_s(server.process.pid)
        http, faults = asyncio.run(over_http(server.address, num_streams, num_tokens))
        token_s = (_cpu_s(server.process.pid) - before_s) / (num_streams * num_tokens)
        num_open = sum(_is_open(connection) for connection in idle)
    text = page(alone, http, faults, num_streams, (num_idle, num_open), load)
    text += f"\nThe HTTP process took {token_s * 1e6:.0f} µs of processor time for each token.\n"
    print(text)
    if path:
        write_section(path, "crowd", text)
    sys.exit(bool(faults) or http.p99 - alone.p99 > MOST_ADDED_S)


if __name__ == "__main__":
    main()
