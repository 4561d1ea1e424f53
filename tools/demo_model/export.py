"""Write a trained state as a checkpoint in the published Qwen2-VL format.

PYTHONPATH=tools python tools/demo_model/export.py build/demo_model/train.pt src/dashinfer_vlm/demo_model
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demo_model.model import IMAGE_MEAN, IMAGE_STD, Shape
from demo_model.scenes import PATCH
from demo_model.vocabulary import load_tokenizer, merges_of, special_id

# Pictures come before the words of a message, whichever way round they were sent: so the model was trained.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}"
    "{% endfor %}"
    "{% for part in message['content'] %}{% if 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIN_PIXELS, MAX_PIXELS = 6272, 12544  # from 112 x 56 to 112 x 112: the sizes trained on
MAX_POSITIONS = 2048

VISION_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
TEXT_NAMES = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def published_name(name: str) -> str | None:
    """The published tensor name of one of ours; None for what only training uses."""
    part, _, rest = name.partition(".")
    if part in ("heads", "differs"):
        return None
    if rest.startswith("blocks."):
        _, index, layer, kind = rest.split(".")
        return (
            f"visual.blocks.{index}.{VISION_NAMES[layer]}.{kind}"
            if part == "vision"
            else f"model.layers.{index}.{TEXT_NAMES[layer]}.{kind}"
        )
    fixed = {
        "vision.patch_embed": "visual.patch_embed.proj",
        "vision.merger.ln_q": "visual.merger.ln_q",
        "vision.merger.first": "visual.merger.mlp.0",
        "vision.merger.second": "visual.merger.mlp.2",
        "text.embed": "model.embed_tokens",
        "text.norm": "model.norm",
    }
    layer, _, kind = name.rpartition(".")
    return f"{fixed[layer]}.{kind}"


def published_tensors(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Our state under the published names; the patch layer becomes the two equal halves of a convolution over two
    frames."""
    tensors = {}
    for ours, value in state.items():
        name = published_name(ours)
        if name is None:
            continue
        if name.startswith("visual.patch_embed"):
            half = value.reshape(-1, 3, 1, PATCH, PATCH) / 2
            value = torch.cat([half, half], 2)
        tensors[name] = value.to(dtype).contiguous()
    return tensors


def read_published(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Our state out of a checkpoint folder, float32: those of `names` that are published."""
    state = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for ours in names:
            name = published_name(ours)
            if name is None:
                continue
            value = file.get_tensor(name).float()
            state[ours] = value.sum(2).flatten(1) if name.startswith("visual.patch_embed") else value
    return state


def config(shape: Shape, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    ids = {
        name: special_id(tokenizer, name)
        for name in ("endoftext", "im_end", "vision_start", "vision_end", "vision_pad")
    }
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "tie_word_embeddings": True,
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "vision_token_id": ids["vision_pad"],
        "image_token_id": special_id(tokenizer, "image_pad"),
        "video_token_id": special_id(tokenizer, "video_pad"),
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(shape.mrope_section)},
        "sliding_window": MAX_POSITIONS,
        "use_sliding_window": False,
        "max_window_layers": shape.num_hidden_layers,
        "torch_dtype": dtype,
        "use_cache": True,
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": shape.vision_depth,
            "embed_dim": shape.vision_dim,
            "num_heads": shape.vision_heads,
            "hidden_size": shape.hidden_size,
            "mlp_ratio": 4,
            "in_channels": 3,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    settings["chat_template"] = CHAT_TEMPLATE
    write_json(out / "tokenizer_config.json", settings)
    vocab, merges = merges_of(tokenizer)
    (out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n")
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def export(state: dict[str, Tensor], tokenizer: Tokenizer, out: Path, dtype: str = "bfloat16") -> None:
    """Writes the whole checkpoint folder but its model card."""
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, out)
    shape = Shape()
    write_json(out / "config.json", config(shape, tokenizer, dtype))
    write_json(out / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    end, pad = special_id(tokenizer, "im_end"), special_id(tokenizer, "endoftext")
    write_json(
        out / "generation_config.json",
        {
            "bos_token_id": pad,
            "pad_token_id": pad,
            "eos_token_id": [end, pad],
            "do_sample": False,
            "max_new_tokens": 64,
        },
    )
    write_json(
        out / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": list(IMAGE_MEAN),
            "image_std": list(IMAGE_STD),
        },
    )
    tensors = published_tensors(state, getattr(torch, dtype))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    saved = torch.load(args.state, weights_only=True)
    export(saved["model"], load_tokenizer(args.state.parent), args.out, args.dtype)
    print(f"{args.out}: step {saved['step']}, {sum(path.stat().st_size for path in args.out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
