"""Guesses by the model's own head: what it guesses, and that no answer changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.drafts import Drafter
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.errors import CheckpointError, ConfigError
from dashinfer_vlm.models import quant_cache
from dashinfer_vlm.models.loading import check_checkpoint, load_model
from dashinfer_vlm.models.model import LoadedModel
from dashinfer_vlm.request import Request, SamplingParams
from tests.conftest import CheckpointMaker
from tests.draft_heads import with_draft_head
from tests.engine.test_parity import NUM_STEPS, Family, Prompt, mixed_prompts, picture, run

MTP: dict[str, str | int] = {"method": "mtp", "num_speculative_tokens": 2}


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_5_moe"])
def family(
    request: pytest.FixtureRequest, checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory
) -> Family:
    from transformers import AutoModelForImageTextToText

    folder = with_draft_head(checkpoint(request.param), tmp_path_factory.mktemp("mtp"))
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    reference.generation_config.do_sample = False
    reference.generation_config.temperature = reference.generation_config.top_p = reference.generation_config.top_k = (
        None
    )
    return Family(folder, reference.eval(), loaded(folder))


def loaded(folder: Path, **options: Any) -> LoadedModel:
    settings = {"dtype": "float32", "device": "cpu", "speculative_config": MTP, **options}
    return load_model(EngineConfig(model=str(folder), **settings))


@pytest.fixture
def heard() -> Iterator[list[tuple[int, ...]]]:
    """What the model guessed, step by step."""
    guesses: list[tuple[int, ...]] = []
    hear = Drafter.hear

    def listen(drafter: Drafter, guess: tuple[int, ...]) -> None:
        guesses.append(guess)
        hear(drafter, guess)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafter, "hear", listen)
        yield guesses


def guessing(family: Family, *, always: bool, **options: Any) -> Engine:
    """Rows cost nothing, or so much that no guess is worth one."""
    engine = family.engine(speculative_config=MTP, **options)
    cost = engine.scheduler.cost
    cost.fixed_s, cost.token_s, cost.rate = (1.0, 0.0, 0.0) if always else (0.0, 1.0, 0.0)
    return engine


@torch.inference_mode()
def reference_guesses(family: Family, prompt: Prompt) -> list[tuple[int, int]]:
    """By the layers of `transformers`, over the prompt and its whole answer at once: what is guessed behind each token
    of the answer, and behind that guess."""
    model = family.reference.model
    seen: dict[str, torch.Tensor] = {}

    def keep(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        length, positions = inputs["inputs_embeds"].shape[1], inputs["position_ids"]
        counted = torch.arange(length).expand(3, 1, length)
        seen.update(embedded=inputs["inputs_embeds"], positions=counted if positions is None else positions)

    answer = family.expected(prompt)
    hook = model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        states = model(**family.inputs(Prompt(prompt.ids + answer[:-1], prompt.pictures))).last_hidden_state
    finally:
        hook.remove()
    text, head = model.language_model, Head(family)
    following = torch.cat([seen["embedded"][:, 1:], text.embed_tokens(torch.tensor([[answer[-1]]]))], dim=1)
    positions = seen["positions"][-3:]
    found = head(following, states, positions, text.rotary_emb)
    guesses: list[int] = family.reference.lm_head(found)[0].argmax(dim=1).tolist()
    chains = []
    for end in range(len(prompt.ids), following.shape[1] + 1):  # the first result in place of the state behind it
        first = guesses[end - 1]
        grown = [
            torch.cat([x[:, :end], more], dim=1)
            for x, more in ((following, text.embed_tokens(torch.tensor([[first]]))), (states, found[:, end - 1 : end]))
        ]
        places = torch.cat([positions[..., :end], positions[..., end - 1 : end] + 1], dim=-1)
        last = family.reference.lm_head(head(*grown, places, text.rotary_emb)[:, -1])
        chains.append((first, int(last.argmax())))
    return chains


def assert_guessed(heard: list[tuple[int, ...]], expected: list[tuple[int, int]]) -> None:
    """There is no second guess where a block ends."""
    assert len(heard) == len(expected), "no guess is right here"
    assert [guess[0] for guess in heard] == [guess[0] for guess in expected]
    assert all(guess == chain[: len(guess)] for guess, chain in zip(heard, expected, strict=True))
    assert sum(len(guess) for guess in heard) > 1.8 * len(heard)


class Head(nn.Module):
    """As vLLM's `qwen3_5_mtp.py` puts it together."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        text = family.reference.model.language_model
        norm, full = type(text.norm), text.config.layer_types.index("full_attention")
        hidden, eps = text.config.hidden_size, text.config.rms_norm_eps
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = (norm(hidden, eps=eps) for _ in range(3))
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([type(text.layers[full])(text.config, full)])
        tensors = load_file(family.folder / "model.safetensors")
        self.load_state_dict({k.removeprefix("mtp."): x.float() for k, x in tensors.items() if k.startswith("mtp.")})

    def forward(self, embedded: torch.Tensor, states: torch.Tensor, positions: torch.Tensor, rotary: Any) -> Any:
        x = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(states)], dim=-1)
        x = self.fc(x)
        mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min).triu(1)[None, None]
        x = self.layers[0](x, position_embeddings=rotary(x, positions), attention_mask=mask)
        return self.norm(x[0] if isinstance(x, tuple) else x)


@pytest.mark.parametrize("always", [False, True], ids=["beside none", "beside wrong ones"])
def test_the_head_guesses_what_its_layers_in_transformers_guess(
    family: Family, heard: list[tuple[int, ...]], always: bool
) -> None:
    prompt, engine = family.prompt(9, picture(150, 100), 30), guessing(family, always=always)
    run(engine, family.request("knows the picture", family.prompt(3, picture(150, 100)), max_tokens=1))
    heard.clear()  # a picture that is encoded meanwhile would part the prompt, and nobody knows what follows there
    told = run(engine, family.request("a", prompt))["a"]
    assert told == family.expected(prompt)
    assert_guessed(heard, reference_guesses(family, prompt))


def test_chunks_and_known_prefixes_change_no_guess(family: Family, heard: list[tuple[int, ...]]) -> None:
    prompt = family.prompt(90)
    engine = guessing(family, always=True, max_num_batched_tokens=48, max_num_seqs=8)
    for name in "ab":
        assert run(engine, family.request(name, prompt))[name] == family.expected(prompt)
    assert engine.stats().num_cached_tokens_total > 0
    assert_guessed(heard, 2 * reference_guesses(family, prompt))


def test_guesses_of_the_head_change_no_answer(family: Family) -> None:
    """Greedy and sampled, text and pictures, in one batch with chunks, beside the answers without guesses."""
    prompts = mixed_prompts(family)
    sampled = [family.request(f"s{i}", p, temperature=0.7, seed=i) for i, p in enumerate(prompts.values())]
    engine = guessing(family, always=True, max_num_batched_tokens=48, max_num_seqs=8)
    greedy = [family.request(name, prompt) for name, prompt in prompts.items()]
    together = run(engine, *greedy, *sampled)
    assert {name: together[name] for name in prompts} == {n: family.expected(p) for n, p in prompts.items()}
    assert {r.id: together[r.id] for r in sampled} == run(family.engine(), *sampled)
    assert engine.stats().num_draft_tokens_total > NUM_STEPS


def test_a_vector_beside_a_stream_that_guesses_is_the_same(family: Family) -> None:
    vector, stream = family.request("v", family.prompt(40), wants_vector=True), family.request("a", family.prompt(5))
    found = []
    for engine in (guessing(family, always=True), family.engine()):
        engine.add(stream)
        engine.step()
        engine.add(vector)
        news = [output for _ in range(NUM_STEPS) for output in engine.step()]
        found.append(next(np.frombuffer(output.vector, "<f4") for output in news if output.vector))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_a_text_model_says_the_same_with_its_head(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    folder = with_draft_head(checkpoint("qwen3_next"), tmp_path)
    told = []
    for model, speculation in ((loaded(folder), MTP), (loaded(folder, speculative_config=None), None)):
        family = Family(folder, None, model)
        request = Request(id="a", prompt_ids=[5, 6, 7, 8] * 10, params=SamplingParams(temperature=0, max_tokens=32))
        told.append(run(family.engine(speculative_config=speculation), request))
    assert told[0] == told[1]


def test_a_model_without_a_head_for_it_is_told_so(checkpoint: CheckpointMaker) -> None:
    for arch, message in (("qwen3_5", "holds no head that guesses"), ("qwen2_vl", "holds no head that guesses")):
        folder = checkpoint(arch)
        for refuse in (lambda f=folder: loaded(f), lambda f=folder: check_checkpoint(_config(f))):
            with pytest.raises(ConfigError, match=message):
                refuse()


def test_a_head_without_its_layer_is_told_by_the_tensor(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    folder = with_draft_head(checkpoint("qwen3_5"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["mtp.layers.0.self_attn.o_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mtp\.layers\.0\.self_attn\.o_proj\.weight is missing"):
        loaded(folder)


def test_quantised_weights_of_the_head_are_kept_apart(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quant_cache, "RACY_NS", 0)
    folder = with_draft_head(checkpoint("qwen3_5"), tmp_path / "model")
    cache = {"quant_type": "a8w8", "quant_cache": str(tmp_path / "cache"), "dtype": "bfloat16"}
    for settings in (MTP, None, MTP, None):
        loaded(folder, speculative_config=settings, **cache)
    assert len(list((tmp_path / "cache").glob("text-*.safetensors"))) == 2
    assert "cannot be used" not in caplog.text


def _config(folder: Path) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", speculative_config=MTP)
