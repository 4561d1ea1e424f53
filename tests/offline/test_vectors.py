"""Vectors of checkpoints as they are published for them, from texts and pictures to the numbers of `transformers`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dashinfer_vlm import VLM
from dashinfer_vlm.errors import CheckpointError, InvalidRequestError, UnsupportedError
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.frontend.vectors import VectorForm
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.published import read_why_no_vectors
from dashinfer_vlm.tokenizer_file import TokenizerFile
from tests.conftest import CheckpointMaker
from tests.engine.test_parity import Family, Prompt
from tests.tokens import FIRST_SPECIAL

TEXTS = ["A heron stands in the reeds.", "Ein Reiher", "Wo?" * 40]
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "max_length": 1024, "kv_cache_gib": 0.1, "threads": 1, "progress": False
}  # fmt: skip
ENDOFTEXT = FIRST_SPECIAL
INSTRUCTION = "Represent the user's input."


def publish(folder: Path, **config: Any) -> Path:
    """Sentence-transformers' files beside those of a model, and `config` over its own."""
    modules = [("sentence_transformers.models.Transformer", ""), ("sentence_transformers.models.Pooling", "1_Pooling")]
    modules.append(("sentence_transformers.models.Normalize", "2_Normalize"))
    rows = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 128, "pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def end_texts(folder: Path) -> None:
    """With `<|endoftext|>`, as the tokenizer of Qwen3-Embedding does."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    name, first = "<|endoftext|>", {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [first, {"SpecialToken": {"id": name, "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [ENDOFTEXT], "tokens": [name]}},
    }
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [byte_level(), template]}
    path.write_text(json.dumps(tokenizer))


def byte_level() -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


@pytest.fixture(scope="module")
def qwen3(checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Qwen3-Embedding-8B: names without a prefix, no head, a vocabulary of an odd size."""
    folder = tmp_path_factory.mktemp("vectors") / "qwen3"
    shutil.copytree(checkpoint("qwen3"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"][:4077].clone()
    save_file(tensors, folder / "model.safetensors")
    end_texts(folder)
    return publish(folder, tie_word_embeddings=False, vocab_size=4077)


@pytest.fixture(scope="module")
def vision(checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Qwen3-VL without a head, as Qwen3-VL-Embedding-8B, or Qwen2-VL with one, as gme-Qwen2-VL."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp("vectors") / family
        shutil.copytree(checkpoint(family), folder)
        return publish(folder, **({"tie_word_embeddings": False} if family == "qwen3_vl" else {}))

    return make


@pytest.fixture(scope="module")
def text_model(qwen3: Path) -> Iterator[VLM]:
    with VLM(qwen3, **OPTIONS) as vlm:
        yield vlm


def unit(states: torch.Tensor) -> np.ndarray:
    vector: np.ndarray = torch.nn.functional.normalize(states[0, -1], dim=0).numpy()
    return vector


def test_texts_give_the_vectors_of_transformers(qwen3: Path, text_model: VLM) -> None:
    from transformers import AutoModel, AutoTokenizer

    reference, tokenizer = AutoModel.from_pretrained(qwen3, dtype=torch.float32), AutoTokenizer.from_pretrained(qwen3)
    found = text_model.embed(TEXTS)
    assert found.shape == (3, 128)
    assert found.dtype == np.dtype(np.float32)
    for text, vector in zip(TEXTS, found, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        assert inputs["input_ids"][0, -1] == ENDOFTEXT
        with torch.inference_mode():
            expected = unit(reference(**inputs).last_hidden_state)
        np.testing.assert_allclose(vector, expected, atol=1e-4, rtol=0)
        again = text_model.embed([inputs["input_ids"][0].tolist()])[
            0
        ]  # behind a prefix, other rows are summed together
        np.testing.assert_allclose(again, vector, atol=1e-6, rtol=0)


def test_fewer_dimensions_are_the_first_ones_made_longer(text_model: VLM) -> None:
    whole, short = text_model.embed(TEXTS), text_model.embed(TEXTS, dimensions=32)
    expected = whole[:, :32] / np.linalg.norm(whole[:, :32], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)
    assert text_model.embed([]).shape == (0, 128)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl"])
def test_pictures_and_texts_give_the_vectors_of_transformers(vision: Callable[[str], Path], family: str) -> None:
    """By the publishers' own scripts: Qwen3-VL-Embedding's has a system turn of its own, gme-Qwen2-VL's, whose system
    turn is the template's, ends with a token."""
    from transformers import AutoModel, AutoTokenizer

    folder, picture = vision(family), np.random.default_rng(0).integers(0, 256, (112, 168, 3), np.uint8)
    with VLM(folder, **OPTIONS) as vlm:
        found = vlm.embed([TEXTS[0], [{"content": [picture, TEXTS[0]]}], [{"content": [picture]}]])
        if family == "qwen3_vl":
            with pytest.raises(UnsupportedError, match="no head to write with"):
                vlm.chat("Hello")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    reference, tokenizer = Family(folder, model.eval(), model), AutoTokenizer.from_pretrained(folder)
    system, end = ([], "<|endoftext|>") if family == "qwen2_vl" else ([said("system", INSTRUCTION)], "")
    says, shows = {"type": "text", "text": TEXTS[0]}, {"type": "image"}
    for content, vector in zip(([says], [shows, says], [shows]), found, strict=True):
        turns = [*system, {"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + end
        num_tokens = reference.item(picture, 0).num_tokens
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * num_tokens))["input_ids"]
        inputs = reference.inputs(Prompt(ids, (picture,) if shows in content else ()))
        with torch.inference_mode():
            expected = unit(model(**inputs).last_hidden_state)
        np.testing.assert_allclose(vector, expected, atol=1e-4, rtol=0)


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def test_a_model_without_a_head_writes_nothing(text_model: VLM) -> None:
    with pytest.raises(UnsupportedError, match="no head to write with"):
        text_model.chat("Hello")
    assert text_model.stats().num_running == 0


def test_what_is_wrong_is_raised(text_model: VLM, vlm: VLM) -> None:
    with pytest.raises(UnsupportedError, match=r"does not embed: it has no modules\.json"):
        vlm.embed(["Hello"])
    with pytest.raises(InvalidRequestError, match="pass a list"):
        text_model.embed("Hello")
    with pytest.raises(InvalidRequestError, match="dimensions is 129"):
        text_model.embed(["Hello"], dimensions=129)
    with pytest.raises(InvalidRequestError, match="the input is empty"):
        text_model.embed(["Hello", ""])


def test_a_head_is_missed_where_nothing_says_that_the_model_embeds(qwen3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    shutil.copytree(qwen3, folder)
    (folder / "modules.json").unlink()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        VLM(folder, **OPTIONS)


@pytest.mark.parametrize(
    ("kind", "config", "why"),
    [
        ("Pooling", {"pooling_mode_lasttoken": True}, None),
        ("Pooling", {"pooling_mode": "lasttoken"}, None),
        ("Normalize", {}, None),
        ("Pooling", {"pooling_mode": "mean"}, "'mean'"),
        ("Pooling", {"pooling_mode_mean_tokens": True, "include_prompt": True}, "'mean_tokens'"),
        ("Dense", {}, "Dense"),
    ],
)
def test_what_sentence_transformers_say(tmp_path: Path, kind: str, config: dict[str, Any], why: str | None) -> None:
    rows = [{"type": "custom_st.Transformer", "path": "", "idx": 0}, {"type": f"models.{kind}", "path": "1", "idx": 1}]
    (tmp_path / "modules.json").write_text(json.dumps(rows))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.json").write_text(json.dumps(config))
    told = read_why_no_vectors(tmp_path)
    assert (told is None) if why is None else (told is not None and why in told)


def test_a_token_that_ends_what_is_embedded_is_missed_by_name(vision: Callable[[str], Path]) -> None:
    folder = vision("qwen2_vl")
    config, tokenizer = read_config(folder), Tokenizer.from_folder(folder)
    assert VectorForm.of(config, tokenizer).ending == (ENDOFTEXT,)
    del tokenizer.added["<|endoftext|>"]
    with pytest.raises(CheckpointError, match=r"has no <\|endoftext\|>"):
        VectorForm.of(config, tokenizer)


def test_a_list_of_modules_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text('{"0": "Transformer"}')
    with pytest.raises(CheckpointError, match="is not a list of modules"):
        read_why_no_vectors(tmp_path)


@pytest.mark.parametrize(
    ("processor", "ending"),
    [
        (None, ()),
        ({"type": "ByteLevel"}, ()),
        ({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}], "special_tokens": {}}, ()),
        ({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}], "special_tokens": {}}, "more than"),
        ({"type": "TemplateProcessing", "single": [{"Sequence": {}}, {"SpecialToken": {"id": "x"}}]}, "be read"),
        ({"type": "BertProcessing"}, "BertProcessing"),
    ],
)
def test_what_a_tokenizer_puts_behind_a_text(
    checkpoint: CheckpointMaker, processor: dict[str, Any] | None, ending: str | tuple[int, ...]
) -> None:
    file = TokenizerFile.read(checkpoint("qwen3"))
    parts = {**file.parts, "post_processor": json.dumps(processor).encode()}
    changed = TokenizerFile(parts, file.added)  # type: ignore[arg-type]
    if isinstance(ending, tuple):
        assert changed.ending == ending
    else:
        with pytest.raises(CheckpointError, match=ending):
            _ = changed.ending
