"""The tokenizer of a model folder as its files describe it: what front end and engine both read of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.optional import require

__all__ = ["AddedToken", "TokenizerFile", "read_json"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token outside the BPE vocabulary; `special` ones are left out of answers."""

    text: str
    id: int
    special: bool


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """What `tokenizer.json` holds, and the added tokens that only `tokenizer_config.json` knows."""

    parts: Mapping[str, msgspec.Raw]
    added: tuple[AddedToken, ...]

    @classmethod
    def read(cls, folder: Path) -> TokenizerFile:
        """Read `tokenizer.json`, or what `transformers` makes of the folder without one.

        Raises CheckpointError for what is not byte-level BPE, ConfigError where `transformers` is missing.
        """
        path = folder / "tokenizer.json"
        text = path.read_bytes() if path.is_file() else _convert(folder)
        try:
            parts = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
            _check_byte_level(parts, path)
            return cls(parts, tuple(_added_tokens(parts, folder)))
        except (msgspec.DecodeError, KeyError) as error:
            raise CheckpointError(f"{path} is not a tokenizer that can be read: {error}") from error

    @property
    def ending(self) -> tuple[int, ...]:
        """Ids that its `post_processor` puts behind a text; raises CheckpointError for what puts some elsewhere."""
        processor = msgspec.json.decode(self.parts.get("post_processor", b"null"), type=dict[str, Any] | None)
        try:
            return _ending(processor)
        except (KeyError, IndexError, TypeError):
            raise CheckpointError(f"the tokenizer's post_processor cannot be read: {processor}") from None

    def json(self, added: bytes = b"[]") -> bytes:
        """The text of a `tokenizer.json` with `added` for its `added_tokens`, which adds nothing to a text and cuts
        nothing off."""
        replaced = {"added_tokens": added, "truncation": b"null", "padding": b"null", "post_processor": b"null"}
        return msgspec.json.encode({**self.parts, **{name: msgspec.Raw(value) for name, value in replaced.items()}})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError names the file when it is missing or no object."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a complete model folder?") from None
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} does not hold a JSON object: {error}") from error


def _convert(folder: Path) -> bytes:
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        raise CheckpointError(f"{folder} has neither tokenizer.json nor vocab.json with merges.txt")
    logger.info("%s has no tokenizer.json; it is made from vocab.json and merges.txt", folder)
    library = require("transformers", "transformers", f"{folder}, which has no tokenizer.json,")
    text: str = library.AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.to_str()
    return text.encode()


def _added_tokens(parts: Mapping[str, msgspec.Raw], folder: Path) -> list[AddedToken]:
    """Those of tokenizer.json, then those that only tokenizer_config.json knows."""
    rows = msgspec.json.decode(parts["added_tokens"], type=list[dict[str, Any]])
    found = {row["content"]: AddedToken(row["content"], row["id"], row["special"]) for row in rows}
    path = folder / "tokenizer_config.json"
    extra = read_json(path).get("added_tokens_decoder", {}) if path.is_file() else {}
    for id, row in extra.items():
        found.setdefault(row["content"], AddedToken(row["content"], int(id), bool(row.get("special"))))
    return list(found.values())


def _ending(processor: dict[str, Any] | None) -> tuple[int, ...]:
    if processor is None or processor["type"] == "ByteLevel":
        return ()
    if processor["type"] == "Sequence":
        return tuple(id for part in processor["processors"] for id in _ending(part))
    if processor["type"] != "TemplateProcessing" or "Sequence" not in processor["single"][0]:
        raise CheckpointError(f"the tokenizer's post_processor {processor['type']} does more than to end a text")
    named = [piece["SpecialToken"]["id"] for piece in processor["single"][1:]]
    return tuple(id for name in named for id in processor["special_tokens"][name]["ids"])


def _check_byte_level(parts: Mapping[str, msgspec.Raw], path: Path) -> None:
    decoder = msgspec.json.decode(parts["decoder"], type=dict[str, Any] | None) or {}
    if decoder.get("type") != "ByteLevel":
        raise CheckpointError(f"{path} has decoder {decoder.get('type')}; only byte-level BPE is supported")
