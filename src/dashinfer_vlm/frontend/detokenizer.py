"""Ids to text as they come, in pieces that never break a character and never run past a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Collection

from dashinfer_vlm.frontend.tokenizer import Tokenizer


class Detokenizer:
    """Text of one output. `push` tokens, then `flush` once; after `stopped` there is no more text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        min_tokens: int = 0,
        shown: Collection[str] = (),
    ) -> None:
        """`min_tokens`: stop strings are not looked for in the text of this many first tokens. `shown`: special tokens
        that are written whatever `skip_special` says."""
        self._tokenizer = tokenizer
        self._unfinished = b""
        """Of a character."""
        self._stop = StopFinder(stop, include=include_stop) if stop else None
        hidden = tokenizer.special_ids if skip_special else frozenset()
        self._hidden = hidden.difference(tokenizer.added[text] for text in shown if text in tokenizer.added)
        self._num_unchecked = min_tokens
        self.stopped: str | None = None
        """The stop string that ended the text."""

    def push(self, token: int) -> str:
        """The text that has become certain; bytes of an unfinished character are kept until the next token."""
        text = "" if token in self._hidden else self._characters(self._tokenizer.token_bytes(token))
        if self._num_unchecked > 0:
            self._num_unchecked -= 1
            return text
        return text if self._stop is None else self._up_to_stop(self._stop, text)

    def flush(self) -> str:
        """What was kept back, an unfinished character as U+FFFD."""
        text = self._characters(b"", is_last=True)
        return text if self._stop is None else self._up_to_stop(self._stop, text) + self._stop.flush()

    def _characters(self, more: bytes, *, is_last: bool = False) -> str:
        data = self._unfinished + more
        text, num_used = codecs.utf_8_decode(data, "replace", is_last)
        self._unfinished = data[num_used:]
        return text

    def _up_to_stop(self, finder: StopFinder, text: str) -> str:
        text = finder.push(text)
        self.stopped = finder.found
        return text


class StopFinder:
    """Lets text through up to the stop string that is complete first, whatever pieces the text comes in."""

    def __init__(self, stop: tuple[str, ...], *, include: bool = False) -> None:
        self._stop = stop
        self._include = include
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        if self.found is not None:
            return ""
        text = self._held + text
        hits = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if hits:
            end, start, self.found = min(hits)
            self._held = ""
            return text[: end if self._include else start]
        return self._hold_back(text)

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _hold_back(self, text: str) -> str:
        """Keep the longest end of `text` that a stop string may begin with."""
        for n in range(min(self._longest - 1, len(text)), 0, -1):
            if any(s.startswith(text[-n:]) for s in self._stop):
                self._held = text[-n:]
                return text[:-n]
        self._held = ""
        return text
