"""Checkpoints with a head that guesses, as Qwen3.5 is published with one."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def with_draft_head(folder: Path, out: Path, seed: int = 0) -> Path:
    """A copy of a tiny checkpoint of Qwen3.5 with random `mtp.*` tensors."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    layer = next(name.rpartition("self_attn.")[0] for name in tensors if ".self_attn." in name)
    random = torch.Generator().manual_seed(seed)
    hidden, kind = len(tensors[f"{layer}input_layernorm.weight"]), tensors[f"{layer}input_layernorm.weight"].dtype
    shapes: dict[str, tuple[int, ...]] = {
        name.replace(layer, "mtp.layers.0."): tuple(x.shape) for name, x in tensors.items() if name.startswith(layer)
    }
    shapes |= {f"mtp.{name}.weight": (hidden,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    shapes["mtp.fc.weight"] = (hidden, 2 * hidden)
    head = {name: (0.1 * torch.randn(*shape, generator=random)).to(kind) for name, shape in shapes.items()}
    save_file(tensors | head, out / "model.safetensors", metadata={"format": "pt"})
    return out
