"""Who may be fetched: every trick here once opened some server to its inside."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.errors import ConfigError, MediaError, MediaRefusedError
from dashinfer_vlm.media.policy import MediaPolicy, Target, is_public

PUBLIC = MediaPolicy()
LISTED = MediaPolicy(("example.com", "10.0.0.5:8080", "::1", "localhost:9000"))


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://example.com", Target("http", "example.com", 80, "/")),
        ("HTTPS://Example.COM./a?b=c#d", Target("https", "example.com", 443, "/a?b=c")),
        ("http://example.com:8080?x", Target("http", "example.com", 8080, "/?x")),
        ("https://8.8.8.8/a", Target("https", "8.8.8.8", 443, "/a")),
        ("https://[2606:4700::1111]:444/", Target("https", "2606:4700::1111", 444, "/")),
        ("https://bücher.example/ä b"[:-2], Target("https", "xn--bcher-kva.example", 443, "/%C3%A4")),
        ("https://a_b.example/%2e%2F?q=%41", Target("https", "a_b.example", 443, "/%2e%2F?q=%41")),
    ],
)
def test_a_public_url_is_taken_apart_in_one_spelling(url: str, target: Target) -> None:
    assert PUBLIC.check_url(url) == target


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.9.9.9", "169.254.169.254", "172.16.0.1",
        "172.31.255.255", "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1", "::127.0.0.1", "fc00::1", "fd12::1",
        "fe80::1", "fec0::1", "ff02::1", "2001:db8::1", "2001::1", "2001:10::1", "2002:7f00:1::", "2002:808:808::",
        "64:ff9b::10.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::808:808", "100::1", "5f00::1", "3fff::1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public_is_refused_in_urls_and_in_answers_of_the_resolver(address: str) -> None:
    parsed = ipaddress.ip_address(address)
    assert not is_public(parsed)
    host = f"[{address}]" if parsed.version == 6 else address
    for url in (f"http://{host}/", f"https://{host}:8000/a"):
        with pytest.raises(MediaRefusedError, match="not a public host"):
            PUBLIC.check_url(url)
    target = PUBLIC.check_url("http://rebind.example/")
    with pytest.raises(MediaRefusedError) as refused:
        PUBLIC.check_address(target, parsed)
    assert address not in str(refused.value), "the inside is not described to the client"


@pytest.mark.parametrize("address", ["1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::8.8.8.8"])
def test_a_public_address_passes(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@given(st.ip_addresses(v=4))
def test_no_special_address_of_the_standard_library_is_public(address: ipaddress.IPv4Address) -> None:
    special = address.is_private or address.is_loopback or address.is_multicast or address.is_reserved
    if special or address.is_link_local or address.is_unspecified:
        assert not is_public(address)


@given(st.ip_addresses(v=6))
def test_no_special_ipv6_address_of_the_standard_library_is_public(address: ipaddress.IPv6Address) -> None:
    if not address.is_global or address.is_multicast or address.ipv4_mapped or address.sixtofour or address.teredo:
        assert not is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "017700000001", "127.1", "127.0.1", "0", "0x",
        "127.0.0.1.", "127.0.0.256", "1.2.3.4.5", "08.8.8.8", "8.8.8.0x8", "\uff11\uff12\uff17.0.0.1",
        "\u2460\u2461\u2466.0.0.1", "127\u30020\u30020\u30021",
    ],
)  # fmt: skip
def test_an_address_in_another_spelling_is_refused(host: str) -> None:
    with pytest.raises(MediaRefusedError, match=r"unusual spelling|not a public host"):
        PUBLIC.check_url(f"http://{host}/")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com\\@10.0.0.1/", "http:\\\\10.0.0.1/", "http://10.0.0.1\\.example.com/", "http:/\\10.0.0.1/",
        " http://example.com/", "http://example.com/\n", "http://exa\tmple.com/", "http://example.com/\r\nHost: x",
        "http://example.com\x00.evil/", "http://example.com /", "http://example.com/a b", "http://example.com\u2028/",
        "http://example.com\u00a0/", "http://127.0.0.1%2f@example.com/", "http://exam%70le.com/",
        "http:///a", "http://", "http:example.com", "//example.com/", "example.com", "", "http://:80/", "http://?a",
        "http://[::1", "http://::1/", "http://[::1]x/", "http://[fe80::1%25eth0]/", "http://[1.2.3.4]/",
        "http://example.com:0/", "http://example.com:65536/", "http://example.com:80:80/", "http://example.com:-1/",
        "http://example.com:8\uff10/", "http://example.com:/",
        "http://a..b/", "http://.a/", "http://a../", "http://-a.example/", "http://a-.example/",
        f"http://{'a' * 64}.de/",
        f"http://{'a.' * 127}com/", "http://exa<mple.com/", "http://exa;mple.com/", "http://*.example.com/",
        "ftp://example.com/", "gopher://example.com/", "jar:http://example.com!/", "javascript:alert(1)",
        "unix:///run/docker.sock", "http+unix://x/",
    ],
)  # fmt: skip
def test_what_is_no_plain_url_is_refused(url: str) -> None:
    with pytest.raises(MediaError):
        PUBLIC.check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://user@example.com/", "http://user:key@example.com/", "http://example.com@10.0.0.1/",
        "http://example.com:80@evil.example/", "http://@example.com/",
    ],
)  # fmt: skip
def test_a_user_name_in_a_url_is_refused(url: str) -> None:
    for policy in (PUBLIC, LISTED):
        with pytest.raises(MediaRefusedError, match="user name"):
            policy.check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/", "https://cdn.example.com:8443/a", "http://EXAMPLE.com./", "http://10.0.0.5:8080/",
        "http://[::1]/", "http://[0:0::1]:99/", "http://localhost:9000/",
    ],
)  # fmt: skip
def test_a_listed_host_and_its_subdomains_are_open(url: str) -> None:
    target = LISTED.check_url(url)
    LISTED.check_address(target, ipaddress.ip_address("10.0.0.9"))


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/", "http://evilexample.com/", "http://example.com.evil.org/", "http://10.0.0.5/",
        "http://10.0.0.5:80/", "http://10.0.0.6:8080/", "http://x.10.0.0.5.evil.org:8080/", "http://localhost/",
        "http://8.8.8.8/", "http://com/", "http://xn--example-6q4c.com/",
    ],
)  # fmt: skip
def test_with_a_list_every_other_host_is_closed(url: str) -> None:
    with pytest.raises(MediaRefusedError, match="allowed-media-domains"):
        LISTED.check_url(url)


def test_a_redirect_is_judged_like_a_url() -> None:
    base = PUBLIC.check_url("https://example.com/a/b?c")
    assert PUBLIC.check_url("../d", base).url == "https://example.com/d"
    assert PUBLIC.check_url("//other.example/x", base).url == "https://other.example/x"
    for location in ("http://169.254.169.254/latest", "//127.0.0.1/", "http://user@example.com/"):
        with pytest.raises(MediaRefusedError):
            PUBLIC.check_url(location, base)
    for location in ("file:///etc/passwd", "data:image/png;base64,AAAA", "/\\evil.example", "ftp://example.com/"):
        with pytest.raises(MediaError):
            PUBLIC.check_url(location, base)


@given(st.text(max_size=60), st.sampled_from(["", "http://", "https://", "http://10.0.0.1", "http://example.com"]))
def test_any_text_is_a_target_or_a_media_error(text: str, start: str) -> None:
    try:
        target = PUBLIC.check_url(start + text)
    except MediaError:
        return
    assert target.url.isascii()
    assert target.path.startswith("/")
    assert PUBLIC.check_url(target.url) == target, "the one spelling stays as it is"


@given(st.from_regex(r"[a-z0-9.\\@:/#?%\[\]-]{0,30}", fullmatch=True))
def test_no_spelling_gets_past_a_list(text: str) -> None:
    try:
        target = LISTED.check_url(f"http://{text}")
    except MediaError:
        return
    assert target.host in ("10.0.0.5", "::1", "localhost", "example.com") or target.host.endswith(".example.com")


@pytest.mark.parametrize(
    "entry", ["", "http://example.com", "a b", "example.com:99999999", "*", "127.1", "a..b", "user@example.com"]
)
def test_an_entry_that_is_no_host_stops_the_start(entry: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-media-domains has"):
        MediaPolicy((entry,))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder that is open, beside things that are not."""
    (tmp_path / "open" / "sub").mkdir(parents=True)
    (tmp_path / "open" / "sub" / "ä b%.png").write_bytes(b"x")
    (tmp_path / "opened").mkdir()
    (tmp_path / "opened" / "secret").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "open" / "link-out").symlink_to(tmp_path / "secret")
    (tmp_path / "open" / "link-folder").symlink_to(tmp_path)
    (tmp_path / "open" / "link-in").symlink_to("sub/ä b%.png")
    (tmp_path / "open" / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "open" / "pipe")
    return tmp_path / "open"


def test_a_file_inside_the_open_folder_is_found(files: Path) -> None:
    policy = MediaPolicy(allowed_local_path=str(files))
    expected = files.resolve() / "sub" / "ä b%.png"
    for url in (
        f"file://{files}/sub/%C3%A4%20b%25.png",
        f"FILE://localhost{files}/link-in",
        f"file://{files}/./link-in",
    ):
        assert policy.local_path(url) == expected


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "%2e%2e/secret",
        "link-out",
        "link-folder/secret",
        "../opened/secret",
        "sub/../../secret",
        "",
        "pipe",
    ],
)
def test_nothing_outside_the_open_folder_is_found(files: Path, name: str) -> None:
    with pytest.raises(MediaRefusedError) as refused:
        MediaPolicy(allowed_local_path=str(files)).local_path(f"file://{files}/{name}")
    assert str(files.parent) not in str(refused.value)


@pytest.mark.parametrize("url", ["file://host/a", "file:///a%00b", "file:///a?b", "file:///a#b", "file://../a"])
def test_a_file_url_with_more_than_a_path_is_refused(files: Path, url: str) -> None:
    with pytest.raises(MediaError, match="a file URL is file:///path"):
        MediaPolicy(allowed_local_path=str(files)).local_path(url)


@pytest.mark.parametrize("name", ["missing.png", "loop", "sub/ä b%.png/x", "n" * 300])
def test_a_file_that_cannot_be_read_is_an_error_without_its_path(files: Path, name: str) -> None:
    with pytest.raises(MediaError, match="cannot be read") as caught:
        MediaPolicy(allowed_local_path=str(files)).local_path(f"file://{files}/{name.replace('%', '%25')}")
    assert str(files) not in str(caught.value)


def test_files_are_closed_by_default() -> None:
    with pytest.raises(MediaRefusedError, match="--allowed-local-media-path"):
        PUBLIC.local_path("file:///etc/hostname")


def test_a_folder_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        MediaPolicy(allowed_local_path=str(tmp_path / "missing"))
