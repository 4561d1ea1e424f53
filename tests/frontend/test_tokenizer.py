from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import dashinfer_vlm.frontend.tokenizer as module
from dashinfer_vlm.errors import CheckpointError, ContextLengthError, InvalidRequestError
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.tokens import FIRST_SPECIAL, IM_END, VOCAB


@pytest.fixture(scope="session")
def reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text())
@example(text="\uf900 e\u0301 \u212b")  # NFC changes all three
def test_plain_text_is_encoded_as_the_reference_does(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    assert tokenizer.encode_text(text) == reference(text, add_special_tokens=False)["input_ids"]


def test_the_text_of_a_special_token_stays_text(tokenizer: Tokenizer) -> None:
    for text, special in tokenizer.added.items():
        ids = tokenizer.encode_text(f"a{text}b")
        assert special not in ids
        assert tokenizer.decode(ids) == f"a{text}b"


@given(ids=st.lists(st.integers(0, 300) | st.integers(FIRST_SPECIAL - 3, VOCAB - 1)))
def test_ids_are_decoded_as_the_reference_does(tokenizer: Tokenizer, reference: Any, ids: list[int]) -> None:
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special=False) == reference.decode(ids, skip_special_tokens=False)


def test_a_folder_without_tokenizer_json_is_read_from_vocabulary_and_merges(folder: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "config.json"):
        shutil.copy(folder / name, tmp_path)
    config = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {str(t["id"]): t for t in config["added_tokens"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.added["<|im_end|>"] == IM_END
    ids = tokenizer.encode_text("describe the picture<|im_end|>")
    assert tokenizer.decode(ids) == "describe the picture<|im_end|>"
    assert max(ids) < FIRST_SPECIAL


def test_an_empty_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor vocab\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_damaged_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "tokenizer.json").read_text())
    config["decoder"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="Metaspace"):
        Tokenizer.from_folder(tmp_path)


def test_a_vocabulary_that_spells_a_special_token_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "tokenizer.json").read_text())
    config["added_tokens"][0] |= {"content": "the", "id": config["model"]["vocab"]["the"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="forge"):
        Tokenizer.from_folder(tmp_path)


@given(
    text=st.text(st.sampled_from("ab1 \n\r\t'ls!.é日😀\u00a0\u0301"), max_size=200) | st.text(), size=st.integers(4, 40)
)
def test_a_text_has_the_same_ids_in_pieces(tokenizer: Tokenizer, text: str, size: int) -> None:
    whole = tokenizer.encode_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_CHARS", size)
        assert tokenizer.encode_text(text) == whole


def test_a_long_text_is_encoded_in_small_pieces_and_no_further_than_the_limit(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python does with a result holds every other thread, so no result may be large."""
    sizes: list[int] = []
    encode = Tokenizer._encode

    def watched(self: Tokenizer, text: str) -> Any:
        sizes.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "_encode", watched)
    text = "the quick brown fox, " * 10_000
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text
    assert max(sizes) <= 1 << 14
    sizes.clear()
    with pytest.raises(ContextLengthError, match=f"maximum context length is 1000 tokens.* of {len(text)} characters"):
        tokenizer.encode_text(text, most=1000)
    assert len(sizes) == 1


def test_a_word_without_end_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="without a break"):
        tokenizer.encode_text("a" * 1_000_000)


def test_no_token_stands_for_more_characters_than_the_bound_says(tokenizer: Tokenizer) -> None:
    """The tests' tokenizer composes (NFC), which makes one character of up to four."""
    longest = max(len(tokenizer.decode((id,), skip_special=False)) for id in range(VOCAB))
    assert longest <= tokenizer.max_chars_per_token <= 4 * longest
    decomposed = "\u03b1\u0313\u0301\u0345" * 50
    assert len(decomposed) <= len(tokenizer.encode_text(decomposed)) * tokenizer.max_chars_per_token
