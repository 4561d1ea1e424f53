"""A picture is fetched, decoded and encoded once, however many send it: a real server and its own counters."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import CheckpointMaker
from tests.e2e.conftest import picture
from tests.e2e.serving import Server
from tests.loopback import Site, running

NUM_CLIENTS = 16
TIMEOUT_S = 120.0
FETCHES = "dashinfer_media_fetches_total"
DECODES = "dashinfer_media_decodes_total"
ENCODES = "dashinfer_engine_num_items_encoded_total"
COUNTERS = (FETCHES, DECODES, ENCODES)


class GatedSite(Site):
    """Answers nothing until the gate opens, so that everyone who asks is there at once."""

    def __init__(self, bodies: dict[str, tuple[str, bytes]]) -> None:
        super().__init__(bodies)
        self.gate = threading.Event()

    def answer(self, url: str) -> tuple[int, dict[str, str], bytes]:
        assert self.gate.wait(TIMEOUT_S)
        return super().answer(url)


@pytest.fixture(scope="module")
def server(checkpoint: CheckpointMaker) -> Iterator[Server]:
    folder = str(checkpoint("qwen2_vl", dtype="bfloat16"))
    flags = ("--port", "0", "--kv-cache-gib", "0.05", "--allowed-media-domains", "127.0.0.1")
    server = Server("--model", folder, *flags, "--image-fetch-timeout-s", str(TIMEOUT_S))
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


def metrics(server: Server) -> dict[str, float]:
    reply = httpx.get(f"{server.address}/metrics", timeout=TIMEOUT_S)
    families = text_string_to_metric_families(reply.text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def gained(server: Server, before: dict[str, float]) -> tuple[float, ...]:
    """Fetches, decodes and encodes since `before`."""
    now = metrics(server)
    return tuple(now[name] - before[name] for name in COUNTERS)


def user(text: str, *urls: str) -> dict[str, object]:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def ask(server: Server, messages: list[dict[str, object]]) -> str:
    """The answer's text, a few tokens."""
    with OpenAI(base_url=f"{server.address}/v1", api_key="EMPTY", max_retries=0, timeout=TIMEOUT_S) as client:
        reply = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=messages,  # type: ignore[arg-type] # the client's own types are narrower than what it takes
            max_completion_tokens=6,
            temperature=0,
        )
        return reply.choices[0].message.content or ""


def data_url(colour: str) -> str:
    return "data:image/png;base64," + base64.b64encode(picture(colour, "PNG")).decode()


def test_sixteen_clients_with_one_new_picture_cause_one_fetch_one_decode_and_one_encode(server: Server) -> None:
    site = GatedSite({"/new.jpg": ("image/jpeg", picture("purple"))})
    before = metrics(server)
    with running(site) as address, ThreadPoolExecutor(NUM_CLIENTS) as clients:
        asking = [
            clients.submit(ask, server, [user(f"What is this? Client {i}.", f"{address}/new.jpg")])
            for i in range(NUM_CLIENTS)
        ]
        while metrics(server)["dashinfer_requests_in_flight"] < NUM_CLIENTS:
            assert not any(each.done() for each in asking)
        site.gate.set()
        assert len([each.result() for each in asking]) == NUM_CLIENTS
    assert site.asked == ["/new.jpg"]
    assert gained(server, before) == (1, 1, 1)


def test_sixteen_clients_that_upload_one_new_picture_cause_one_decode_and_one_encode(server: Server) -> None:
    before, url = metrics(server), data_url("orange")
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        answers = list(clients.map(lambda i: ask(server, [user(f"Client {i}: what is it?", url)]), range(NUM_CLIENTS)))
    assert len(answers) == NUM_CLIENTS
    assert gained(server, before) == (0, 1, 1)


def test_the_same_pixels_from_another_file_are_encoded_once(server: Server) -> None:
    before = metrics(server)
    for kind in ("PNG", "BMP"):
        data = base64.b64encode(picture("teal", kind)).decode()
        ask(server, [user("What is this?", f"data:image/{kind.lower()};base64,{data}")])
    assert gained(server, before) == (0, 2, 1)


def test_later_turns_that_resend_their_pictures_decode_and_encode_nothing(server: Server) -> None:
    site = Site({"/photo.jpg": ("image/jpeg", picture("navy"))})
    with running(site) as address:
        before = metrics(server)
        messages = [user("Compare these.", data_url("red"), f"{address}/photo.jpg")]
        messages.append({"role": "assistant", "content": ask(server, messages)})
        assert gained(server, before) == (1, 2, 2)
        for turn in range(3):
            messages.append(user(f"And now? Turn {turn}."))
            messages.append({"role": "assistant", "content": ask(server, messages)})
        assert gained(server, before)[1:] == (2, 2)
        assert len(site.asked) == 4  # a URL is no identity: it is looked at again, and its bytes are known


def test_another_chat_with_the_same_pictures_encodes_nothing_though_no_prefix_is_shared(server: Server) -> None:
    url = data_url("brown")
    ask(server, [user("Describe it.", url)])
    before = metrics(server)
    ask(server, [{"role": "system", "content": "You speak in riddles."}, user("Describe it.", url)])
    assert gained(server, before) == (0, 0, 0)
    hits = "dashinfer_engine_embedding_hits_total"
    assert metrics(server)[hits] == before[hits] + 1
