"""From a folder to a model that is ready to run."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import CheckpointError, ConfigError, DashInferError
from dashinfer_vlm.kernels.threads import leave_torch_one_thread
from dashinfer_vlm.layers.activation import Epilogue
from dashinfer_vlm.layers.attention import cache_row_size
from dashinfer_vlm.layers.backend import Backend, choose_backend
from dashinfer_vlm.layers.linear import Linear, Matrix, TorchLinear
from dashinfer_vlm.layers.memory import huge_zeros
from dashinfer_vlm.layers.ops import REFERENCE
from dashinfer_vlm.layers.ranks import ALONE, Ranks
from dashinfer_vlm.models.base import KVCache, Model, VisionEncoder
from dashinfer_vlm.models.config import CheckpointConfig, read_config
from dashinfer_vlm.models.hf_tower import TransformersVision
from dashinfer_vlm.models.model import LoadedModel
from dashinfer_vlm.models.quant_cache import open_store
from dashinfer_vlm.models.settings import (
    check_drafts,
    check_settings,
    refuse_drafts,
    refuse_vision_options,
)
from dashinfer_vlm.models.weights import Progress, Weights

__all__ = ["allocate_kv", "check_checkpoint", "device_of", "load_encoder", "load_model", "quantise"]


def load_model(config: EngineConfig, *, progress: Progress | None = None, ranks: Ranks = ALONE) -> LoadedModel:
    """Load the checkpoint in the folder `config.model` onto `config.device`, its weights as `config.dtype`.

    Quantised weights come from the cache if a former start left them there, and else are left there for the next.
    `progress` is called with bytes done and bytes in total. Of a text model that several `ranks` share, this one's part
    is loaded, onto the card of its number. Raises CheckpointError when the folder cannot be used and ConfigError when
    the device is not there.
    """
    checkpoint = read_config(Path(config.model))
    device = device_of(config, ranks)
    _stay_on(device)
    refuse_drafts(config, device.type, ranks.count)
    weights = Weights.of(checkpoint, config, progress=progress)
    dtype = weights.dtype
    with ExitStack() as stores:  # none of them keeps anything of a checkpoint that turns out to be wrong
        if checkpoint.vision is None:
            refuse_vision_options(checkpoint, config)
            encoder, is_native = None, True
        else:
            store = stores.enter_context(open_store(config, weights, "vision", dtype, device))
            vision = choose_backend(device, dtype, config.vision_quant_type, store)
            encoder, is_native = _load_vision(config, checkpoint, weights, vision)
        store = stores.enter_context(open_store(config, weights, "text", dtype, device)) if ranks.count == 1 else None
        backend = choose_backend(device, dtype, config.quant_type, store, ranks)
        decoder = checkpoint.family.decoder(checkpoint, weights, backend)
        weights.finish()
    check_drafts(checkpoint, config, has_head=decoder.draft_head is not None)
    if backend.is_native and is_native:
        leave_torch_one_thread()
    return LoadedModel(checkpoint, decoder, encoder, backend)


def check_checkpoint(config: EngineConfig) -> None:
    """Raise what a server has to say of the checkpoint and of its settings on whatever machine: missing tensors, other
    shapes, what the model cannot have. Of large weights only headers are read."""
    checkpoint = read_config(Path(config.model))
    check_settings(checkpoint, config)
    weights = Weights.of(checkpoint, config)
    nowhere = torch.device("meta")

    def layer(weight: Matrix, bias: torch.Tensor | None, epilogue: Epilogue) -> Linear:
        return TorchLinear(torch.empty(weight.num_rows, weight.depth, device=nowhere), bias, epilogue)

    backend = Backend("nothing", nowhere, torch.bfloat16, torch.bfloat16, REFERENCE, layer)
    if checkpoint.vision is not None:
        checkpoint.family.encoder(checkpoint.vision, weights, backend)
    decoder = checkpoint.family.decoder(checkpoint, weights, backend)
    weights.finish()
    check_drafts(checkpoint, config, has_head=decoder.draft_head is not None)


def load_encoder(config: EngineConfig, *, progress: Progress | None = None) -> VisionEncoder:
    """Load the ViT alone, onto `config.vision_device` or else `config.device`; raises as `load_model` does."""
    checkpoint = read_config(Path(config.model))
    if checkpoint.vision is None:
        raise CheckpointError(f"{checkpoint.folder} is a text model ({checkpoint.architecture}); it has no encoder")
    device = _device(config.vision_device or config.device, "--vision-device")
    _stay_on(device)
    weights = Weights.of(checkpoint, config, progress=progress)
    with open_store(config, weights, "vision", weights.dtype, device) as store:
        backend = choose_backend(device, weights.dtype, config.vision_quant_type, store)
        encoder, is_native = _load_vision(config, checkpoint, weights, backend)
    if is_native:
        leave_torch_one_thread()
    return encoder


def quantise(config: EngineConfig, *, progress: Progress | None = None) -> list[Path]:
    """Have the quantised weights that `config` asks for in the cache, and say in which files; raises as `load_model`
    does, and DashInferError when they could not be kept."""
    check_checkpoint(config)
    if config.quant_type != "none":
        load_model(config, progress=progress)
    else:
        load_encoder(config, progress=progress)
    checkpoint = read_config(Path(config.model))
    weights = Weights.of(checkpoint, config)
    kept = []
    for part in checkpoint.family.names.parts:
        with open_store(config, weights, part, weights.dtype, device_of(config, ALONE)) as store:
            if store is not None and not store.found:
                raise DashInferError(f"{store.path} could not be kept; the log says why")
            kept += [store.path] if store is not None else []
    return kept


def _load_vision(
    config: EngineConfig, checkpoint: CheckpointConfig, weights: Weights, backend: Backend
) -> tuple[VisionEncoder, bool]:
    """The ViT, and whether it has no use for torch's threads."""
    assert checkpoint.vision is not None
    if config.vision_engine == "transformers":
        return TransformersVision(checkpoint, weights, backend), False
    return checkpoint.family.encoder(checkpoint.vision, weights, backend), backend.is_native


def allocate_kv(
    model: Model, num_blocks: int, block_size: int, dtype: torch.dtype | None = None, *, num_seats: int = 1
) -> KVCache:
    """Zeroed KV cache of `dtype`, or else of the model's, on the model's device; CPU memory is in huge pages and taken
    when first written. `num_seats` are for the states of a model that has some."""
    dtype, text = dtype or model.kv_dtype, model.text
    row_size = cache_row_size(text.head_dim, dtype, model.device.type)
    shape = (num_blocks, block_size, text.num_kv_heads, row_size)
    zeros = huge_zeros if model.device.type == "cpu" else partial(_zeros_on, model.device)
    keys, values = ([zeros(shape, dtype) for _ in range(text.num_kv_layers)] for _ in range(2))
    if text.delta_net is None:
        return KVCache(keys, values)
    sizes = (len(text.delta_net.layers), num_seats)
    states = tuple(zeros((*sizes, *shape), torch.float32) for shape in text.delta_net.state_shapes)
    return KVCache(keys, values, states)


def _zeros_on(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def device_of(config: EngineConfig, ranks: Ranks) -> torch.device:
    """Of one of the ranks; raises ConfigError when it, or the device of another one, is not there."""
    device = _device(config.device)
    if ranks.count == 1 or device.type != "cuda":
        return device
    if ranks.count > torch.cuda.device_count():
        raise ConfigError(f"--parallel-size is {ranks.count}; torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", ranks.index)


def _stay_on(device: torch.device) -> None:
    """Events and streams are those of the current device."""
    if device.index is not None:
        torch.cuda.set_device(device)


def _device(name: str, flag: str = "--device") -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{flag} {name}: torch sees no CUDA device; start with {flag} cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{flag} {name}: torch sees {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device
