"""From a checkpoint to something that the engine can install. Nothing is converted: the engine reads checkpoints."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allspark.generation_config import ASGenerationConfigBuilder
from allspark.runtime_config import AsModelConfig, AsModelRuntimeConfigBuilder, TargetDevice, write_manifest
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import CheckpointError, ConfigError, DashInferError
from dashinfer_vlm.hub import resolve_model
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.settings import DEFAULT_MAX_MODEL_LEN
from dashinfer_vlm.optional import require

__all__ = ["HuggingFaceModel", "ModelSerializerException"]

logger = logging.getLogger("allspark")

_DATA_TYPES = ("float32", "float16", "bfloat16")


class ModelSerializerException(DashInferError):  # noqa: N818 - the documented name
    """A checkpoint cannot be used."""


class HuggingFaceModel:
    """A checkpoint in the Hugging Face format, by folder or by id.

    load_model() -> serialize(...) -> create_reference_runtime_config_builder(...) -> Engine.install_model(...)
    """

    def __init__(
        self,
        pretrain_model_name_or_path: str,
        pretrain_model_name: str = "model",
        in_memory_serialize: bool = False,
        user_set_data_type: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """`pretrain_model_name` names the files that `serialize` writes; weights are stored as `user_set_data_type`
        (float32, float16 or bfloat16), bfloat16 when absent. Code of a checkpoint is never run, whatever
        `trust_remote_code` says. Raises ModelSerializerException for an unknown type."""
        if user_set_data_type not in (None, *_DATA_TYPES):
            raise ModelSerializerException(f"data type {user_set_data_type!r} is not one of {', '.join(_DATA_TYPES)}")
        if trust_remote_code:
            logger.warning("code of checkpoints is never run; trust_remote_code has no effect")
        self.data_type = user_set_data_type or "bfloat16"
        self.in_memory_serialize = in_memory_serialize
        self._source = str(pretrain_model_name_or_path)
        self._name = pretrain_model_name.replace("/", "_")
        self._folder: Path | None = None
        self._manifest: Path | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._tokenizer: Any = None

    def load_model(self) -> HuggingFaceModel:
        """Find the checkpoint, download it when it is an id, and check its configuration.

        Raises ModelSerializerException.
        """
        try:
            self._folder = resolve_model(EngineConfig(model=self._source))
            read_config(self._folder)
        except (CheckpointError, ConfigError) as error:
            raise ModelSerializerException(str(error)) from error
        return self

    def read_model_config(self) -> HuggingFaceModel:
        """Part of `load_model`; kept for the documented chain."""
        return self if self._folder else self.load_model()

    def serialize(
        self,
        engine: object,
        model_output_dir: str = "",
        enable_quant: bool = False,
        weight_only_quant: bool = False,
        customized_quant_config: Mapping[str, Any] | None = None,
        skip_if_exists: bool = False,
    ) -> HuggingFaceModel:
        """Write what `install_model` reads into `model_output_dir`, or keep it in memory, as the constructor says.

        Raises ModelSerializerException when a quantisation is asked for that the engine does not offer, or when a
        folder is missing.
        """
        if self.in_memory_serialize:
            return self.serialize_to_memory(engine, enable_quant, weight_only_quant, customized_quant_config)
        return self.serialize_to_path(
            engine, model_output_dir, enable_quant, weight_only_quant, skip_if_exists, customized_quant_config
        )

    def serialize_to_path(
        self,
        engine: object,
        model_output_dir: str,
        enable_quant: bool = False,
        weight_only_quant: bool = False,
        skip_if_exists: bool = False,
        customized_quant_config: Mapping[str, Any] | None = None,
    ) -> HuggingFaceModel:
        """Write `<name>.asgraph`. It is small and written at once, so that `skip_if_exists` saves nothing."""
        if not model_output_dir:
            raise ModelSerializerException("model_output_dir is empty; name a folder to write to")
        quant_type = _quant_type(customized_quant_config or {}, weight_only_quant) if enable_quant else "none"
        self._manifest = Path(model_output_dir) / f"{self._name}.asgraph"
        write_manifest(self._manifest, model=self._loaded(), data_type=self.data_type, quant_type=quant_type)
        return self

    def serialize_to_memory(
        self,
        engine: object,
        enable_quant: bool = False,
        weight_only_quant: bool = False,
        customized_quant_config: Mapping[str, Any] | None = None,
    ) -> HuggingFaceModel:
        """Like `serialize_to_path`, into a temporary folder."""
        self._temporary = tempfile.TemporaryDirectory(prefix="allspark-")
        return self.serialize_to_path(
            engine, self._temporary.name, enable_quant, weight_only_quant, False, customized_quant_config
        )

    def free_model(self) -> HuggingFaceModel:
        """Kept for the documented chain: no weights are held here."""
        return self

    def free_memory_serialize_file(self) -> HuggingFaceModel:
        """Remove what `serialize_to_memory` made; an installed model does not need it any more."""
        if self._temporary:
            self._temporary.cleanup()
            self._temporary = None
        return self

    def init_tokenizer(self, padding_side: str = "left") -> HuggingFaceModel:
        """Load the tokenizer, once."""
        if self._tokenizer is None:
            library = require("transformers", "transformers", "the tokenizer of a HuggingFaceModel")
            self._tokenizer = library.AutoTokenizer.from_pretrained(self._loaded(), padding_side=padding_side)
        return self

    def get_tokenizer(self) -> Any:
        """The `transformers` tokenizer."""
        return self.init_tokenizer()._tokenizer

    def get_model_config(self) -> dict[str, Any]:
        """The checkpoint's `config.json`."""
        config: dict[str, Any] = json.loads((self._loaded() / "config.json").read_bytes())
        return config

    def get_model_context_length(self) -> int:
        """Tokens that the model was made for; prompt and output together."""
        return read_config(self._loaded()).text.max_position_embeddings

    def create_reference_runtime_config_builder(
        self,
        engine_model_name: str,
        device_type: TargetDevice | str,
        device_ids: Sequence[int],
        max_batch: int,
        max_context_length: int = -1,
    ) -> AsModelRuntimeConfigBuilder:
        """A builder with model, device, batch and length filled in; the length is the model's, 32000 at most, or
        `max_context_length`. Raises ModelSerializerException before `serialize`."""
        if self._manifest is None:
            raise ModelSerializerException("call serialize() first")
        if max_context_length == -1:
            max_context_length = min(self.get_model_context_length(), DEFAULT_MAX_MODEL_LEN)
        return (
            AsModelRuntimeConfigBuilder()
            .model_name(engine_model_name)
            .model_dir(str(self._manifest.parent), self._name)
            .compute_unit(device_type, device_ids)
            .max_length(max_context_length)
            .max_batch(max_batch)
        )

    def create_reference_generation_config_builder(
        self, runtime_config: AsModelConfig | None = None
    ) -> ASGenerationConfigBuilder:
        """A builder with what `generation_config.json` recommends, and the length limit of `runtime_config`."""
        path = self._loaded() / "generation_config.json"
        builder = ASGenerationConfigBuilder(json.loads(path.read_bytes()) if path.is_file() else None)
        if runtime_config and runtime_config.engine_max_length:
            builder.max_length(min(self.get_model_context_length(), runtime_config.engine_max_length))
        return builder

    def _loaded(self) -> Path:
        if self._folder is None:
            raise ModelSerializerException("call load_model() first")
        return self._folder


def _quant_type(config: Mapping[str, Any], weight_only: bool) -> str:
    """The name of the flag `--quant-type` for the documented quantisation settings."""
    if config.get("quant_method") == "gptq" or not config:
        return "gptq_weight_only" if weight_only else "gptq"
    names = {("int8", True): "a16w8", ("uint4", True): "a16w4", ("int8", False): "a8w8", ("fp8_e4m3", False): "fp8"}
    chosen = (config.get("weight_format"), weight_only)
    if config.get("quant_method") != "instant_quant" or chosen not in names:
        raise ModelSerializerException(f"quantisation {dict(config)!r} with weight_only_quant={weight_only} is unknown")
    return names[chosen]
