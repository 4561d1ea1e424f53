"""Random checkpoints as rerankers are published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

YES, NO = 311, 3210


def publish(source: Path, folder: Path, *, named: str = "1_LogitScore", **config: Any) -> Path:
    """A copy of `source` with sentence-transformers' files, and `config` over its own. `named` is where `modules.json`
    says that the score's tokens are told."""
    shutil.copytree(source, folder)
    rows = [("sentence_transformers.base.modules.transformer.Transformer", "")]
    rows.append(("sentence_transformers.cross_encoder.modules.logit_score.LogitScore", named))
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(rows)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_LogitScore").mkdir()
    tokens = {"true_token_id": YES, "false_token_id": NO}
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps(tokens))
    return configure(folder, **config)


def configure(folder: Path, **config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def untie(folder: Path) -> Path:
    """With a head of its own."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    (table,) = (tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = torch.randn(table.shape, generator=torch.Generator().manual_seed(1)).to(table) / 4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return configure(folder, tie_word_embeddings=False)


def classify(folder: Path) -> Path:
    """With one row in place of the head, as `sentence-transformers` converts it."""
    tensors = load_file(folder / "model.safetensors")
    table = tensors.pop("lm_head.weight", tensors["model.embed_tokens.weight"])
    tensors["score.weight"] = (table[YES] - table[NO])[None].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder / "1_LogitScore")
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.base.models.Transformer"}]')
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": 0}
    return configure(folder, architectures=["Qwen3ForSequenceClassification"], **labels)
