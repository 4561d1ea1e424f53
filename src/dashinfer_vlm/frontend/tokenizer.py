"""Byte-level BPE in which text can never become a special token.

The tokenizer that encodes holds no added tokens at all, so that the text "<|im_end|>" is encoded as ten ordinary
characters. Special ids enter a prompt only where the chat template writes them (see template.py), and where a text has
those that only mark it (see guard.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers

from dashinfer_vlm.errors import CheckpointError, InvalidRequestError
from dashinfer_vlm.frontend.context import too_long
from dashinfer_vlm.frontend.guard import SpecialTokenGuard, text_marks
from dashinfer_vlm.tokenizer_file import AddedToken, TokenizerFile

_PIECE_CHARS = 1 << 14
"""Characters that are encoded at once: what Python does with the result, alone in its lock, takes about a millisecond.
"""
_MAX_WORD_CHARS = 1 << 17
"""Characters without any place to cut at; all of them must be encoded at once."""
_UNSURE_WORDS = 3
"""Words at the end of a piece that may look different with the text that follows: a run of blanks is two, of which the
characters behind it decide."""
_COMPOSED_CHARS = 4
"""Characters that Unicode's composition (NFC) makes one of, at most: a letter and three marks."""


class Tokenizer:
    """Text to ids without special tokens, ids to bytes with them."""

    def __init__(self, plain: tokenizers.Tokenizer, added: Iterable[AddedToken]) -> None:
        self._plain = plain
        self.added = {token.text: token.id for token in added}
        """Every token that plain text must not yield, by its text."""
        self.marks = text_marks(self.added)
        """Those that callers may write."""
        self._marks = SpecialTokenGuard(self.marks)
        self._added_texts = {token.id: token.text for token in added}
        self.special_ids = frozenset(token.id for token in added if token.special)
        """Ids that are left out of answers."""
        self._bytes: dict[int, bytes] = {}
        longest = max(*map(_num_chars, plain.get_vocab()), *map(len, self.added), 1)
        self.max_chars_per_token = longest if plain.normalizer is None else longest * _COMPOSED_CHARS
        """No token stands for more characters of a text, so that longer texts cannot fit a context."""
        self._check_plain()

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json`, or what `transformers` makes of the folder without one; raises CheckpointError."""
        file = TokenizerFile.read(folder)
        try:
            return cls(tokenizers.Tokenizer.from_buffer(file.json()), file.added)
        except ValueError as error:
            raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error

    def encode_text(self, text: str, *, most: int | None = None) -> list[int]:
        """Ids of `text` as plain text: whatever it says, no added token comes out.

        Long texts are encoded piece by piece, without Python's lock, with the ids that the whole would have. Raises
        ContextLengthError as soon as there are more than `most` ids, and InvalidRequestError for a single word that is
        too long to be encoded at once, and for half of a surrogate pair.
        """
        _check_characters(text)
        if len(text) <= _PIECE_CHARS:
            return self._encode(text).ids
        ids: list[int] = []
        start, size = 0, _PIECE_CHARS
        while start + size < len(text):
            if size > _MAX_WORD_CHARS:
                raise InvalidRequestError(
                    f"the text has {size} characters without a break, the limit is {_MAX_WORD_CHARS}; "
                    "cut it into pieces"
                )
            piece = self._encode(text[start : start + size])
            num_tokens, num_chars = _sure(piece)
            if num_tokens == 0:
                size *= 2
                continue
            ids += piece.ids[:num_tokens]
            start, size = start + num_chars, _PIECE_CHARS
            if most is not None and len(ids) > most:
                reason = f"the first {start} of {len(text)} characters have {len(ids)} already; shorten the text."
                raise too_long(most, reason)
        return ids + self._encode(text[start:]).ids

    def encode_marked(self, text: str, *, most: int | None = None) -> list[int]:
        """`encode_text`, but for the tokens that only mark text: they become what they say."""
        ids: list[int] = []
        for plain, mark in self._marks.split(text):
            ids += self.encode_text(plain, most=most) if plain else []
            ids += [self.added[mark]] if mark else []
        return ids

    def token_bytes(self, token: int) -> bytes:
        """What `token` writes; nothing for ids that only pad the vocabulary."""
        if token not in self._bytes:
            self._bytes[token] = self._look_up(token)
        return self._bytes[token]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        kept = (i for i in ids if not (skip_special and i in self.special_ids))
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")

    def _encode(self, text: str) -> tokenizers.Encoding:
        """Of the tokenizer's two ways, the one that lets go of Python's lock while it works."""
        return self._plain.encode_batch([text], add_special_tokens=False)[0]

    def _look_up(self, token: int) -> bytes:
        text = self._added_texts.get(token)
        if text is not None:
            return text.encode()
        piece = self._plain.id_to_token(token)
        if piece is None:
            return b""
        if all(c in _BYTE_OF for c in piece):
            return bytes(_BYTE_OF[c] for c in piece)
        return piece.encode()

    def _check_plain(self) -> None:
        for text in self.added:
            leaked = self._added_texts.keys() & self.encode_text(text)
            if leaked:
                raise CheckpointError(
                    f"the tokenizer's own vocabulary spells the special token {text!r} (ids {sorted(leaked)}), so text "
                    "could forge it; save the tokenizer with its special tokens as added tokens only"
                )


def _check_characters(text: str) -> None:
    """Raise InvalidRequestError for half of a surrogate pair, which Python's texts may hold and no other's."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise InvalidRequestError(f"the text holds U+{half:04X} at {error.start}, half of a pair, by itself") from error


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 stands for itself, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _num_chars(piece: str) -> int:
    """Characters that begin in a token, given in GPT-2's alphabet: bytes but for those that continue one."""
    return sum(_BYTE_OF.get(c, 0) & 0xC0 != 0x80 for c in piece)


def _sure(piece: tokenizers.Encoding) -> tuple[int, int]:
    """Leading tokens, and their characters, that stay as they are whatever follows: words are cut from left to
    right."""
    last = piece.token_to_word(len(piece) - 1)
    unsure = None if last is None or last < _UNSURE_WORDS else piece.word_to_tokens(last - _UNSURE_WORDS + 1)
    begin = None if unsure is None else piece.token_to_chars(unsure[0])
    return (0, 0) if unsure is None or begin is None else (unsure[0], begin[0])
