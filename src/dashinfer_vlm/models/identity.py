"""Which weights made something: hashes that machines with the same weights agree on, wherever their folder lies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.settings import weight_type
from dashinfer_vlm.models.weights import Weights

__all__ = ["encoder_identity"]

_VERSION = 1
"""To be raised when the encoders compute something else from the same weights."""


def encoder_identity(config: EngineConfig, activation_dtype: torch.dtype) -> bytes:
    """32 bytes over the ViT's configuration, its tensors, who runs it and in which types.

    Reads every tensor of the ViT, about a second for a ViT of 1.3 GB. What is done to the pixels before is part of an
    item's content hash. Raises CheckpointError for a folder that cannot be used.
    """
    folder = Path(config.model)
    checkpoint = read_config(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vision_config")
    how = (config.vision_engine, config.vision_quant_type, weight_type(checkpoint, config), str(activation_dtype))
    digest = hashlib.sha256(json.dumps((_VERSION, checkpoint.architecture, how, settings), sort_keys=True).encode())
    digest.update(Weights.of(checkpoint, config).fingerprint("vision"))
    return digest.digest()
