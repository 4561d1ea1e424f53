"""Text models against `transformers`, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import CheckpointError, ConfigError
from dashinfer_vlm.models.base import Model
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.loading import load_encoder, load_model
from tests.conftest import CheckpointMaker
from tests.models import driving
from tests.models.driving import Driver, Prompt, greedy, hf_logits, prompt

CASE, OTHER = prompt(70), prompt(23, seed=1)


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, checkpoint: CheckpointMaker) -> Path:
    return checkpoint(request.param)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1000, 7])
def test_logits_equal_those_of_transformers_in_chunks_of_any_size(model: Model, hf: Any, chunk: int) -> None:
    driver = Driver(model)
    assert_close(driver.run(driver.start(CASE), chunk), hf_logits(hf, CASE))


def test_a_batch_of_sequences_gives_each_the_logits_it_has_alone(model: Model, hf: Any) -> None:
    driver = Driver(model)
    lives = [driver.start(CASE), driver.start(OTHER)]
    first = driver.step([(lives[0], 3), (lives[1], 11)])
    rest = driver.step([(life, len(life.ids) - life.num_done) for life in lives])
    for case, before, after in zip((CASE, OTHER), first, rest, strict=True):
        assert_close(torch.cat([before, after]), hf_logits(hf, case))


def test_64_greedy_tokens_equal_those_of_transformers(model: Model, hf: Any) -> None:
    with torch.no_grad():
        theirs = hf.generate(**CASE.hf_inputs(), max_new_tokens=64, min_new_tokens=64, do_sample=False)
    assert greedy(Driver(model), CASE, 64, forbidden=model.eos_token_ids) == theirs[0, len(CASE.ids) :].tolist()


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_a_bfloat16_checkpoint_gives_the_greedy_tokens_of_its_values_in_float32(
    checkpoint: CheckpointMaker, arch: str
) -> None:
    folder = checkpoint(arch, dtype="bfloat16")
    ours, reference = (Driver(driving.load(folder, dtype)) for dtype in ("bfloat16", "float32"))
    assert greedy(ours, CASE, 16) == greedy(reference, CASE, 16)


def set_value(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "settings",
    [{}, {"attention_factor": 1.3}, {"beta_fast": 4, "beta_slow": 2}, {"factor": 2.5}],
    ids=["as Qwen writes it", "attention factor", "betas", "another factor"],
)
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_yarn_stretches_the_context_as_in_transformers(changed: Path, settings: dict[str, float], key: str) -> None:
    set_value(changed, max_position_embeddings=64, rope_scaling={key: "yarn", **YARN, **settings})
    case = Prompt(CASE.ids + OTHER.ids, ())  # three times the context that was trained
    driver = Driver(driving.load(changed))
    assert_close(driver.run(driver.start(case), 40), hf_logits(driving.load_hf(changed), case))
    assert read_config(changed).text.max_position_embeddings == int(32 * settings.get("factor", 4.0))


def test_yarn_changes_the_logits(changed: Path, hf: Any) -> None:
    set_value(changed, rope_scaling={"rope_type": "yarn", **YARN})
    driver = Driver(driving.load(changed))
    assert (driver.run(driver.start(CASE)) - hf_logits(hf, CASE)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window is true; sliding windows are not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names sliding_attention"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type is 'llama3'; supported: default, yarn"),
        ({"rope_scaling": {"type": "dynamic"}}, "type is 'dynamic'; supported: default, yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor is 0.5; it must be at least 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings is missing"),
        ({"rope_scaling": {"type": "yarn", **YARN, "mscale": 1.0}}, "mscale is 1.0; this setting of YaRN is not"),
        ({"rope_theta": None}, "rope_theta is missing"),
    ],
)
def test_what_is_not_supported_is_named(changed: Path, values: dict[str, Any], message: str) -> None:
    set_value(changed, **values)
    with pytest.raises(CheckpointError, match=message):
        read_config(changed)


def test_a_text_model_has_no_encoder_and_takes_no_items(folder: Path) -> None:
    config, model = read_config(folder), driving.load(folder)
    assert (config.vision, config.processor, config.placeholder_ids, config.merge_size) == (None, None, {}, 1)
    assert model.encoder is None
    assert model.embedding_size == model.text.hidden_size == 128
    with pytest.raises(CheckpointError, match="is a text model"):
        load_encoder(EngineConfig(model=str(folder)))


@pytest.mark.parametrize(
    "options",
    [
        {"vision_workers": 1},
        {"vision_cache": "redis://localhost"},
        {"vision_quant_type": "a8w8"},
        {"vision_engine": "transformers"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_for_an_encoder_are_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--vision-[a-z-]+ is set, but Qwen\dForCausalLM is a text model"):
        load_model(EngineConfig(model=str(folder), **options))
