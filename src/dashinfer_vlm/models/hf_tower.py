"""`--vision-engine transformers`: the ViT of the `transformers` library behind our verbs, to check ours against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.models.base import EncoderState
from dashinfer_vlm.models.config import CheckpointConfig
from dashinfer_vlm.models.family import TransformersTower
from dashinfer_vlm.models.weights import Weights
from dashinfer_vlm.optional import require
from dashinfer_vlm.request import Grid

__all__ = ["TransformersVision"]


@dataclass(slots=True)
class _State:
    pixels: torch.Tensor
    """[P, patch_dim], normalised."""
    grids: list[Grid]
    done: bool = False


class TransformersVision:
    """Takes every `visual.*` tensor. All work happens in `finish`, so it cannot be sliced."""

    def __init__(self, config: CheckpointConfig, weights: Weights, backend: Backend) -> None:
        tower = config.family.tower
        if tower is None:
            raise CheckpointError(f"--vision-engine transformers does not know {config.architecture}; use native")
        assert config.vision is not None, "a text model has no tower"
        self.folder, self.vision = config.folder, config.vision
        self.device, self.dtype = backend.device, backend.activation_dtype
        self.tower = self._load(tower, weights)

    @property
    def bytes_per_patch(self) -> int:
        """Hidden states, heads twice, attention and an MLP's rows: nothing is done in slices."""
        num_rows = 20
        return num_rows * int(self.tower.patch_embed.embed_dim) * self.dtype.itemsize

    def begin(self, patches: Sequence[torch.Tensor], grids: Sequence[Grid]) -> _State:
        """Normalise uint8 [P_i, patch_dim] items."""
        processor = self.vision.processor
        mean, std = (torch.tensor(x)[:, None] for x in (processor.image_mean, processor.image_std))
        packed = torch.cat([item.cpu() for item in patches])
        channels = packed.view(len(packed), self.vision.in_channels, -1)
        pixels = (channels * processor.rescale_factor - mean) / std
        return _State(pixels.flatten(1).to(self.device, self.dtype), list(grids))

    def run(self, state: EncoderState, num_slices: int) -> None:
        """Nothing to do before `finish`."""
        assert isinstance(state, _State)
        state.done = True

    def finish(self, state: EncoderState) -> list[torch.Tensor]:
        """Run the tower; one [tokens_i, hidden] per item."""
        assert isinstance(state, _State)
        grids = torch.tensor(state.grids, device=self.device)
        with torch.no_grad():
            output = self.tower(state.pixels, grid_thw=grids)
        merged: torch.Tensor = getattr(output, "pooler_output", output)  # versions before 5 return the tensor itself
        merged = torch.cat((merged, *getattr(output, "deepstack_features", ())), dim=1)
        num_tokens = (grids.prod(dim=1) // self.vision.merge_size**2).tolist()
        return list(torch.split(merged, num_tokens))

    def _load(self, known: TransformersTower, weights: Weights) -> Any:
        library = require("transformers", "transformers", "--vision-engine transformers")
        tower_class = getattr(import_module(f"transformers.models.{known.module}"), known.name)
        settings = library.AutoConfig.from_pretrained(self.folder).vision_config
        settings._attn_implementation = "sdpa"
        tower = tower_class(settings)
        for name, parameter in tower.named_parameters():
            parameter.data = weights.take(f"visual.{name}", *parameter.shape).to(self.device, self.dtype, copy=True)
        return tower.to(self.device).eval()
