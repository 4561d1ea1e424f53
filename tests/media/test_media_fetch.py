"""Fetching from hosts that are slow, large, lying or hostile, over real sockets."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from tests.media.site import Site

from dashinfer_vlm.errors import (
    MediaError,
    MediaFetchError,
    MediaRefusedError,
    MediaTimeoutError,
    MediaTooLargeError,
    MediaUnavailableError,
)
from dashinfer_vlm.media.fetch import Fetcher, Resolver, decode_data_url, read_file, split_frames
from dashinfer_vlm.media.policy import IPAddress, MediaPolicy, Target

FetcherMaker = Callable[..., Fetcher]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of named.test, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program to make a certificate")
    path = tmp_path_factory.mktemp("tls") / "named.pem"
    subject = ["-subj", "/CN=named.test", "-addext", "subjectAltName=DNS:named.test"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(path), *subject]
    made = subprocess.run(command, check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + made.stdout)
    return path


@pytest.fixture
async def fetcher(site: Site) -> AsyncIterator[FetcherMaker]:
    """`fetcher(domains, resolve=None)`; by default only the site may be fetched."""
    made: list[Fetcher] = []

    def make(*domains: str, resolve: Resolver | None = None, policy: MediaPolicy | None = None) -> Fetcher:
        policy = policy or MediaPolicy(domains or (f"127.0.0.1:{site.port}",))
        made.append(Fetcher(policy, resolve=resolve))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def get(fetcher: Fetcher, url: str, max_bytes: int = 1000, timeout_s: float = 20.0) -> bytes:
    return await fetcher.fetch(url, max_bytes=max_bytes, timeout_s=timeout_s)


async def test_a_body_arrives_as_it_is(site: Site, fetcher: FetcherMaker) -> None:
    body = os.urandom(1000)
    assert await get(fetcher(), site.serve("/a?b=%2F", body)) == body
    assert site.paths() == ["/a?b=%2F"]


async def test_nothing_about_the_server_is_told_to_the_host(
    site: Site, fetcher: FetcherMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password key")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    one = fetcher()
    url = site.serve("/a", b"x", set_cookie="id=1; Path=/")
    await get(one, url)
    await get(one, url)
    for _, headers in site.requests:
        assert set(headers) == {"host", "accept", "accept-encoding", "connection", "user-agent"}
        assert headers["user-agent"] == "dashinfer-vlm"


async def test_the_limit_holds_whatever_length_is_announced(site: Site, fetcher: FetcherMaker) -> None:
    one = fetcher()
    assert len(await get(one, site.serve("/fits", b"x" * 1000))) == 1000
    with pytest.raises(MediaTooLargeError, match="announces 1001 bytes; the limit is 1000"):
        await get(one, site.serve("/announced", b"x" * 1001))
    with pytest.raises(MediaTooLargeError, match="sends more than the limit of 1000 bytes"):
        await get(one, site.serve("/silent", b"x" * 1001, content_length=""))
    with pytest.raises(MediaTooLargeError, match="announces 99999999999999999999"):
        await get(one, site.serve("/absurd", b"x", content_length="9" * 20))


async def test_a_stream_without_end_is_cut_at_the_limit(site: Site, fetcher: FetcherMaker) -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
            await writer.drain()

    site.routes["/endless"] = endless
    with pytest.raises(MediaTooLargeError, match="sends more than"):
        await get(fetcher(), site.url("/endless"), max_bytes=100_000)


async def test_a_host_that_stalls_or_never_answers_times_out_in_total(site: Site, fetcher: FetcherMaker) -> None:
    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        writer.write(b"x")
        await reader.read()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    site.routes |= {"/stall": stall, "/silent": silent}
    for path in ("/stall", "/silent"):
        with pytest.raises(MediaTimeoutError, match=r"127\.0\.0\.1 did not deliver in time"):
            await get(fetcher(), site.url(path), timeout_s=0.3)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort", "broke off"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "broke off"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "broke off"),
        (b"", "broke off"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "no bytes"),
        (b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n", "status 500"),
        (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n", "status 429"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "status 204"),
        (b"HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n", "status 302"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\nx", "compressed"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000 + b"\r\n\r\n", "broke off"),
    ],
)
async def test_an_answer_that_is_none_is_the_hosts_failure(
    site: Site, fetcher: FetcherMaker, answer: bytes, message: str
) -> None:
    async def route(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    site.routes["/a"] = route
    with pytest.raises(MediaFetchError, match=message) as caught:
        await get(fetcher(), site.url("/a"))
    assert str(site.port) not in str(caught.value)


async def test_a_closed_port_and_an_unknown_host_are_the_hosts_failure(fetcher: FetcherMaker) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(MediaFetchError, match=r"no connection to 127\.0\.0\.1$"):
            await get(fetcher("127.0.0.1"), f"http://127.0.0.1:{port}/")


async def test_a_host_that_has_no_address_is_unknown(fetcher: FetcherMaker) -> None:
    async def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(MediaFetchError, match=r"^nowhere\.example is not a known host$"):
        await get(fetcher("nowhere.example", resolve=unknown), "http://nowhere.example/")


async def test_the_systems_resolver_is_asked(site: Site, fetcher: FetcherMaker) -> None:
    url = site.serve("/a", b"x").replace("127.0.0.1", "localhost")
    assert await get(fetcher("localhost"), url) == b"x"
    with pytest.raises(MediaRefusedError, match="localhost is not a public host"):
        await get(fetcher(policy=MediaPolicy()), url)


async def test_three_redirects_are_followed_and_a_fourth_is_not(site: Site, fetcher: FetcherMaker) -> None:
    site.serve("/4", b"x")
    for n, status in ((3, 308), (2, 303), (1, 302), (0, 301)):
        site.serve(f"/{n}", b"moved", status=status, location=f"/{n + 1}")
    assert await get(fetcher(), site.url("/1")) == b"x"
    with pytest.raises(MediaFetchError, match="redirects more than 3 times"):
        await get(fetcher(), site.url("/0"))


@pytest.mark.parametrize(
    "location", ["http://169.254.169.254/latest/meta-data", "http://localhost/", "//10.0.0.1/", "http://u@127.0.0.1/"]
)
async def test_a_redirect_to_a_closed_host_is_refused(site: Site, fetcher: FetcherMaker, location: str) -> None:
    with pytest.raises(MediaRefusedError):
        await get(fetcher(), site.serve("/a", b"", status=302, location=location))


async def test_a_redirect_to_a_file_is_an_error(site: Site, fetcher: FetcherMaker) -> None:
    with pytest.raises(MediaError, match="must start with http"):
        await get(fetcher(), site.serve("/a", b"", status=302, location="file:///etc/passwd"))


class LoopbackIsPublic(MediaPolicy):
    """The default policy, but for one loopback address that stands for a public one in these tests."""

    def check_address(self, target: Target, address: IPAddress) -> None:
        if address != ipaddress.ip_address("127.0.0.1"):
            super().check_address(target, address)


def answers(*rounds: list[str]) -> Resolver:
    """A resolver that answers with each round in turn, then keeps to the last."""
    left = list(rounds)

    async def resolve(host: str, port: int) -> list[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve


async def test_a_name_with_a_private_address_is_refused_before_any_connection(
    site: Site, fetcher: FetcherMaker
) -> None:
    site.serve("/a", b"inside")
    for addresses in (["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:127.0.0.1"], ["8.8.8.8", "fe80::1"]):
        one = fetcher(policy=MediaPolicy(), resolve=answers(addresses))
        with pytest.raises(MediaRefusedError, match=r"innocent\.example is not a public host"):
            await get(one, site.url("/a", host="innocent.example"))
    assert site.requests == []


async def test_the_connection_goes_to_the_address_that_was_judged_and_asks_for_the_name(
    site: Site, fetcher: FetcherMaker
) -> None:
    url = site.serve("/a", b"x").replace("127.0.0.1", "rebind.example")
    one = fetcher(policy=LoopbackIsPublic(), resolve=answers(["127.0.0.1"], ["10.0.0.1"]))
    assert await get(one, url) == b"x"
    assert site.requests[0][1]["host"] == f"rebind.example:{site.port}"
    with pytest.raises(MediaRefusedError, match="not a public host"):
        await get(one, url)


async def test_a_redirect_resolves_and_judges_anew(site: Site, fetcher: FetcherMaker) -> None:
    url = site.serve("/a", b"", status=302, location="/b").replace("127.0.0.1", "rebind.example")
    site.serve("/b", b"inside")
    one = fetcher(policy=LoopbackIsPublic(), resolve=answers(["127.0.0.1"], ["127.0.0.2"]))
    with pytest.raises(MediaRefusedError, match="not a public host"):
        await get(one, url)
    assert site.paths() == ["/a"]


async def test_the_next_address_is_tried_when_one_does_not_answer(site: Site, fetcher: FetcherMaker) -> None:
    url = site.serve("/a", b"x").replace("127.0.0.1", "two.example")
    one = fetcher("two.example", resolve=answers(["::1", "127.0.0.1"]))
    assert await get(one, url) == b"x"


async def test_a_resolver_that_hangs_is_the_hosts_time_out(fetcher: FetcherMaker) -> None:
    async def hang(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(MediaTimeoutError, match=r"slow\.example did not deliver"):
        await get(fetcher("slow.example", resolve=hang), "http://slow.example/", timeout_s=0.1)


async def test_a_certificate_that_nobody_signed_is_refused(fetcher: FetcherMaker, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(MediaFetchError, match="no connection to localhost"):
            await get(fetcher("localhost", resolve=answers(["127.0.0.1"])), f"https://localhost:{port}/")


async def test_tls_asks_for_and_verifies_the_name_not_the_address(certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    asked: list[str | None] = []
    context.sni_callback = lambda socket, name, _: asked.append(name)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    trusting = ssl.create_default_context(cafile=str(certificate))
    policy = MediaPolicy(("named.test", "other.test"))
    fetcher = Fetcher(policy, resolve=answers(["127.0.0.1"]), verify=trusting)
    async with server:
        assert await get(fetcher, f"https://named.test:{port}/") == b"x"
        assert asked == ["named.test"]
        with pytest.raises(MediaFetchError, match=r"no connection to other\.test"):
            await get(fetcher, f"https://other.test:{port}/")
    await fetcher.close()


async def test_room_is_asked_for_as_the_body_arrives(site: Site, fetcher: FetcherMaker) -> None:
    sizes: list[int] = []

    async def reserve(num_bytes: int) -> None:
        sizes.append(num_bytes)

    for url in (site.serve("/known", b"x" * 10), site.serve("/unknown", b"x" * 10, content_length="")):
        await fetcher().fetch(url, max_bytes=1000, timeout_s=20, reserve=reserve)
    assert sizes == [10, 10]


PIXEL = base64.b64encode(b"some bytes").decode()


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "DATA:;BASE64,",
        "data:image/svg+xml;charset=utf-8;base64,",
        "data:image;base64,",
        "data:image/png;name=my cat.png;base64,",
        "data: image/png; base64, ",
        "data:image/png;charset=utf-8; base64,\n",
    ],
)
def test_a_data_url_gives_its_bytes(head: str) -> None:
    assert decode_data_url(head + PIXEL, 10) == b"some bytes"


ODD = b"\xfb\xff\xfe~?"


@pytest.mark.parametrize(
    "digits", ["+//+fj8=", "-__-fj8=", "+//+fj8", "-__-fj8", "%2B%2f%2F%2bfj8%3D", "+//+\r\nfj8=\r\n", " +//+ fj8 = "]
)
def test_base64_means_its_bytes_however_it_is_spelt(digits: str) -> None:
    assert decode_data_url(f"data:;base64,{digits}", 100) == ODD


def test_a_list_of_frames_in_one_url_is_taken_apart() -> None:
    urls = split_frames("data:video/jpeg;base64,AAAA,BBBB,CC==")
    assert urls == tuple(f"data:image/jpeg;base64,{frame}" for frame in ("AAAA", "BBBB", "CC=="))
    assert split_frames("data: Video/JPEG ;base64,AAAA") == ("data:image/jpeg;base64,AAAA",)
    for other in ("data:video/mp4;base64,AAAA", "data:image/jpeg;base64,AAAA,BBBB", "https://host/a,b"):
        assert split_frames(other) is None


def test_a_million_frames_are_not_taken_apart() -> None:
    urls = split_frames("data:video/jpeg;base64" + "," * 1_000_000)
    assert urls is not None
    assert len(urls) == 10_000


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"data:image/png,{PIXEL}", "data:TYPE;base64,DATA"),
        (f"data:image/png;base64{PIXEL}", "data:TYPE;base64,DATA"),
        (f"data:;base64;x=y,{PIXEL}", "data:TYPE;base64,DATA"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,AAAAA", "not valid base64"),
        ("data:image/png;base64,A;AA", "not valid base64"),
        ("data:image/png;base64,AA==" + "A" * (1 << 21), "not valid base64"),
        ("data:image/png;base64,AA==AA==", "not valid base64"),
        ("data:image/png;base64,ääää", "not valid base64"),
        ("data:image/png;base64,%41%41", "not valid base64"),
    ],
)
def test_a_data_url_that_is_none_is_explained(url: str, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        decode_data_url(url, 1 << 22)


@pytest.mark.parametrize("line", [10, 76, (1 << 18) - 1])
def test_a_long_data_url_is_decoded_across_its_windows(line: int) -> None:
    data = bytes(range(256)) * (1 << 13) + b"end"
    digits = base64.urlsafe_b64encode(data).decode()
    lines = "\r\n".join(digits[i : i + line] for i in range(0, len(digits), line))
    assert decode_data_url("data:;base64," + lines, len(data)) == data


def test_a_data_url_beyond_the_limit_is_refused_before_it_is_decoded() -> None:
    url = "data:;base64," + base64.b64encode(bytes(1000)).decode()
    assert decode_data_url(url, 1000) == bytes(1000)
    with pytest.raises(MediaTooLargeError, match="limit"):
        decode_data_url(url, 999)
    with pytest.raises(MediaTooLargeError, match="about 1500000 bytes; the limit is 999"):
        decode_data_url("data:;base64," + "!" * 2_000_000, 999)


def test_a_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10)
    assert read_file(path, 10) == b"x" * 10
    with pytest.raises(MediaTooLargeError, match="larger than the limit of 9 bytes"):
        read_file(path, 9)


def test_what_became_a_link_or_a_pipe_meanwhile_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "missing", "."):
        with pytest.raises(MediaError, match="cannot be read"):
            read_file(tmp_path / name, 1000)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
async def test_a_url_that_its_host_refuses_is_the_clients_mistake(
    site: Site, fetcher: FetcherMaker, status: int
) -> None:
    """Unlike a host that fails, which clients ask again."""
    with pytest.raises(MediaUnavailableError, match=f"status {status}"):
        await get(fetcher(), site.serve("/gone", b"", status=status))
