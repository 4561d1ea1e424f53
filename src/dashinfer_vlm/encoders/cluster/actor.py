"""The encoder on another machine, as Ray runs it: `load` once, then `encode`; every argument and answer is `bytes`.

Ray imports this module before it knows whether there is a place for the actor; torch comes with `load`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from typing import TYPE_CHECKING

import msgspec

from dashinfer_vlm import envs
from dashinfer_vlm.config import EngineConfig

if TYPE_CHECKING:
    from dashinfer_vlm.models.base import VisionEncoder

logger = logging.getLogger(__name__)


class EncoderActor:
    """One ViT. Calls of `stay` and `place` run beside the others."""

    def __init__(self) -> None:
        self._encoder: VisionEncoder | None = None
        self._model_id = b""
        self._patch_dim = self._embedding_size = 0
        self._end = threading.Event()

    def place(self) -> str:
        """Where it is, for the log."""
        return f"process {os.getpid()} on {os.uname().nodename}"

    def stay(self) -> None:
        """Never returns; its failure tells the caller that the actor is gone."""
        self._end.wait()

    def load(self, config_json: bytes) -> bytes:
        """Load the ViT; an empty answer, or a packed fault. This machine's own folder and threads come first."""
        from dashinfer_vlm.encoders.cluster.wire import pack_fault

        try:
            self._load(_localised(msgspec.json.decode(config_json, type=EngineConfig)))
        except Exception as error:
            logger.exception("loading the vision encoder failed")
            return pack_fault(error)
        return b""

    def encode(self, job: bytes) -> bytes:
        """Packed embeddings for packed pictures, or a packed fault."""
        from dashinfer_vlm.encoders.cluster.wire import pack_embeddings, pack_fault, unpack_pictures
        from dashinfer_vlm.encoders.elsewhere.worker import encode_at_once
        from dashinfer_vlm.encoders.shared.embedding_bytes import EmbeddingBytes

        assert self._encoder is not None, "load() comes first"
        try:
            pictures = unpack_pictures(job, model_id=self._model_id, patch_dim=self._patch_dim)
            embeddings = encode_at_once(self._encoder, pictures.patches, pictures.grids)
            packing = EmbeddingBytes(self._model_id, self._embedding_size, pictures.dtype)
            return pack_embeddings(pictures.content_hashes, embeddings, packing)
        except Exception as error:
            logger.exception("a batch failed")
            return pack_fault(error)

    def _load(self, config: EngineConfig) -> None:
        from pathlib import Path

        from dashinfer_vlm.encoders.cluster.identity import weights_identity
        from dashinfer_vlm.encoders.elsewhere.worker import load_with_threads
        from dashinfer_vlm.models.config import read_config

        checkpoint = read_config(Path(config.model))
        self._model_id = weights_identity(config)
        self._encoder = load_with_threads(config)
        assert checkpoint.vision is not None, "a text model has no encoder to load"
        self._patch_dim, self._embedding_size = checkpoint.vision.patch_dim, checkpoint.embedding_size


def _localised(config: EngineConfig) -> EngineConfig:
    threads = config.vision_threads or envs.encoder_threads()
    model, lora = envs.encoder_model() or config.model, envs.encoder_lora() or config.lora
    return dataclasses.replace(config, model=model, lora=lora, threads=threads)
