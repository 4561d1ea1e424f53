"""Adapters that are merged into a model when it is loaded, against `transformers` with weights that were changed in
float64. PEFT's own files are read in `test_lora_peft.py`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.identity import encoder_identity
from dashinfer_vlm.models.loading import load_encoder, load_model
from dashinfer_vlm.models.weights import Weights
from tests.conftest import CheckpointMaker
from tests.models import driving, qwen3_vl, stored_pairs
from tests.models.adapters import Adapter, old_name
from tests.models.driving import Driver, Prompt, greedy, hf_logits, image, prompt
from tests.models.stored_pairs import Tensors, Write
from tests.models.test_packed import awq
from tests.models.test_stored import by_rows

needs_kernels = pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")


def config(folder: Path, lora: Path | None, **options: Any) -> EngineConfig:
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "quant_cache_gib": 0}
    return EngineConfig(model=str(folder), lora=str(lora) if lora else None, **settings | options)


def case_of(folder: Path) -> Prompt:
    if not (folder / "preprocessor_config.json").exists():
        return prompt(30)
    if read_config(folder).architecture.startswith("Qwen2"):
        return prompt(11, image(112, 84), 9)
    return qwen3_vl.prompt(folder, 7, qwen3_vl.image(96, 64), 9)


def logits(folder: Path, lora: Path | None, **options: Any) -> torch.Tensor:
    driver = Driver(load_model(config(folder, lora, **options)))
    return driver.run(driver.start(case_of(folder)))


def of_text(module: str) -> bool:
    return "visual" not in module


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen2_5_vl")


@pytest.mark.parametrize("named", [str, old_name])
@pytest.mark.parametrize(
    "arch", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_vl_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next"]
)
def test_logits_and_tokens_are_those_of_transformers_with_changed_weights(
    checkpoint: CheckpointMaker, tmp_path: Path, arch: str, named: Callable[[str], str]
) -> None:
    folder = checkpoint(arch)
    hf, case = driving.load_hf(folder), case_of(folder)
    plain, adapter = hf_logits(hf, case), Adapter(hf)
    model = load_model(config(folder, adapter.write(tmp_path, named)))
    adapter.merge()
    driver, theirs = Driver(model), hf_logits(hf, case)
    torch.testing.assert_close(driver.run(driver.start(case)), theirs, atol=1e-4, rtol=0)
    assert (theirs - plain).abs().max() > 0.1
    with torch.no_grad():
        tokens = hf.generate(**case.hf_inputs(), max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert greedy(driver, case, 24, forbidden=model.eos_token_ids) == tokens[0, len(case.ids) :].tolist()


FIRST = "model.language_model.layers.0.self_attn."


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"is_stabilised": True}, {}),
        ({"dtype": torch.bfloat16}, {}),
        ({"dtype": torch.float16}, {}),
        ({"rank": 40, "alpha": 2.5}, {}),
        ({"ranks": {f"{FIRST}q_proj": 7}, "alphas": {f"{FIRST}v_proj": 50.0}}, {}),
        ({"ranks": {f"{FIRST}q_proj": 7}}, {"rank_pattern": {f"^{FIRST}q_proj": 7}}),
        ({"ranks": {f"{FIRST}q_proj": 7}}, {"rank_pattern": {r".*\.layers\.0\.self_attn\.q_proj": 7}}),
        ({"alphas": {f"{FIRST}q_proj": 40.0}}, {"alpha_pattern": {"0.self_attn.q_proj": 40, "q_proj": 6}}),
        ({"alphas": {f"{FIRST}q_proj": 40.0}}, {"alpha_pattern": {"^q_proj": 9, "j": 9, f"{FIRST}q_proj": 40.0}}),
    ],
)
def test_scales_and_ranks_are_those_of_the_settings(
    folder: Path, tmp_path: Path, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    hf, case = driving.load_hf(folder), case_of(folder)
    adapter = Adapter(hf, **options)
    ours = logits(folder, adapter.write(tmp_path, **settings))
    adapter.merge()
    torch.testing.assert_close(ours, hf_logits(hf, case), atol=1e-4, rtol=0)


def test_a_convolution_may_have_an_update(folder: Path, tmp_path: Path) -> None:
    hf, case = driving.load_hf(folder), case_of(folder)
    weight = hf.model.visual.patch_embed.proj.weight
    a, b = torch.randn(4, *weight.shape[1:]) * 0.1, torch.randn(len(weight), 4, 1, 1, 1) * 0.1
    lora = Adapter(hf, lambda _: False).write(tmp_path)
    name = "base_model.model.model.visual.patch_embed.proj.lora_{}.weight"
    save_file({name.format("A"): a, name.format("B"): b}, lora / "adapter_model.safetensors")
    ours = logits(folder, lora)
    delta = 1.5 * torch.einsum("or,rctij->octij", b.flatten(1).double(), a.double())
    weight.data = (weight.double() + delta).float()
    torch.testing.assert_close(ours, hf_logits(hf, case), atol=1e-4, rtol=0)


def test_experts_may_have_a_pair_each(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """As `transformers` had them before it put them into one parameter."""
    folder = checkpoint("qwen3_moe")
    adapter = Adapter(driving.load_hf(folder))
    lora = adapter.write(tmp_path / "together")
    tensors, separate = adapter.tensors(), {}
    for name in [name for name in tensors if ".experts." in name and "lora_A" in name]:
        a, b = tensors.pop(name), tensors.pop(name.replace("lora_A", "lora_B"))
        count = len(a) // adapter.rank
        module = name.partition(".experts.")[0] + ".experts"
        kinds = ("gate", "up") if ".base_layer." in name else ("down",)
        for i in range(count):
            for kind, rows in zip(kinds, b[:, i::count].chunk(len(kinds)), strict=True):
                prefix = f"{module}.{i}.{kind}_proj.lora_"
                separate[f"{prefix}A.weight"] = a[i * adapter.rank : (i + 1) * adapter.rank].clone()
                separate[f"{prefix}B.weight"] = rows.contiguous()
    alone = adapter.write(tmp_path / "alone")
    save_file(tensors | separate, alone / "adapter_model.safetensors")
    assert torch.equal(logits(folder, lora), logits(folder, alone))


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"quant_type": "a8w8", "vision_quant_type": "a8w8"}, {"quant_type": "a16w4"}])
@pytest.mark.parametrize("arch", ["qwen2_5_vl", "qwen3_vl_moe"])
@pytest.mark.filterwarnings("ignore")
def test_it_is_as_if_the_merged_model_had_been_exported(
    checkpoint: CheckpointMaker, tmp_path: Path, arch: str, options: dict[str, str]
) -> None:
    """Rounded once to what is stored, quantised or not."""
    options = {"dtype": "bfloat16", **options}
    folder = checkpoint(arch, dtype="bfloat16")
    hf = driving.load_hf(folder)
    adapter = Adapter(hf, dtype=torch.bfloat16)
    lora, exported = adapter.write(tmp_path / "adapter"), tmp_path / "exported"
    adapter.merge()
    hf.bfloat16().save_pretrained(exported)
    for path in folder.glob("*.json"):
        shutil.copy(path, exported)
    ours, theirs = (logits(model, adapter, **options) for model, adapter in ((folder, lora), (exported, None)))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, logits(folder, None, **options))


def fp8(base: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    numbers, scale, whole = by_rows(weight.float())
    return {f"{base}.weight": numbers, f"{base}.weight_scale": scale}, whole


def four_bits(base: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    tensors, whole = awq(weight)
    return {base + name: tensor for name, tensor in tensors.items()}, whole


STORED: dict[str, tuple[dict[str, Any], Write]] = {
    "8-bit floats": ({"quant_method": "fp8"}, fp8),
    "4 bits": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}, four_bits),
}


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"quant_type": "a16w4"}, {"quant_type": "a8w8"}])
@pytest.mark.parametrize("form", STORED)
def test_weights_that_are_stored_quantised_are_expanded_and_rounded_anew(
    checkpoint: CheckpointMaker, tmp_path: Path, form: str, options: dict[str, str]
) -> None:
    origin = checkpoint("qwen3", dtype="bfloat16")
    stored, written = stored_pairs.write_pair(origin, tmp_path, *STORED[form])
    lora = Adapter(driving.load_hf(origin)).write(tmp_path / "adapter")
    ours, theirs = (logits(pair, lora, dtype="bfloat16", **options) for pair in (stored, written))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, logits(stored, None, dtype="bfloat16", **options))


@pytest.mark.parametrize("form", STORED)
def test_matrices_without_an_update_stay_as_they_are_stored(
    checkpoint: CheckpointMaker, tmp_path: Path, form: str
) -> None:
    origin = checkpoint("qwen3", dtype="bfloat16")
    stored, _ = stored_pairs.write_pair(origin, tmp_path, *STORED[form])
    lora = Adapter(driving.load_hf(origin), lambda module: "k_proj" in module).write(tmp_path / "adapter")
    weights = Weights.of(read_config(stored), config(stored, lora))
    found = []
    for layer in ("self_attn.k_proj", "mlp.gate_proj"):
        name = f"model.layers.0.{layer}.weight"
        rows, depth = weights.shapes("text")[name]
        matrix = weights.matrix({name: rows}, depth)
        found.append((matrix.nibbles or matrix.read_floats) is not None)
    assert found == [False, True]


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_the_encoder_alone_is_merged_too(folder: Path, tmp_path: Path, engine: str) -> None:
    hf, case = driving.load_hf(folder), case_of(folder)
    adapter = Adapter(hf, lambda module: not of_text(module))
    encoder = load_encoder(config(folder, adapter.write(tmp_path), vision_engine=engine))
    adapter.merge()
    (item,) = case.items
    state = encoder.begin([driving.patches_of(item)], [item.grid or (0, 0, 0)])
    while not state.done:
        encoder.run(state, 1000)
    inputs = case.hf_inputs()
    theirs = hf.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
    torch.testing.assert_close(encoder.finish(state)[0], theirs, atol=1e-4, rtol=0)


def test_an_encoder_is_another_one_where_the_adapter_touches_it(folder: Path, tmp_path: Path) -> None:
    hf = driving.load_hf(folder)
    text = Adapter(hf, of_text).write(tmp_path / "text")
    all_of_it = [Adapter(hf, seed=seed).write(tmp_path / str(seed)) for seed in (0, 0, 1)]
    plain, of_the_text, same, again, other = (
        encoder_identity(config(folder, lora), torch.float32) for lora in (None, text, *all_of_it)
    )
    assert plain == of_the_text
    assert same == again
    assert len({plain, same, other}) == 3


@needs_kernels
def test_quantised_weights_are_kept_for_each_adapter(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, cache = Adapter(driving.load_hf(folder), of_text).write(tmp_path / "adapter"), tmp_path / "cache"
    options: dict[str, Any] = {"quant_cache": str(cache), "quant_cache_gib": 1, "quant_type": "a8w8"}
    options |= {"vision_quant_type": "a8w8", "dtype": "bfloat16"}
    logits(folder, None, **options)
    merged = logits(folder, lora, **options)
    assert sorted(path.name[:4] for path in cache.glob("*.safetensors")) == ["text", "text", "visi"]
    with monkeypatch.context() as patch:
        patch.setattr(Weights, "_join", lambda *_: pytest.fail("read a matrix"))
        assert torch.equal(logits(folder, lora, **options), merged)
    # the same file with other numbers, a moment later
    Adapter(driving.load_hf(folder), of_text, seed=1).write(lora)
    assert not torch.equal(logits(folder, lora, **options), merged)
    assert len(list(cache.glob("text-*.safetensors"))) == 3


def test_other_settings_are_another_adapter(folder: Path, tmp_path: Path) -> None:
    adapter, prints = Adapter(driving.load_hf(folder)), []
    for alpha in (6, 7):
        lora = adapter.write(tmp_path, lora_alpha=alpha)
        prints.append(Weights.of(read_config(folder), config(folder, lora)).fingerprint("text"))
    assert prints[0] != prints[1]
