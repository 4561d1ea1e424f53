"""Special tokens in text: which of them a caller may write, and how the others are kept from being forged."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from typing import Any

from dashinfer_vlm.errors import CheckpointError

_WINDOW_CHARS = 1 << 14
"""Characters that a pattern is looked for in at once: Python's lock is held until such a search is over."""

_MARKS = ("object_ref", "ref", "box", "quad", "point")
"""What a model's grounding names and places: the words of its own answers, which open nothing."""
_SPELLINGS = (("<|{}_start|>", "<|{}_end|>"), ("<{}>", "</{}>"))


def text_marks(tokens: Collection[str]) -> frozenset[str]:
    """Those of a tokenizer's added tokens that only mark a piece of text, and that callers may therefore write.

    A name counts only if the tokenizer lists both of its ends. Whatever else it lists is taken for a token that opens
    a turn, a picture, a video, a tool's call or the like.
    """
    pairs = (tuple(end.format(name) for end in spelling) for name in _MARKS for spelling in _SPELLINGS)
    return frozenset(end for pair in pairs if all(end in tokens for end in pair) for end in pair)


class SpecialTokenGuard:
    """Finds special tokens in text, and breaks those that a user wrote."""

    def __init__(self, tokens: Collection[str], allowed: Collection[str] = ()) -> None:
        """`allowed` are those of `tokens` that users may write. Raises CheckpointError."""
        short = [token for token in tokens if len(token) < 2]
        if short:
            raise CheckpointError(f"the added tokens {short} have one character and cannot be told from text")
        broken = [token for token in tokens if token not in allowed]
        self._any = re.compile(f"({_alternatives(tokens)})") if tokens else None
        self._starts = re.compile(f"(?=(?:{_alternatives(broken)}))(.)", re.DOTALL) if broken else None
        self._prefixes = {token[:n] for token in broken for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def break_tokens(self, value: Any, sentinel: str) -> Any:
        """A copy of the JSON value whose strings hold no forbidden token, nor one that begins at their end."""
        if isinstance(value, str):
            return self._break_text(value, sentinel)
        if isinstance(value, list):
            return [self.break_tokens(item, sentinel) for item in value]
        if isinstance(value, dict):
            return {self.break_tokens(k, sentinel): self.break_tokens(v, sentinel) for k, v in value.items()}
        return value

    def split(self, text: str) -> list[tuple[str, str]]:
        """Pairs of plain text and the special token after it; the last one's is empty."""
        pieces: list[tuple[str, str]] = []
        begin = 0
        for match in self._matches(self._any, text) if self._any else ():
            pieces.append((text[begin : match.start()], match[0]))
            begin = match.end()
        return [*pieces, (text[begin:], "")]

    def _break_text(self, text: str, sentinel: str) -> str:
        if self._starts is None:
            return text
        cuts = [0, *(match.end() for match in self._matches(self._starts, text)), len(text)]
        text = sentinel.join(text[a:b] for a, b in pairwise(cuts))
        # a template may trim the string before it joins it to the next one, so the blanks at its end do not count
        end = len(text.rstrip())
        lengths = range(1, min(self._longest, end + 1))
        if any(text[end - n : end] in self._prefixes for n in lengths):
            return text[:end] + sentinel + text[end:]
        return text

    def _matches(self, pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
        """Like `finditer`, in windows that other threads run between."""
        at = 0
        while at < len(text):
            end = at + _WINDOW_CHARS
            for match in pattern.finditer(text, at, end + self._longest):
                if match.start() >= end:
                    break
                yield match
                at = match.end()
            at = max(at, end)


def _alternatives(tokens: Iterable[str]) -> str:
    """A pattern for any of them; of two that begin alike the longer one is found."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
