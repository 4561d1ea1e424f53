#!/usr/bin/env python3
"""Write a random-weight Qwen checkpoint in the published format: real tensor names, real config keys, a tokenizer.

    make_checkpoint.py OUT --arch qwen2_vl --size tiny [--seed 0] [--dtype bfloat16]

`2b`, `7b`, `8b` (Qwen3-VL), `30b` (its mixture of experts), `35b` (that of Qwen3.5) and `80b` (Qwen3-Next) have the
published shapes, so that speed and memory are the real ones; the text that comes out is noise.
`tiny` and `small` are for tests, parity with `transformers` among them; their norms and biases are random too, since an
error in a norm of ones or a bias of zeros would not show, and their vocabulary is small, since every logit of every
test costs time. A new family is one more row of RECIPES.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>""".split()
FIRST_SPECIAL = {"tiny": 4000, "small": 4000, **dict.fromkeys(("2b", "7b", "8b", "30b", "80b"), 151643), "35b": 248044}
"""Id of <|endoftext|>, in the published vocabulary at the large sizes; the other special tokens follow it in order."""
WORDS = """the of and to in is you that it he was for on are as with his they at be this have from or one had by word
but not what all were we when your can said there use an each which she do how their if will up
other about out many then
them these so some her would make like him into time has look two more write go see number no way could people my than
first water been call who oil its now find long down day did get come made may part image describe picture different
same""".split()
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' or 'image' in c or 'image_url' in c %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' or 'video' in c %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLUMNS = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
tie_word_embeddings vocab_size""".split()
TEXT: dict[str, dict[str, Any]] = {
    size: {name: value for name, value in zip(COLUMNS, row, strict=True) if value is not None}
    for size, row in {
        "tiny": (128, 256, 2, 4, 2, True, 4096),
        "small": (256, 704, 4, 4, 1, False, 4096),
        "2b": (1536, 8960, 28, 12, 2, True, 151936),
        "7b": (3584, 18944, 28, 28, 4, False, 152064),
        "8b": (4096, 12288, 36, 32, 8, False, 151936),
        "30b": (2048, 6144, 48, 32, 4, False, 151936),
        "35b": (2048, None, 40, 16, 2, False, 248320),
        "80b": (2048, None, 48, 16, 2, False, 151936),
    }.items()
}
"""Of a text model by size, in the order of COLUMNS; None is not written."""
QWEN3_2B = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8}
"""Where the published Qwen3-VL-2B differs from the 2B shape of Qwen2-VL."""
QWEN3_5_2B = {"num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 248320}
"""Where the published Qwen3.5-2B differs from that."""
MROPE_SECTION = {"tiny": [4, 6, 6], "small": [8, 12, 12], "2b": [16, 24, 24], "7b": [16, 24, 24]}
VISION = {
    "tiny": (3, 64, 4),
    "small": (5, 160, 4),
    "2b": (32, 1280, 16),
    "7b": (32, 1280, 16),
    "8b": (27, 1152, 16),
    "30b": (27, 1152, 16),
    "35b": (27, 1152, 16),
}
"""Depth, width and heads of the vision encoder."""


def write_checkpoint(out: Path, arch: str, size: str, *, seed: int, dtype: str) -> None:
    """Write the whole model folder `out`; prints what it holds."""
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(out, size)
    write_json(out / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    write_configs(out, arch, size, dtype)
    sees = RECIPES[arch][2] is not None
    write_weights(out, sees=sees, seed=seed, dtype=dtype, randomise=size in ("tiny", "small"))


def write_configs(out: Path, arch: str, size: str, dtype: str) -> None:
    """What says how the model is built, how pictures are cut and what ends an answer."""
    architecture, config, processor = RECIPES[arch]
    named = {"architectures": [architecture], "model_type": arch, "torch_dtype": dtype}
    write_json(out / "config.json", named | config(size))
    write_json(out / "generation_config.json", generation_config(size))
    if processor is not None:
        for name, settings in processor_configs(processor).items():
            write_json(out / name, settings)


def special_ids(size: str) -> dict[str, int]:
    return {name: FIRST_SPECIAL[size] + index for index, name in enumerate(SPECIAL)}


def write_tokenizer(out: Path, size: str) -> None:
    # imported where they are used: tools/gpu_check.py takes the configurations on machines that have neither library
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab, merges = vocabulary(FIRST_SPECIAL[size])
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    write_json(out / "tokenizer_config.json", settings | {"tokenizer_class": "Qwen2Tokenizer"})
    (out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")


def vocabulary(num_tokens: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Bytes, the common words with their merges, and fillers up to `num_tokens`."""
    from tokenizers import pre_tokenizers

    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for chars in (list(word), ["Ġ", *word]):
            left = chars[0]
            for right in chars[1:]:
                if left + right not in vocab:
                    vocab[left + right] = len(vocab)
                    merges.append((left, right))
                left += right
    while len(vocab) < num_tokens:
        vocab[f"<filler{len(vocab)}>"] = len(vocab)
    return vocab, merges


def text_config(size: str) -> dict[str, Any]:
    """What all families write about their text model."""
    ids = special_ids(size)
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "use_cache": True,
        **TEXT[size],
    }


def seeing_config(size: str, vision: dict[str, Any]) -> dict[str, Any]:
    """A text model that sees, and its ViT."""
    depth, _, heads = VISION[size]
    sizes = {"depth": depth, "num_heads": heads, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return text_config(size) | {
        "vision_token_id": special_ids(size)["<|vision_pad|>"],
        **placeholders(size),
        "rope_scaling": {"type": "mrope", "mrope_section": MROPE_SECTION[size]},
        "vision_config": {"in_channels": 3, **sizes, **vision},
    }


def placeholders(size: str) -> dict[str, int]:
    ids = special_ids(size)
    return {
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
    }


def qwen2_vl(size: str) -> dict[str, Any]:
    width, hidden_size = VISION[size][1], TEXT[size]["hidden_size"]
    return seeing_config(
        size, {"model_type": "qwen2_vl", "embed_dim": width, "hidden_size": hidden_size, "mlp_ratio": 4}
    )


def qwen2_5_vl(size: str) -> dict[str, Any]:
    depth, width, _ = VISION[size]
    published = depth == 32
    vision = {
        "model_type": "qwen2_5_vl",
        "hidden_size": width,
        "out_hidden_size": TEXT[size]["hidden_size"],
        "intermediate_size": 3420 if published else width * 3,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31] if published else [depth - 1],
        "tokens_per_second": 2,
        "hidden_act": "silu",
    }
    return seeing_config(size, vision)


def qwen3(size: str) -> dict[str, Any]:
    """Heads are wider than their share of the hidden size, as in the published 0.6B and 4B."""
    head_dim = 2 * TEXT[size]["hidden_size"] // TEXT[size]["num_attention_heads"]
    return text_config(size) | {"head_dim": min(head_dim, 128), "attention_bias": False}


def qwen3_moe(size: str) -> dict[str, Any]:
    """The first layer of the small sizes has an MLP, and twice the channels of an expert are not the hidden size."""
    return qwen3(size) | mixture(size) | {"norm_topk_prob": True, "mlp_only_layers": [0]}


def mixture(size: str) -> dict[str, Any]:
    """What is written about experts."""
    if size == "30b":
        return {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1}
    if size == "35b":
        return {"num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512}
    if size == "80b":
        return {"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512, "decoder_sparse_step": 1}
    return {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96, "decoder_sparse_step": 1}


def qwen3_vl(size: str) -> dict[str, Any]:
    """Text values in `text_config`, as published. The small sizes have a table of 8 x 8 positions, which fits
    no grid."""
    depth, width, heads = (24, 1024, 16) if size == "2b" else VISION[size]
    text = qwen3(size) | {
        "model_type": "qwen3_vl_text",
        "num_hidden_layers": max(TEXT[size]["num_hidden_layers"], 4),
        **(QWEN3_2B if size == "2b" else {}),
        "rope_theta": 5000000.0,
        "max_position_embeddings": 262144,
    }
    section = {32: [8, 4, 4], 64: [12, 10, 10], 128: [24, 20, 20]}[text["head_dim"]]
    text["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": section, "rope_type": "default"}
    for key in ("sliding_window", "use_sliding_window", "max_window_layers"):
        del text[key]
    vision = {
        "model_type": "qwen3_vl",
        "depth": depth,
        "hidden_size": width,
        "num_heads": heads,
        "in_channels": 3,
        "intermediate_size": {1024: 4096, 1152: 4304}.get(width, width * 3),
        "out_hidden_size": text["hidden_size"],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304 if size in ("2b", "8b", "30b", "35b") else 64,
        "deepstack_visual_indexes": {24: [5, 11, 17], 27: [8, 16, 24]}.get(depth, [0, 1, 2]),
        "hidden_act": "gelu_pytorch_tanh",
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": text["tie_word_embeddings"],
        **placeholders(size),
    }


def qwen3_vl_moe(size: str) -> dict[str, Any]:
    config = qwen3_vl(size)
    text = config["text_config"] | mixture(size) | {"model_type": "qwen3_vl_moe_text"}
    return config | {"text_config": text, "vision_config": config["vision_config"] | {"model_type": "qwen3_vl_moe"}}


def qwen3_5(size: str) -> dict[str, Any]:
    """As Qwen3-VL without deepstack, but for the text model: a quarter of each head turns, and every fourth layer alone
    has keys and values. The small sizes have a head of their own: a tied one would repeat the last token for ever."""
    config = qwen3_vl(size)
    is_tied = size == "2b"
    text = config["text_config"] | {
        "model_type": "qwen3_5_text",
        "tie_word_embeddings": is_tied,
        "attn_output_gate": True,
        **delta_nets(size),
        **(QWEN3_5_2B if is_tied else {}),
    }
    section = {64: [4, 2, 2], 128: [6, 5, 5], 256: [11, 11, 10]}[text["head_dim"]]
    rope = {"mrope_interleaved": True, "mrope_section": section, "rope_type": "default", "rope_theta": 1e7}
    del text["rope_scaling"], text["rope_theta"]
    text["rope_parameters"] = rope | {"partial_rotary_factor": 0.25}
    vision = config["vision_config"] | {"model_type": "qwen3_5", "deepstack_visual_indexes": []}
    return config | {"text_config": text, "vision_config": vision, "tie_word_embeddings": is_tied}


def qwen3_5_moe(size: str) -> dict[str, Any]:
    """A shared expert is as large as the others; no layer has an MLP, whose size is not written."""
    config, experts = qwen3_5(size), mixture(size)
    text = config["text_config"] | experts | {"model_type": "qwen3_5_moe_text"}
    text["shared_expert_intermediate_size"] = experts["moe_intermediate_size"]
    text.pop("intermediate_size", None)
    return config | {"text_config": text, "vision_config": config["vision_config"] | {"model_type": "qwen3_5_moe"}}


def delta_nets(size: str) -> dict[str, Any]:
    """What is written about layers with states, and how wide the heads of the others are then."""
    published = size in ("2b", "35b", "80b")
    return {
        "full_attention_interval": 4,
        "linear_num_key_heads": 16 if published else 2,
        "linear_num_value_heads": {"2b": 16, "35b": 32, "80b": 32}.get(size, 4),
        "linear_key_head_dim": 128 if published else 16,
        "linear_value_head_dim": 128 if published else 24,
        "linear_conv_kernel_dim": 4,
        **({"head_dim": 256} if published else {}),
    }


def qwen3_next(size: str) -> dict[str, Any]:
    """As the text model of qwen3_5_moe, but for its positions; the first layer of the small sizes has an MLP."""
    text = qwen3_moe(size) | delta_nets(size)
    return text | {
        "num_hidden_layers": max(text["num_hidden_layers"], 4),
        "tie_word_embeddings": False,
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e7,
        "shared_expert_intermediate_size": text["moe_intermediate_size"],
        "mlp_only_layers": [] if size == "80b" else [0],
    }


def without_eyes(seeing: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """The text model of another recipe by itself."""
    return lambda size: seeing(size)["text_config"]


RECIPES: dict[str, tuple[str, Callable[[str], dict[str, Any]], str | None]] = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", qwen2_vl, "Qwen2VLProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", qwen2_5_vl, "Qwen2_5_VLProcessor"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", qwen3_vl, "Qwen3VLProcessor"),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", qwen3_5, "Qwen3VLProcessor"),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", qwen3_5_moe, "Qwen3VLProcessor"),
    "qwen2": ("Qwen2ForCausalLM", text_config, None),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", qwen3_vl_moe, "Qwen3VLProcessor"),
    "qwen3": ("Qwen3ForCausalLM", qwen3, None),
    "qwen3_moe": ("Qwen3MoeForCausalLM", qwen3_moe, None),
    "qwen3_next": ("Qwen3NextForCausalLM", qwen3_next, None),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", without_eyes(qwen3_5), None),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", without_eyes(qwen3_5_moe), None),
}
"""Architecture, `config.json` by size, processor; None for a text model."""


def generation_config(size: str) -> dict[str, Any]:
    ids = special_ids(size)
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "do_sample": True,
        "temperature": 0.01,
        "top_k": 1,
        "top_p": 0.001,
        "repetition_penalty": 1.0,
    }


def processor_configs(processor: str) -> dict[str, dict[str, Any]]:
    """The files that say how pictures and videos are cut."""
    if processor == "Qwen3VLProcessor":
        half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "processor_class": processor}
        cut = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
        image = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, **cut, **half}
        video = {"size": {"longest_edge": 25165824, "shortest_edge": 4096}, **cut, **half}
        return {
            "preprocessor_config.json": image | {"image_processor_type": "Qwen2VLImageProcessorFast"},
            "video_preprocessor_config.json": video | {"video_processor_type": "Qwen3VLVideoProcessor"},
        }
    settings = {
        "min_pixels": 4 * 28 * 28,
        "max_pixels": 16384 * 28 * 28,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": processor,
    }
    return {"preprocessor_config.json": settings}


def write_weights(out: Path, *, sees: bool, seed: int, dtype: str, randomise: bool) -> None:
    """Random weights of the model that `out/config.json` describes, under the published tensor names."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(seed)
    model = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    weights = model.from_config(AutoConfig.from_pretrained(out), dtype=getattr(torch, dtype)).state_dict()
    described = json.loads((out / "config.json").read_text())
    tied, arch, is_new = described["tie_word_embeddings"], described["model_type"], "text_config" in described
    tensors = {
        (name if is_new else first_name(name)): weight.contiguous()
        for name, weight in weights.items()
        if not (tied and name == "lm_head.weight")
    }
    for name, weight in tensors.items() if randomise else ():
        if weight.ndim == 1:
            weight += 0.1 * torch.randn_like(weight)
        if name.endswith(".A_log"):
            weight -= 4  # as they are, most states would forget their past within a token or two
    tensors = dict(pair for name, weight in tensors.items() for pair in published_experts(name, weight, arch))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    num_parameters = sum(weight.numel() for weight in tensors.values())
    print(f"{out}: {num_parameters / 1e9:.3f} B parameters, {len(tensors)} tensors")


def published_experts(name: str, weight: torch.Tensor, arch: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Experts lie in one tensor in `transformers`. Qwen3.5's are published so, Qwen3-VL's too, but transposed, Qwen3's
    one by one."""
    prefix, found, kind = name.partition(".experts.")
    if not found or arch.startswith("qwen3_5_moe"):
        yield name, weight
    elif arch == "qwen3_vl_moe":
        yield name, weight.transpose(1, 2).contiguous()
    else:
        for i, matrix in enumerate(weight):
            parts = {"gate_proj": 0, "up_proj": 1} if kind == "gate_up_proj" else {kind: 0}
            for part, half in parts.items():
                yield f"{prefix}.experts.{i}.{part}.weight", matrix.chunk(len(parts))[half].contiguous()


def first_name(name: str) -> str:
    """As tensors were called before `model.visual` and `model.language_model`."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="qwen2_vl", choices=list(RECIPES))
    parser.add_argument("--size", default="tiny", choices=list(TEXT))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    write_checkpoint(args.out, args.arch, args.size, seed=args.seed, dtype=args.dtype)


if __name__ == "__main__":
    main()
