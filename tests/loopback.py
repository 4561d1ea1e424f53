"""Stand-ins on loopback for what the tests must not reach: a host of pictures, and the two model hubs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

__all__ = ["Hub", "Site", "running"]

COMMIT = "0" * 40


class Site:
    """What an HTTP host answers: bodies by path. Each answer is status, headers and body."""

    def __init__(self, bodies: dict[str, tuple[str, bytes]] | None = None) -> None:
        self.bodies = bodies or {}
        """Content type and body by path."""
        self.asked: list[str] = []

    def answer(self, url: str) -> tuple[int, dict[str, str], bytes]:
        kind, body = self.bodies.get(urlsplit(url).path, ("", b""))
        return (200, {"Content-Type": kind}, body) if kind else (404, {}, b"")


class Hub(Site):
    """ModelScope and Hugging Face at one address, as far as their clients ask to download the files of a folder."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__()
        self._name = name
        self._folder = folder

    def answer(self, url: str) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(url)
        name, query = self._name, {key: values[0] for key, values in parse_qs(parts.query).items()}
        if parts.path == f"/api/v1/models/{name}/repo/files":
            return _json(
                {"Code": 200, "Success": True, "Data": {"Files": [self._modelscope_entry(f) for f in self._files]}}
            )
        if parts.path == f"/api/v1/models/{name}/repo":
            return self._file(query["FilePath"])
        if parts.path == f"/api/models/{name}/revision/main":
            return _json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in self._files]})
        if parts.path == f"/api/models/{name}/tree/{COMMIT}":
            return _json([self._huggingface_entry(file) for file in self._files])
        if parts.path.startswith(f"/{name}/resolve/{COMMIT}/"):
            return self._file(parts.path.rpartition("/")[2])
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    @property
    def _files(self) -> list[str]:
        return sorted(path.name for path in self._folder.iterdir() if path.is_file())

    def _modelscope_entry(self, file: str) -> dict[str, object]:
        body = (self._folder / file).read_bytes()
        return {
            "Path": file,
            "Name": file,
            "Type": "blob",
            "Size": len(body),
            "Sha256": hashlib.sha256(body).hexdigest(),
        }

    def _huggingface_entry(self, file: str) -> dict[str, object]:
        body = (self._folder / file).read_bytes()
        return {"path": file, "type": "file", "size": len(body), "oid": hashlib.sha1(body).hexdigest()}

    def _file(self, file: str) -> tuple[int, dict[str, str], bytes]:
        path = self._folder / file
        if not path.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        body = path.read_bytes()
        return 200, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextmanager
def running(site: Site) -> Iterator[str]:
    """Serve `site` in a thread; yields its address, such as `http://127.0.0.1:40123`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.asked.append(self.path)
            status, headers, body = site.answer(self.path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            """Stay silent; `site.asked` remembers."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
