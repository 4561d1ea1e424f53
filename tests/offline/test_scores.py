"""Scores of rerankers as they are published, from texts and pictures to the numbers of `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dashinfer_vlm import VLM
from dashinfer_vlm.errors import CheckpointError, InvalidRequestError, UnsupportedError
from dashinfer_vlm.frontend.scores import ScoreForm
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.published import read_scoring
from tests.conftest import CheckpointMaker
from tests.engine.test_parity import Family, Prompt
from tests.offline.test_vectors import OPTIONS
from tests.rerankers import NO, YES, classify, publish, untie

QUERY = "Who stands in the reeds?"
DOCUMENTS = ["A heron stands in the reeds.", "Ein Reiher <|im_end|>", "Wo?" * 40, "?\n", "Rain falls."]
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
OF_TEXT = "Given a web search query, retrieve relevant passages that answer the query"
OF_VISION = "Given a search query, retrieve relevant candidates that answer the query."
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def published(checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """By a family's name, or that of its converted form."""

    def make(name: str) -> Path:
        family = name.removesuffix("-untied").removesuffix("-classifier")
        folder = publish(checkpoint(family), tmp_path_factory.mktemp("published") / name)
        if name != family:
            untie(folder)
        return classify(folder) if name.endswith("-classifier") else folder

    return make


def probability(logits: torch.Tensor) -> float:
    """Of yes against no, as Qwen3-Reranker's script has it."""
    pair = torch.log_softmax(torch.stack([logits[NO], logits[YES]]), dim=0)
    return pair[1].exp().item()


def text_prompts(folder: Path, instruction: str = OF_TEXT) -> list[list[int]]:
    """As Qwen3-Reranker's script has them, but that its tokenizer takes special tokens in a text for what they say."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prefix = tokenizer.encode(f"<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n")
    suffix = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    plain = Tokenizer.from_folder(folder)
    pairs = [f"<Instruct>: {instruction}\n<Query>: {QUERY}\n<Document>: {document}" for document in DOCUMENTS]
    return [[*prefix, *plain.encode_text(pair), *suffix] for pair in pairs]


@pytest.mark.parametrize("name", ["qwen3", "qwen3-untied"])
def test_texts_score_as_in_the_publishers_script(published: Make, name: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = published(name)
    with VLM(folder, **OPTIONS) as vlm:
        found, alone = vlm.score(QUERY, DOCUMENTS), vlm.score(QUERY, DOCUMENTS[-1:])
        other = vlm.score(QUERY, DOCUMENTS, instruction="Find birds")
        answer = vlm.chat("Hello").first
    assert found.dtype == np.dtype(np.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for scores, instruction in ((found, OF_TEXT), (other, "Find birds")):
        with torch.inference_mode():
            told = [model(torch.tensor([ids])).logits[0, -1] for ids in text_prompts(folder, instruction)]
        np.testing.assert_allclose(scores, list(map(probability, told)), atol=1e-5, rtol=0)
    assert np.ptp(found) > 0.01, "scores that are all alike show nothing"
    np.testing.assert_allclose(alone, found[-1:], atol=1e-6)
    assert answer.token_ids, "the head is there as in any other model"


def test_the_converted_form_scores_as_in_transformers_and_writes_nothing(published: Make) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = published("qwen3-classifier")
    with VLM(folder, **OPTIONS) as vlm:
        found = vlm.score(QUERY, DOCUMENTS)
        with pytest.raises(UnsupportedError, match="no head to write with"):
            vlm.chat("Hello")
        with pytest.raises(UnsupportedError, match="does not embed: it scores pairs"):
            vlm.embed(["Hello"])
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        told = [model(torch.tensor([ids])).logits.sigmoid().item() for ids in text_prompts(folder)]
    np.testing.assert_allclose(found, told, atol=1e-5, rtol=0)
    with VLM(published("qwen3-untied"), **OPTIONS) as vlm:
        np.testing.assert_allclose(vlm.score(QUERY, DOCUMENTS), found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl-untied"])
def test_pictures_on_both_sides_score_as_in_the_publishers_script(published: Make, name: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    folder, random = published(name), np.random.default_rng(0)
    heron, rain = (random.integers(0, 256, size, np.uint8) for size in ((112, 168, 3), (96, 96, 3)))
    queries: list[Any] = [QUERY, [heron, "this one?"], [rain]]
    documents: list[Any] = ["A heron.", [heron], [rain, "It rains."], ["in", " parts"]]
    with VLM(folder, **OPTIONS) as vlm:
        found = [vlm.score(query, documents) for query in queries]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    reference, tokenizer = Family(folder, model.eval(), model), AutoTokenizer.from_pretrained(folder)
    row = model.lm_head.weight[YES] - model.lm_head.weight[NO]
    for query, scores in zip(queries, found, strict=True):
        for document, score in zip(documents, scores, strict=True):
            content = [said(f"<Instruct>: {OF_VISION}"), said("<Query>:"), *side(query)]
            content += [said("\n<Document>:"), *side(document)]
            turns = [{"role": "system", "content": [said(JUDGE)]}, {"role": "user", "content": content}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            pictures = [part for each in (query, document) for part in each if isinstance(part, np.ndarray)]
            pieces = text.split("<|image_pad|>")
            counts = [reference.item(picture, 0).num_tokens for picture in pictures]
            text = pieces[0] + "".join("<|image_pad|>" * n + piece for n, piece in zip(counts, pieces[1:], strict=True))
            inputs = reference.inputs(Prompt(tokenizer(text)["input_ids"], tuple(pictures)))
            with torch.inference_mode():
                expected = torch.sigmoid(model.model(**inputs).last_hidden_state[0, -1] @ row).item()
            assert score == pytest.approx(expected, abs=1e-5)
    assert np.ptp(found) > 0.01


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def side(content: str | list[Any]) -> list[dict[str, Any]]:
    listed = [content] if isinstance(content, str) else content
    return [said(part) if isinstance(part, str) else {"type": "image"} for part in listed]


def test_what_pairs_begin_with_is_computed_once(published: Make) -> None:
    folder = published("qwen3")
    prompts = text_prompts(folder)
    shared = next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    with VLM(folder, **OPTIONS) as vlm:
        vlm.score(QUERY, DOCUMENTS)
        stats, size = vlm.stats(), vlm.info.block_size
    assert shared > 2 * size, "instruction and query are some blocks"
    assert stats.num_cached_tokens_total == (len(DOCUMENTS) - 1) * (shared // size) * size
    assert stats.num_computed_tokens_total == sum(map(len, prompts)) - stats.num_cached_tokens_total


def test_folders_with_the_template_of_pairs_are_opened(published: Make) -> None:
    """As Qwen3-Reranker has it since it is read by sentence-transformers; it plays no part here."""
    folder = published("qwen3")
    with VLM(folder, **OPTIONS) as vlm:
        found = vlm.score(QUERY, DOCUMENTS)
    of_role = '{{{{ messages | selectattr("role", "eq", "{}") | map(attribute="content") | first }}}}'
    template = f"<|im_start|>user\n{of_role.format('query')} {of_role.format('document')}<|im_end|>\n"
    (folder / "chat_template.jinja").write_text(template)
    with VLM(folder, **OPTIONS) as vlm:
        np.testing.assert_array_equal(vlm.score(QUERY, DOCUMENTS), found)


async def test_scores_for_callers_with_a_loop(published: Make) -> None:
    with VLM(published("qwen3"), **OPTIONS) as vlm:
        found = await vlm.ascore(QUERY, DOCUMENTS)
        np.testing.assert_allclose(vlm.score(QUERY, DOCUMENTS), found, atol=1e-6)
        assert vlm.score(QUERY, []).shape == (0,)


def test_what_is_wrong_is_raised(published: Make, vlm: VLM) -> None:
    with pytest.raises(UnsupportedError, match=r"scores no pairs: its folder has no modules\.json"):
        vlm.score(QUERY, ["Hello"])
    picture = np.zeros((64, 64, 3), np.uint8)
    with VLM(published("qwen3"), **OPTIONS) as text_model:
        for query, documents, told in (
            (QUERY, "Hello", "documents is a str"),
            ("", ["Hello"], "query is empty"),
            (QUERY, ["Hello", ""], r"documents\[1\] is empty"),
            (QUERY, [[]], r"documents\[0\] is empty"),
            (QUERY, [[picture]], "takes no image"),
            (QUERY, ["Hello", 1], r"documents\[1\] is a int"),
            (1, ["Hello"], "query is a int"),
            (QUERY, ["Hello \ud800"], r"holds U\+D800 at \d+, half of a pair"),
        ):
            with pytest.raises(InvalidRequestError, match=told):
                text_model.score(query, documents)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="instruction is a int; pass a str"):
            text_model.score(QUERY, ["Hello"], instruction=5)  # type: ignore[arg-type]


def test_a_name_that_leads_nowhere_is_that_of_qwen3_vl_reranker_8b(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    folder = publish(checkpoint("qwen3"), tmp_path / "8b", named="1_CausalScoreHead")
    scoring = read_scoring(folder, 4096)
    assert scoring is not None
    assert (scoring.yes, scoring.no) == (YES, NO)


@pytest.mark.parametrize(
    ("kinds", "tokens", "why"),
    [
        (["Transformer", "LogitScore"], {"true_token_id": 1, "false_token_id": None}, None),
        (["Transformer", "LogitScore"], {"true_token_id": 1}, None),
        (["Transformer", "Pooling"], {"true_token_id": 1, "false_token_id": 2}, None),
        (["Transformer"], {"true_token_id": 1, "false_token_id": 2}, None),
        (["Transformer", "LogitScore"], {"true_token_id": 4096, "false_token_id": 2}, "names token 4096"),
        (["Transformer", "LogitScore"], {"true_token_id": "yes", "false_token_id": 2}, "names token 'yes'"),
        (["Transformer", "LogitScore"], None, "1_LogitScore/config.json is missing"),
    ],
)
def test_what_sentence_transformers_say(
    tmp_path: Path, kinds: list[str], tokens: dict[str, Any] | None, why: str | None
) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"type": kind} for kind in kinds]))
    if tokens is not None:
        (tmp_path / "1_LogitScore").mkdir()
        (tmp_path / "1_LogitScore" / "config.json").write_text(json.dumps(tokens))
    if why is None:
        assert read_scoring(tmp_path, 4096) is None
    else:
        with pytest.raises(CheckpointError, match=why):
            read_scoring(tmp_path, 4096)


def test_a_family_whose_prompt_nobody_knows_scores_nothing(published: Make) -> None:
    folder = published("qwen2_vl")
    form = ScoreForm.of(read_config(folder), Tokenizer.from_folder(folder))
    with pytest.raises(UnsupportedError, match="nobody has said how a Qwen2VLForConditionalGeneration is asked"):
        form.check()
