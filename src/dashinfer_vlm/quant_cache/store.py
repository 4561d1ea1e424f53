"""What a model in the making asks for packed weights: `layers.quantise.PackedStore` over a file."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType

import torch

from dashinfer_vlm import envs
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.cpu_ops import PackedShape, PackedWeight
from dashinfer_vlm.models.identity import Part, part_identity
from dashinfer_vlm.models.weights import Weights
from dashinfer_vlm.quant_cache.entry import Entry, UnusableError
from dashinfer_vlm.quant_cache.folder import QuantFolder

__all__ = ["QuantStore", "open_store"]

logger = logging.getLogger(__name__)

_GIB = 2**30


class QuantStore:
    """The packed weights of one part of one checkpoint; a context in which all of them are asked for. When that went
    well, what was not found is written at its end."""

    def __init__(self, folder: QuantFolder, name: str, identity: str) -> None:
        self._folder = folder
        self._name = name
        self._identity = identity
        self._entry: Entry | None = folder.open(name, identity)
        self._weights: dict[str, PackedWeight] = {}
        self._is_new = False

    @property
    def path(self) -> Path:
        return self._folder.path / self._name

    @property
    def found(self) -> bool:
        """Whether there is a file that can be read."""
        return self._entry is not None

    def __enter__(self) -> QuantStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._is_new and error is None:
            self._folder.write(self._name, self._identity, self._weights)
        self._weights.clear()  # the layers have them

    def find(self, name: str, shape: PackedShape) -> PackedWeight | None:
        """The weight `name` as the file has it. Once something is wrong with the file, nothing more is taken from it."""
        if self._entry is None:
            return None
        try:
            packed = self._entry.read(name, shape)
        except (UnusableError, OSError) as error:
            logger.warning("quantised weights in %s cannot be used: %s; quantising again", self.path, error)
            self._close()
            return None
        self._weights[name] = packed
        return packed

    def keep(self, name: str, packed: PackedWeight) -> None:
        """Have it written at the end."""
        self._weights[name] = packed
        self._is_new = True

    def _close(self) -> None:
        if self._entry is not None:
            self._entry.close()
            self._entry = None


def open_store(
    config: EngineConfig, weights: Weights, part: Part, dtype: torch.dtype
) -> QuantStore | nullcontext[None]:
    """The store for a part that `config` wants quantised; a context of None where it does not, or keeps nothing."""
    quant_type = config.quant_type if part == "text" else config.vision_quant_type
    if quant_type == "none" or not config.quant_cache_gib or not cpu_ops.available():
        return nullcontext()
    try:
        path = Path(config.quant_cache).expanduser() if config.quant_cache else envs.cache_folder() / "quantised"
    except RuntimeError as error:  # no home
        logger.warning("quantised weights are not kept: %s; name a folder with --quant-cache", error)
        return nullcontext()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--quant-cache {path} is no folder")
    folder = QuantFolder(path, int(config.quant_cache_gib * _GIB))
    source = folder.remembered(weights.paths, part, lambda: part_identity(weights, part))
    how = json.dumps([quant_type, str(dtype), cpu_ops.packing()])
    identity = hashlib.sha256(source + how.encode()).hexdigest()
    return QuantStore(folder, f"{part}-{quant_type}-{identity[:24]}.safetensors", identity)
