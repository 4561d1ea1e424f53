"""What goes wrong for one client costs that client a helpful error, and nobody else anything: over the real stack."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.e2e.conftest import picture
from tests.e2e.serving import Server

WAIT_S = 60.0


def png(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(data, "PNG")
    return data.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A tiny file whose header names a huge picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def body(*content: dict[str, Any], role: str = "user", **options: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": "Look."}, *content]
    return {"model": "model", "messages": [{"role": role, "content": parts}], "max_tokens": 8, **options}


def raw(text: str) -> bytes:
    """A valid body with its last brace replaced."""
    return json.dumps(body()).encode()[:-1] + text.encode()


BAD: dict[str, tuple[dict[str, Any] | bytes, int, str]] = {
    "not an image": (body(image_part(b"GIF89 no, just text")), 422, "image"),
    "truncated image": (body(image_part(picture("red")[:400])), 422, "truncated"),
    "1x10000": (body(image_part(png(1, 10000))), 422, "200"),
    "40000x40000 header": (body(image_part(png_that_claims(40000, 40000))), 422, "pixels"),
    "image in a system message": (body(image_part(png(84, 84)), role="system"), 400, "system message"),
    "unknown role": (body(role="wizard"), 400, "wizard"),
    "prompt too long": (
        {"model": "model", "messages": [{"role": "user", "content": "word " * 40000}]},
        400,
        "context",
    ),
    "more images than the limit": (body(*[image_part(png(56, 56))] * 9), 400, "8"),
    "negative max_tokens": (body(max_tokens=-5), 400, "max_tokens"),
    "temperature below 0": (body(temperature=-0.5), 400, "temperature"),
    "top_p above 1": (body(top_p=1.5), 400, "top_p"),
    "NaN temperature": (raw(', "temperature": NaN}'), 400, "temperature"),
    "infinite penalty": (raw(', "presence_penalty": Infinity}'), 400, "presence_penalty"),
    "malformed JSON": (raw(', "temperature": }'), 400, "JSON"),
    "no messages": ({"model": "model", "messages": []}, 400, "messages"),
    "unknown option": (body(warp_factor=9), 400, "warp_factor"),
    "private address": (body({"type": "image_url", "image_url": {"url": "http://10.0.0.1/x.png"}}), 422, "10.0.0.1"),
    "local file": (body({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), 422, "file"),
}


def post(server: Server, content: dict[str, Any] | bytes) -> httpx.Response:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{server.address}/v1/chat/completions", content=data, headers=headers, timeout=WAIT_S)


@pytest.fixture(scope="module")
def bystander(server: Server) -> Iterator[list[str]]:
    """A client that asks the same thing again and again while others misbehave, and what it was told each time."""
    answers: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            reply = post(server, body(image_part(png(140, 84)), temperature=0))
            answers.append(reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else reply.text)

    thread = threading.Thread(target=ask)
    thread.start()
    yield answers
    stop.set()
    thread.join()
    assert answers
    assert len(set(answers)) == 1, "somebody else's bad input changed an answer"


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_message_that_helps(server: Server, bystander: list[str], name: str) -> None:
    content, status, needle = BAD[name]
    reply = post(server, content)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert needle in json.dumps(error)
    assert "Traceback" not in reply.text
    assert "/dev/shm" not in reply.text


def test_a_picture_of_one_pixel_is_answered(server: Server, bystander: list[str]) -> None:
    reply = post(server, body(image_part(png(1, 1)), ignore_eos=True))
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == 8


def engine_figures(server: Server) -> dict[str, float]:
    prefix = "dashinfer_engine_num_"
    lines = httpx.get(f"{server.address}/metrics", timeout=WAIT_S).text.splitlines()
    found = (line.removeprefix(prefix).split() for line in lines if line.startswith(prefix))
    return {name: float(value) for name, value in found}


def wait_until_all_is_free(server: Server) -> None:
    """Until a scrape finds no sequence and every block free; fails when something outlives its client."""
    deadline = time.monotonic() + WAIT_S
    while True:
        now = engine_figures(server)
        if not now["running"] and not now["waiting"] and now["free_blocks"] == now["blocks"]:
            return
        assert time.monotonic() < deadline, f"something is still held: {now}"


def send_and_leave(server: Server, content: dict[str, Any]) -> None:
    """Hang up without reading a byte of the answer, once the picture, which nobody has sent before, is encoded."""
    url, data = httpx.URL(server.address), json.dumps(content).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(data)}\r\n\r\n"
    num_encoded, deadline = engine_figures(server)["items_encoded_total"], time.monotonic() + WAIT_S
    with socket.create_connection((url.host, url.port or 80), WAIT_S) as connection:
        connection.sendall(head.encode() + data)
        while engine_figures(server)["items_encoded_total"] == num_encoded:
            assert time.monotonic() < deadline, "the picture was never encoded"


@pytest.mark.parametrize(
    ("leave_after", "width"), [("the request", 392), ("the first event", 420), ("some events", 448)]
)
def test_a_client_that_leaves_frees_everything_it_held(server: Server, leave_after: str, width: int) -> None:
    long = body(image_part(png(width, 336)), max_tokens=5000, ignore_eos=True, stream=True)
    if leave_after == "the request":
        send_and_leave(server, long)
    else:
        events = 1 if leave_after == "the first event" else 12
        with (
            httpx.Client(timeout=WAIT_S) as client,
            client.stream("POST", f"{server.address}/v1/chat/completions", json=long) as reply,
        ):
            for _, _line in zip(range(2 * events), reply.iter_lines(), strict=False):
                pass
    wait_until_all_is_free(server)
