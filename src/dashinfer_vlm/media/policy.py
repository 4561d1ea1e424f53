"""Which URLs may be fetched, and which addresses may be connected to: the one place that decides it.

Without an allow-list any public host may be fetched and nothing else; with `--allowed-media-domains` exactly those
hosts and their subdomains, private ones too. A host is judged twice: by name before it is resolved, and by every
address it resolves to; the connection then goes to an address that was judged (`fetch.py`), so that a name that
resolves to something else a moment later gains nothing.
"""

from __future__ import annotations

import ipaddress
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urljoin

import idna

from dashinfer_vlm.errors import ConfigError, MediaError, MediaRefusedError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

DEFAULT_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@%]+)(?::([0-9]{1,5}))?")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f\\]|\s")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")

# IANA's registries of special addresses; written out, since `is_global` differs between versions of Python.
_SPECIAL_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that passed: its parts in the one spelling that everything behind this module uses."""

    scheme: str
    host: str
    """Lower case ASCII without a trailing dot; an IPv6 address without brackets."""
    port: int
    path: str
    """Path and query, percent-encoded; starts with a slash."""

    @property
    def authority(self) -> str:
        """Host and port as the Host header spells them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


class MediaPolicy:
    """Decides by `allowed_domains` ("host" or "host:port", with its subdomains) and `allowed_local_path`."""

    def __init__(self, allowed_domains: Sequence[str] = (), allowed_local_path: str | None = None) -> None:
        """Raises ConfigError for an entry that is not a host and for a folder that does not exist."""
        self._allowed = tuple(_allowed_entry(entry) for entry in allowed_domains)
        self._folder: Path | None = None
        if allowed_local_path is not None:
            self._folder = Path(allowed_local_path).resolve()
            if not self._folder.is_dir():
                raise ConfigError(f"--allowed-local-media-path {allowed_local_path} is not a folder")

    def check_url(self, url: str, base: Target | None = None) -> Target:
        """Parse and judge an http or https URL; `base` is where a redirect to `url` came from.

        Raises MediaError for what is no URL and MediaRefusedError for what must not be fetched. No name is resolved.
        """
        if _FORBIDDEN.search(url):
            raise MediaError("the URL holds a space, a control character or a backslash; percent-encode it")
        target = _parse(urljoin(base.url, url) if base is not None else url)
        if self._allowed and not self._is_allowed(target):
            raise MediaRefusedError(f"media must not be fetched from {target.host}; see --allowed-media-domains")
        address = _literal(target.host)
        if address is not None:
            self.check_address(target, address)
        return target

    def check_address(self, target: Target, address: IPAddress) -> None:
        """Judge an address that `target` resolves to; MediaRefusedError, which does not repeat the address."""
        if not self._allowed and not is_public(address):
            raise MediaRefusedError(f"{target.host} is not a public host; see --allowed-media-domains")

    def local_path(self, url: str) -> Path:
        """The file of a file:// URL, symbolic links followed, inside the allowed folder. The caller opens it."""
        if self._folder is None:
            raise MediaRefusedError("file URLs are refused; see --allowed-local-media-path")
        name = url[len("file://") :].removeprefix("localhost")
        if not name.startswith("/") or re.search(r"[?#\\\x00]", name) or "\x00" in unquote(name):
            raise MediaError("a file URL is file:///path, with neither host nor query")
        try:
            path = Path(unquote(name)).resolve()
            if not path.is_relative_to(self._folder):
                raise MediaRefusedError("the file lies outside the folder of --allowed-local-media-path")
            regular = stat.S_ISREG(path.stat().st_mode)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
            raise MediaError("the file cannot be read") from error
        if not regular:
            raise MediaRefusedError("the file URL does not name a regular file")
        return path

    def _is_allowed(self, target: Target) -> bool:
        return any(
            (target.host == host or (target.host.endswith(f".{host}") and _literal(host) is None))
            and port in (None, target.port)
            for host, port in self._allowed
        )


def is_public(address: IPAddress) -> bool:
    """Whether `address` belongs to the public internet; an IPv4 address inside NAT64 counts as itself.

    Other embeddings (mapped, compatible, 6to4, Teredo) are never public: no public host is reached that way.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _SPECIAL_V4)
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _GLOBAL_V6 and not any(address in network for network in _SPECIAL_V6)


def _parse(url: str) -> Target:
    match = _URL.fullmatch(url)
    if match is None:
        scheme = url.partition(":")[0][:20]
        raise MediaError(f"the URL must start with http://, https://, data: or file://, not with {scheme!r}")
    scheme, authority, path = match[1].lower(), match[2], match[3]
    if "@" in authority:
        raise MediaRefusedError("the URL holds a user name; remove it")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise MediaError("the URL has no valid host")
    port = int(parts[2]) if parts[2] else DEFAULT_PORTS[scheme]
    if not 1 <= port <= 65535:
        raise MediaError(f"the URL's port is {port}; it must be from 1 to 65535")
    path = quote(path if path.startswith("/") else f"/{path}", safe="/?&=+$,:;@!~*'()[]%-._")
    return Target(scheme, _host(parts[1]), port, path)


def _host(host: str) -> str:
    """One spelling for a host; numbers that only some resolvers take for an address are refused."""
    if host.startswith("["):
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError as error:
            raise MediaError("the URL has no valid IPv6 address between its brackets") from error
    try:
        name = host if host.isascii() else idna.encode(host, uts46=True).decode("ascii")
    except idna.IDNAError as error:
        raise MediaError("the URL's host is not a valid international name") from error
    name = name.lower().removesuffix(".")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError as error:
            raise MediaRefusedError(
                "the URL's host is an address in an unusual spelling; write it as 1.2.3.4"
            ) from error
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise MediaError("the URL has no valid host")
    return name


def _literal(host: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _allowed_entry(entry: str) -> tuple[str, int | None]:
    try:
        bare = ":" in entry and _literal(entry) is not None  # an IPv6 address without brackets
        parts = _AUTHORITY.fullmatch(f"[{entry}]" if bare else entry)
        if parts is None:
            raise MediaError("it is not a host")
        return _host(parts[1]), int(parts[2]) if parts[2] else None
    except MediaError as error:
        raise ConfigError(f"--allowed-media-domains has {entry!r}: {error}; write host or host:port") from error
