"""`transformers` on the same device in the same run: the peer that is there wherever Python is."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial

import torch

from card_checks.models import checked_backend, make_model, published_config
from card_checks.results import Check, Setting
from card_checks.rows import Row
from card_checks.sizes import weight_bytes
from dashinfer_vlm.models.config import CheckpointConfig


def peer(setting: Setting) -> Iterator[Check]:
    """A token of one stream, next to the floor that ours has in `shapes`; where it is not installed, a row says so."""
    if importlib.util.find_spec("transformers") is None:
        yield "transformers", lambda: Row(note="not installed here")
        return
    size, context, more = ("tiny", 20, 2) if setting.tiny else ("2b", 1024, 32)
    yield f"transformers, {size} decode 1 of {context}", partial(_peer, setting, size, context, more)


def _peer(setting: Setting, size: str, context: int, more: int) -> Row:
    dtype = torch.float32 if setting.device.type == "cpu" else torch.bfloat16
    config = published_config("qwen2_vl", size)
    model = make_model(config, checked_backend(setting, dtype), small=setting.tiny)
    text = config.text
    per_token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * dtype.itemsize
    floor = setting.ceilings.seconds(weight_bytes(model) + context * per_token)
    del model
    return Row(seconds=_token_seconds(setting, config, dtype, context, more), floor=floor)


def _token_seconds(setting: Setting, config: CheckpointConfig, dtype: torch.dtype, context: int, more: int) -> float:
    """Random weights, made on the device; the prompt's own time is taken off."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    told = {key: value for key, value in config.root.values.items() if key != "model_type"}
    theirs = AutoConfig.for_model(config.root.text("model_type"), **told)
    with torch.device(setting.device):
        model = AutoModelForImageTextToText.from_config(theirs, dtype=dtype).eval()
    ids = torch.randint(0, 1000, (1, context), device=setting.device)

    def generate(count: int) -> None:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
        )

    whole, first = (setting.time(lambda count=count: generate(count), rounds=3) for count in (1 + more, 1))
    return (whole - first) / more
