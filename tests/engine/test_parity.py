"""The engine over real models against `transformers`: the same greedy tokens over 64 steps, however they are
computed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.models.base import Model
from dashinfer_vlm.models.loading import allocate_kv, load_model
from dashinfer_vlm.processors.qwen import ProcessorConfig, process_image
from dashinfer_vlm.request import Item, Request, SamplingParams
from tests.conftest import CheckpointMaker
from tests.tokens import IMAGE, VISION_END, VISION_START

NUM_STEPS = 64
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"]


@dataclass(frozen=True)
class Prompt:
    """Ids with expanded placeholders, and the pictures behind them."""

    ids: list[int]
    pictures: tuple[np.ndarray, ...]


@dataclass
class Family:
    """One checkpoint as `transformers` and as the engine run it; what both give for a prompt is computed once."""

    folder: Path
    reference: Any
    model: Model
    known: dict[bytes, list[int]] = field(default_factory=dict)

    @property
    def processor(self) -> ProcessorConfig:
        return ProcessorConfig.from_checkpoint(self.folder)

    def engine(self, **options: Any) -> Engine:
        settings = {"max_model_len": 2048, **options}
        num_blocks = settings.pop("num_blocks", 512)
        config = EngineConfig(model=str(self.folder), **settings)
        return Engine(self.model, allocate_kv(self.model, num_blocks, config.block_size, num_seats=16), config)

    def item(self, picture: np.ndarray, start: int) -> Item:
        done = process_image(picture, self.processor)
        return Item(
            kind="image",
            start=start,
            num_tokens=int(np.prod(done.grid)) // 4,
            content_hash=hashlib.sha256(picture.tobytes() + str(picture.shape).encode()).digest(),
            grid=done.grid,
            patches=done.features,
        )

    def request(self, name: str, prompt: Prompt, *, wants_vector: bool = False, **params: Any) -> Request:
        items, cursor = [], 0
        for picture in prompt.pictures:
            start = prompt.ids.index(IMAGE, cursor)
            items.append(self.item(picture, start))
            cursor = start + items[-1].num_tokens
        sampling = SamplingParams(**{"temperature": 0, "max_tokens": NUM_STEPS, "ignore_eos": True, **params})
        fields: dict[str, Any] = {"items": tuple(items), "params": sampling, "wants_vector": wants_vector}
        return Request(id=name, prompt_ids=prompt.ids, **fields)

    def prompt(self, *parts: int | np.ndarray, seed: int = 0) -> Prompt:
        """Integers are so many random words, arrays are pictures."""
        random = np.random.default_rng(seed)
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids += random.integers(256, 400, part).tolist()
            else:
                num_tokens = self.item(part, 0).num_tokens
                ids += [VISION_START, *[IMAGE] * num_tokens, VISION_END]
        return Prompt(ids, tuple(p for p in parts if not isinstance(p, int)))

    def expected(self, prompt: Prompt) -> list[int]:
        key = b"".join([np.array(prompt.ids).tobytes(), *(p.tobytes() for p in prompt.pictures)])
        if key not in self.known:
            self.known[key] = self._generate(prompt)
        return self.known[key]

    def inputs(self, prompt: Prompt) -> dict[str, Any]:
        """As `transformers` takes it."""
        ids = torch.tensor([prompt.ids])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.pictures:
            done = [process_image(p, self.processor) for p in prompt.pictures]
            inputs["image_grid_thw"] = torch.tensor([d.grid for d in done])
            inputs["pixel_values"] = torch.cat([self._normalised(d.features) for d in done])
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        return inputs

    def _generate(self, prompt: Prompt) -> list[int]:
        with torch.inference_mode():
            out = self.reference.generate(
                **self.inputs(prompt),
                do_sample=False,
                max_new_tokens=NUM_STEPS,
                min_new_tokens=NUM_STEPS,
                eos_token_id=-1,
            )
        return [int(t) for t in out[0, len(prompt.ids) :]]

    def _normalised(self, patches: np.ndarray) -> torch.Tensor:
        config = self.processor
        mean = torch.tensor(config.image_mean).repeat_interleave(patches.shape[1] // 3)
        std = torch.tensor(config.image_std).repeat_interleave(patches.shape[1] // 3)
        return (torch.from_numpy(patches).float() / 255 - mean) / std


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, checkpoint: CheckpointMaker) -> Family:
    from transformers import AutoModelForImageTextToText

    folder = checkpoint(request.param)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    reference.generation_config.do_sample = False
    reference.generation_config.temperature = reference.generation_config.top_p = reference.generation_config.top_k = (
        None
    )
    model = load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu"))
    return Family(folder, reference.eval(), model)


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def run(engine: Engine, *requests: Request) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {r.id: [] for r in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for output in engine.step():
            assert output.finish is None or output.finish.reason == "length", output.finish
            tokens[output.request_id] += output.token_ids
    engine.scheduler.check_integrity()
    return tokens


def mixed_prompts(family: Family) -> dict[str, Prompt]:
    """Eight different requests: text, one picture, several."""
    prompts = {f"text{i}": family.prompt(5 + 9 * i, seed=i) for i in range(3)}
    prompts |= {f"one{i}": family.prompt(3, picture(60 + 40 * i, 90, i), 4 + i, seed=i) for i in range(3)}
    prompts |= {f"two{i}": family.prompt(2, picture(84, 56, i), 3, picture(140, 112, i), 6, seed=i) for i in range(2)}
    return prompts


def test_text_alone(family: Family) -> None:
    prompt = family.prompt(23)
    assert run(family.engine(), family.request("a", prompt))["a"] == family.expected(prompt)


def test_one_image(family: Family) -> None:
    prompt = family.prompt(4, picture(150, 100), 7)
    assert run(family.engine(), family.request("a", prompt))["a"] == family.expected(prompt)


def test_three_images_of_different_sizes_interleaved(family: Family) -> None:
    prompt = family.prompt(3, picture(56, 56), 5, picture(250, 120, 1), 2, picture(90, 310, 2), 6)
    assert run(family.engine(), family.request("a", prompt))["a"] == family.expected(prompt)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_two_turns_with_the_prefix_cache_on_and_off(family: Family, prefix_cache: bool) -> None:
    engine = family.engine(prefix_cache=prefix_cache)
    first = family.prompt(4, picture(150, 100), 7)
    answer = run(engine, family.request("a", first))["a"]
    assert answer == family.expected(first)
    tail = family.prompt(6, picture(70, 70, 3), 5, seed=9)
    second = Prompt(first.ids + answer + tail.ids, first.pictures + tail.pictures)
    assert run(engine, family.request("b", second))["b"] == family.expected(second)
    assert (engine.stats().num_cached_tokens_total > 0) == prefix_cache
    assert engine.stats().num_items_encoded_total == 2


def test_chunks_of_seven_tokens_that_split_inside_images(family: Family) -> None:
    prompt = family.prompt(3, picture(150, 100), 5, picture(90, 90, 2), 4)
    engine = family.engine(max_num_batched_tokens=7)
    assert run(engine, family.request("a", prompt))["a"] == family.expected(prompt)


def test_eight_sequences_in_one_batch_answer_as_alone(family: Family) -> None:
    prompts = mixed_prompts(family)
    together = run(family.engine(max_num_batched_tokens=48), *(family.request(k, p) for k, p in prompts.items()))
    assert together == {name: family.expected(prompt) for name, prompt in prompts.items()}


def test_a_preempted_sequence_answers_as_if_undisturbed(family: Family) -> None:
    prompts = mixed_prompts(family)
    engine = family.engine(num_blocks=28, max_model_len=256)
    together = run(engine, *(family.request(name, prompt) for name, prompt in prompts.items()))
    assert engine.stats().num_preemptions_total > 0
    assert together == {name: family.expected(prompt) for name, prompt in prompts.items()}


def test_a_small_embedding_cache_changes_no_answer(family: Family) -> None:
    prompts = mixed_prompts(family)
    engine = family.engine(vision_cache_gib=0.0)
    outputs = run(engine, *(family.request(name, prompt) for name, prompt in prompts.items()))
    assert outputs == {name: family.expected(prompt) for name, prompt in prompts.items()}
    assert engine.stats().embedding_bytes == 0


def test_sampling_by_seed_is_the_same_in_a_batch_and_alone(family: Family) -> None:
    prompt = family.prompt(4, picture(150, 100), 7)
    sampled = family.request("a", prompt, temperature=0.8, top_p=0.9, top_k=40, seed=5)
    alone = run(family.engine(), sampled)["a"]
    crowd = [family.request(name, p) for name, p in mixed_prompts(family).items()]
    assert run(family.engine(), *crowd, replace(sampled, id="b"))["b"] == alone


def test_guessed_tokens_change_no_answer(family: Family) -> None:
    """Greedy and sampled, text and pictures, in one batch with chunks, beside the answers without guesses."""
    prompts = mixed_prompts(family)
    sampled = [family.request(f"s{i}", p, temperature=0.7, seed=i) for i, p in enumerate(prompts.values())]
    guessing = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}}
    engine = family.engine(max_num_batched_tokens=48, max_num_seqs=8, **guessing)
    engine.scheduler.cost.fixed_s, engine.scheduler.cost.rate = 1.0, 0.0  # whatever these steps take, guess
    greedy = [family.request(name, prompt) for name, prompt in prompts.items()]
    together = run(engine, *greedy, *sampled)
    assert {name: together[name] for name in prompts} == {n: family.expected(p) for n, p in prompts.items()}
    assert {r.id: together[r.id] for r in sampled} == run(family.engine(), *sampled)
    assert engine.stats().num_accepted_draft_tokens_total > 0
