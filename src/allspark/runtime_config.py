"""How a model is run: device, lengths, batch, caches."""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allspark.status import AsStatus, RefusalError, wrong
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError

__all__ = ["AsCacheMode", "AsModelConfig", "AsModelRuntimeConfigBuilder", "TargetDevice"]

_SPAN_SIZES = (16, 32, 64, 128)
_LARGEST_TTL_S = 2**31 - 1


class TargetDevice(enum.Enum):
    """Where a model computes."""

    CUDA = "CUDA"
    CPU = "CPU"
    CPU_NUMA = "CPU_NUMA"
    """One process over the memory of all nodes, like CPU."""


class AsCacheMode(enum.Enum):
    """How keys and values are stored."""

    AsCacheDefault = 0
    """In the type of the weights."""
    AsCacheQuantI8 = 1
    """In 8 bits, with one scale per token and head: almost twice the tokens in the same memory."""
    AsCacheQuantU4 = 2
    """Not offered."""


@dataclass(kw_only=True)
class AsModelConfig:
    """What `Engine.install_model` takes. Values are checked there, not here."""

    model_name: str = ""
    """Name of the model in the engine."""
    model_path: str = ""
    """What `HuggingFaceModel.serialize` wrote (`.asgraph`), or a checkpoint's folder."""
    weights_path: str = ""
    """Named next to `model_path` by the builders; the weights themselves stay in the checkpoint's folder."""
    compute_unit: str = "CUDA:0"
    """`CPU:0`, `CUDA:0`, `CUDA:0,1`."""
    engine_max_length: int = 0
    """Prompt plus output tokens of a request at most; 0 takes the model's context, 32000 at most."""
    engine_max_batch: int = 0
    """Requests that run at once; 0 is 128."""
    engine_max_prefill_length: int = 0
    """Tokens of one step at most; 0 is 512."""
    num_threads: int = 0
    """Compute threads on the CPU; 0 is one per core."""
    cache_span_size: int = 32
    """Tokens in one block of the KV cache: 16, 32, 64 or 128."""
    enable_prefix_cache: bool = True
    prefix_cache_ttl: int = 300
    """Seconds. Cached prefixes are kept until their blocks are needed, oldest first, so that none expires early."""
    cache_mode: AsCacheMode = AsCacheMode.AsCacheDefault


class AsModelRuntimeConfigBuilder:
    """Builds an AsModelConfig, call by call; every setter returns the builder."""

    def __init__(self) -> None:
        self._config = AsModelConfig()

    def model_name(self, model_name: str) -> AsModelRuntimeConfigBuilder:
        """Name of the model in the engine."""
        return self._set(model_name=model_name)

    def model_dir(self, model_dir: str, file_name_prefix: str) -> AsModelRuntimeConfigBuilder:
        """Folder and file prefix that `HuggingFaceModel.serialize` wrote to."""
        stem = os.path.join(model_dir, file_name_prefix)
        return self._set(model_path=f"{stem}.asgraph", weights_path=f"{stem}.asparam")

    def model_file_path(self, model_file_name: str, weight_file_path: str) -> AsModelRuntimeConfigBuilder:
        """Both files by name."""
        return self._set(model_path=model_file_name, weights_path=weight_file_path)

    def compute_unit(
        self,
        target_device: TargetDevice | str,
        device_id_array: Sequence[int] | None = None,
        compute_thread_in_device: int = 0,
    ) -> AsModelRuntimeConfigBuilder:
        """Device, its ids (cards; ignored on a CPU), and CPU threads, where 0 is one per core."""
        name = target_device.name if isinstance(target_device, TargetDevice) else str(target_device).upper()
        ids = ",".join(str(i) for i in device_id_array or [0])
        return self._set(compute_unit=f"{name}:{ids}", num_threads=compute_thread_in_device)

    def set_compute_unit_from_str(self, compute_unit: str) -> AsModelRuntimeConfigBuilder:
        """`CPU:0`, `CUDA:0`, `CUDA:0,1`."""
        return self._set(compute_unit=compute_unit)

    def max_length(self, length: int) -> AsModelRuntimeConfigBuilder:
        """Prompt plus output tokens of a request at most."""
        return self._set(engine_max_length=length)

    def max_batch(self, batch: int) -> AsModelRuntimeConfigBuilder:
        """Requests that run at once."""
        return self._set(engine_max_batch=batch)

    def max_prefill_length(self, length: int) -> AsModelRuntimeConfigBuilder:
        """Tokens of one step at most; longer prompts are computed over several steps."""
        return self._set(engine_max_prefill_length=length)

    def prefill_cache(self, enable: bool = True) -> AsModelRuntimeConfigBuilder:
        """Whether equal beginnings of prompts are computed once."""
        return self._set(enable_prefix_cache=enable)

    def prefix_cache_ttl(self, ttl: int = 300) -> AsModelRuntimeConfigBuilder:
        """Seconds; see AsModelConfig."""
        return self._set(prefix_cache_ttl=ttl)

    def kv_cache_mode(self, cache_mode: AsCacheMode) -> AsModelRuntimeConfigBuilder:
        """How keys and values are stored."""
        return self._set(cache_mode=cache_mode)

    def kv_cache_span_size(self, span_size: int) -> AsModelRuntimeConfigBuilder:
        """Tokens in one block of the KV cache: 16, 32, 64 or 128."""
        return self._set(cache_span_size=span_size)

    def from_dict(self, fields: Mapping[str, Any]) -> AsModelRuntimeConfigBuilder:
        """Set everything from a mapping; needs `model_name` and `compute_unit` with `device_type` and `device_ids`.

        Raises KeyError for a missing or an unknown field.
        """
        unit = fields["compute_unit"]
        self.model_name(fields["model_name"])
        self.compute_unit(unit["device_type"], unit["device_ids"], unit.get("compute_thread_in_device", 0))
        return self.update_from_dict({k: v for k, v in fields.items() if k not in ("model_name", "compute_unit")})

    def update_from_dict(self, fields: Mapping[str, Any]) -> AsModelRuntimeConfigBuilder:
        """Set some fields: engine_max_length, engine_max_batch, engine_max_prefill_length, enable_prefix_cache,
        prefix_cache_ttl, kv_cache_mode (by name), kv_cache_span_size. Raises KeyError for any other."""
        setters: dict[str, Callable[[Any], Any]] = {
            "engine_max_length": self.max_length,
            "engine_max_batch": self.max_batch,
            "engine_max_prefill_length": self.max_prefill_length,
            "enable_prefix_cache": self.prefill_cache,
            "prefix_cache_ttl": self.prefix_cache_ttl,
            "kv_cache_mode": lambda mode: self.kv_cache_mode(AsCacheMode[mode] if isinstance(mode, str) else mode),
            "kv_cache_span_size": self.kv_cache_span_size,
        }
        for name, value in fields.items():
            if name not in setters:
                raise KeyError(f"unknown field {name!r}; known are {', '.join(setters)}")
            setters[name](value)
        return self

    def build(self) -> AsModelConfig:
        """The configuration; the builder can go on and build another one."""
        return replace(self._config)

    def _set(self, **fields: Any) -> AsModelRuntimeConfigBuilder:
        self._config = replace(self._config, **fields)
        return self


def engine_config(config: AsModelConfig) -> EngineConfig:
    """The engine's own configuration; raises RefusalError for the first value that cannot be."""
    _check_types(config)
    if config.cache_span_size not in _SPAN_SIZES:
        raise wrong(f"kv_cache_span_size is {config.cache_span_size}; it must be one of {_SPAN_SIZES}")
    if config.cache_mode is AsCacheMode.AsCacheQuantU4:
        raise wrong("kv_cache_mode AsCacheQuantU4 is not offered yet; use AsCacheQuantI8 or AsCacheDefault")
    if not 0 < config.prefix_cache_ttl <= _LARGEST_TTL_S:
        raise wrong(f"prefix_cache_ttl is {config.prefix_cache_ttl}; it must be a positive number of seconds")
    device, ids = _compute_unit(config.compute_unit)
    manifest = _read_manifest(config.model_path)
    try:
        result = EngineConfig(
            model=manifest["model"],
            dtype=manifest["data_type"],
            quant_type=manifest["quant_type"],
            device=device,  # type: ignore[arg-type]
            parallel_size=len(ids) if device == "cuda" else 1,
            max_model_len=config.engine_max_length or None,
            max_num_seqs=config.engine_max_batch or 128,
            max_num_batched_tokens=config.engine_max_prefill_length or None,
            threads=config.num_threads or None,
            block_size=config.cache_span_size,
            kv_cache_dtype="int8" if config.cache_mode is AsCacheMode.AsCacheQuantI8 else "auto",
            prefix_cache=config.enable_prefix_cache,
        )
        result.validate()
    except ConfigError as error:
        raise wrong(str(error)) from error
    return result


def write_manifest(path: Path, *, model: Path, data_type: str, quant_type: str) -> None:
    """What stands for a converted model: where the checkpoint is and how it is to be loaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {"format": _FORMAT, "model": str(model), "data_type": data_type, "quant_type": quant_type}
    path.write_text(json.dumps(fields))


_FORMAT = "dashinfer-vlm 1"


def _read_manifest(model_path: str) -> dict[str, Any]:
    path = Path(model_path)
    if not model_path:
        raise wrong("the configuration names no model; set model_dir to what HuggingFaceModel.serialize wrote")
    if path.is_dir():
        return {"model": model_path, "data_type": "bfloat16", "quant_type": "none"}
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
    except OSError as error:
        raise RefusalError(AsStatus.ALLSPARK_IO_ERROR, f"{model_path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise wrong(f"{model_path} was not written by HuggingFaceModel.serialize") from error
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise wrong(f"{model_path} was not written by this version of HuggingFaceModel.serialize")
    return fields


def _check_types(config: AsModelConfig) -> None:
    kinds: tuple[tuple[str, type], ...] = (
        ("model_name", str),
        ("model_path", str),
        ("compute_unit", str),
        ("engine_max_length", int),
        ("engine_max_batch", int),
        ("engine_max_prefill_length", int),
        ("num_threads", int),
        ("cache_span_size", int),
        ("enable_prefix_cache", bool),
        ("prefix_cache_ttl", int),
        ("cache_mode", AsCacheMode),
    )
    for name, kind in kinds:
        value = getattr(config, name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise wrong(f"{name} is {value!r}; it must be {kind.__name__}")
        if isinstance(value, int) and value < 0:
            raise wrong(f"{name} is {value}; it must not be negative")


def _compute_unit(text: str) -> tuple[str, list[str]]:
    name, _, ids = text.partition(":")
    devices = {"CUDA": "cuda", "CPU": "cpu", "CPU_NUMA": "cpu"}
    id_list = [i.strip() for i in ids.split(",")]
    if name not in devices or not all(i.isdigit() for i in id_list):
        raise wrong(f"compute_unit is {text!r}; it must be such as CPU:0, CUDA:0 or CUDA:0,1")
    if name == "CUDA" and len(id_list) == 1 and id_list != ["0"]:
        raise wrong(f"compute_unit is {text!r}; make that card the first one with CUDA_VISIBLE_DEVICES and use CUDA:0")
    return devices[name], id_list
