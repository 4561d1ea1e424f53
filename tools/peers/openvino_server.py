#!/usr/bin/env python3
"""A thin OpenAI-compatible face of OpenVINO GenAI's continuous batching: what `bench serve` asks for, and no more.

    openvino_server.py FOLDER --port 8000 --kv-cache-gib 4      FOLDER is what `optimum-cli export openvino` wrote

One thread owns the pipeline: it hands in the requests that have come, which encodes their pictures, makes a step of
all that run, and passes on the new tokens. Only streams of chat completions are answered. The prompt's tokens in
`usage` are those of its words.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import queue
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from PIL import Image

MAX_BATCHED_TOKENS = 2048


@dataclass(slots=True)
class Asked:
    """A request, and what comes of it: lists of ids, then None, or what went wrong."""

    prompt: str
    pictures: list[openvino.Tensor]
    max_tokens: int
    ignore_eos: bool
    news: queue.SimpleQueue[list[int] | Exception | None] = field(default_factory=queue.SimpleQueue)


class Engine:
    """Greedy decoding of everything that is asked, in a thread of its own."""

    def __init__(self, folder: str, kv_cache_gib: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = kv_cache_gib
        scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        self.pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU")
        self.tokenizer = self.pipeline.get_tokenizer()
        self.asked: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        ids = itertools.count()
        running: list[tuple[Asked, Any]] = []
        while True:
            while not running or not self.asked.empty():
                asked = self.asked.get()
                try:
                    running.append((asked, self._add(next(ids), asked)))
                except Exception as error:  # noqa: BLE001 - its client hears it
                    asked.news.put(error)
            self.pipeline.step()
            running = [(asked, handle) for asked, handle in running if _pass_on(asked, handle)]

    def _add(self, number: int, asked: Asked) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = asked.max_tokens, asked.ignore_eos
        config.do_sample, config.apply_chat_template = False, False
        return self.pipeline.add_request(number, asked.prompt, asked.pictures, config)


def _pass_on(asked: Asked, handle: Any) -> bool:
    """Whether there is more to come."""
    is_over = handle.get_status() != genai.GenerationStatus.RUNNING
    while handle.can_read():
        for output in handle.read().values():
            asked.news.put(list(output.generated_ids))
    if is_over:
        asked.news.put(None)
    return not is_over


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: an answer ends with its connection."""

    disable_nagle_algorithm = True
    engine: Engine

    def do_GET(self) -> None:
        self._start(200, "application/json")
        self.wfile.write(json.dumps({"data": [{"id": "model"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked, num_prompt = self._read(body)
        self.engine.asked.put(asked)
        self._start(200, "text/event-stream")
        ids: list[int] = []
        shown = ""
        while (news := asked.news.get()) is not None:
            if isinstance(news, Exception):
                self._send({"error": {"message": str(news)}})
                return
            ids += news
            text = self.engine.tokenizer.decode(ids)
            self._send({"choices": [{"delta": {"content": text.removeprefix(shown)}, "finish_reason": None}]})
            shown = text
        self._send({"choices": [{"delta": {}, "finish_reason": "length"}]})
        self._send({"choices": [], "usage": {"prompt_tokens": num_prompt, "completion_tokens": len(ids)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _read(self, body: dict[str, Any]) -> tuple[Asked, int]:
        """The request, and how many tokens its words are."""
        pictures: list[openvino.Tensor] = []
        history = [{"role": m["role"], "content": _text(m["content"], pictures)} for m in body["messages"]]
        prompt = self.engine.tokenizer.apply_chat_template(history, add_generation_prompt=True)
        num_prompt = self.engine.tokenizer.encode(prompt).input_ids.shape[1]
        return Asked(prompt, pictures, body["max_tokens"], body.get("ignore_eos", False)), num_prompt

    def _start(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def _send(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the processor belongs to the model."""


def _text(content: str | list[dict[str, Any]], pictures: list[openvino.Tensor]) -> str:
    """The words, with OpenVINO's tag in place of each picture, which joins `pictures`."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part["type"] == "text":
            parts.append(part["text"])
        else:
            parts.append(f"<ov_genai_image_{len(pictures)}>")
            pictures.append(_picture(part["image_url"]["url"]))
    return "".join(parts)


def _picture(url: str) -> openvino.Tensor:
    data = base64.b64decode(url.partition(",")[2])
    return openvino.Tensor(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[None])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--kv-cache-gib", type=float, default=4.0, help="rounded up to whole ones, as it takes them")
    args = p.parse_args()
    Handler.engine = Engine(args.folder, -int(-args.kv_cache_gib // 1))
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
