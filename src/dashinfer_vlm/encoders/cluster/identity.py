"""Whether two machines have the same vision encoder, though one may compute it in another type."""

from __future__ import annotations

import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.models.identity import encoder_identity

__all__ = ["weights_identity"]


def weights_identity(config: EngineConfig) -> bytes:
    """32 bytes over the ViT's configuration and tensors. The types may differ, since the engine says which it wants."""
    return encoder_identity(config, torch.float32)
