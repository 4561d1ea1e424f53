"""A conversation with a server that speaks OpenAI's API, over one connection, synchronously."""

from __future__ import annotations

import base64
import json
import mimetypes
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from dashinfer_vlm.errors import ConfigError, DashInferError

__all__ = ["Conversation", "Figures"]

_TIMEOUT = httpx.Timeout(10.0, read=None)
"""A first token may take as long as it takes."""

Part = dict[str, Any]


@dataclass(slots=True)
class Figures:
    """What one answer cost; what the server did not tell is None."""

    started: float
    first: float | None = None
    """Times of the clock, in seconds."""
    last: float = 0.0
    usage: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        told = [] if self.first is None else [f"{self.first - self.started:.2f} s to the first token"]
        if self.usage and self.first is not None:
            written, read = self.usage["completion_tokens"], self.usage["prompt_tokens"]
            if written > 1 and self.last > self.first:
                told.append(f"{(written - 1) / (self.last - self.first):.1f} tokens/s")
            cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            told.append(f"{written} tokens, prompt {read}, {cached} cached")
        return ", ".join(told)


class Conversation:
    """Turns and what is attached to the next one. A turn that failed is forgotten, and its attachments are kept."""

    def __init__(
        self, url: str, model: str, api_key: str | None, system: str | None, sampling: Mapping[str, Any]
    ) -> None:
        """`url` is that of the server, with or without `/v1`; of `sampling`, values that are None are not sent."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        base = url.rstrip("/").removesuffix("/v1")
        try:
            self._client = httpx.Client(base_url=f"{base}/v1", headers=headers, timeout=_TIMEOUT)
        except httpx.InvalidURL as error:
            raise ConfigError(f"--url {url}: {error}") from error
        self._model = model
        self._sampling = {name: value for name, value in sampling.items() if value is not None}
        self._turns: list[Part] = []
        self.system = system
        self.attached: list[Part] = []
        self.figures: Figures | None = None
        """Of the last answer."""

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def attach(self, kind: str, source: str) -> None:
        """Put an `image` or `video`, by path or URL, into the next message. Raises DashInferError for no such file."""
        url = source if source.startswith(("http://", "https://", "data:")) else _data_url(source)
        self.attached.append({"type": f"{kind}_url", f"{kind}_url": {"url": url}})

    def clear(self) -> None:
        self._turns.clear()
        self.attached.clear()

    def ask(self, text: str) -> Iterator[str]:
        """Send a turn and yield its answer in pieces; one that is not read to its end is ended, and what there is of
        it kept. Raises DashInferError."""
        attached, self.attached = self.attached, []
        self._turns.append(
            {"role": "user", "content": [*attached, {"type": "text", "text": text}] if attached else text}
        )
        try:
            yield from self._answer()
        except DashInferError:
            self._turns.pop()
            self.attached = attached
            raise

    def retry(self) -> Iterator[str]:
        """Ask the last question again and yield another answer. Raises DashInferError."""
        if not self._turns:
            raise DashInferError("there is nothing to ask again")
        last = self._turns.pop()
        try:
            yield from self._answer()
        except DashInferError:
            self._turns.append(last)
            raise

    def _answer(self) -> Iterator[str]:
        pieces: list[str] = []
        try:
            for piece in self._pieces():
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self._turns.append({"role": "assistant", "content": "".join(pieces)})

    def _pieces(self) -> Iterator[str]:
        figures = self.figures = Figures(time.perf_counter())
        for event in self._events():
            figures.usage = event.get("usage") or figures.usage
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    figures.last = time.perf_counter()
                    figures.first = figures.first or figures.last
                    yield piece

    def _events(self) -> Iterator[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": self._model, "messages": system + self._turns, **options, **self._sampling}
        try:
            with self._client.stream("POST", "chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise DashInferError(_message(response))
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        event: dict[str, Any] = json.loads(line[6:])
                        if "error" in event:
                            raise DashInferError(event["error"]["message"])
                        yield event
        except httpx.HTTPError as error:
            raise DashInferError(f"{self._client.base_url}: {error or type(error).__name__}") from error


def _data_url(source: str) -> str:
    path = Path(source).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DashInferError(f"{source} cannot be read: {error.strerror}") from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _message(response: httpx.Response) -> str:
    """What the server says is wrong, where it says it as OpenAI does."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.url} answered with status {response.status_code}"
