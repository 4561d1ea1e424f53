"""What is known of an engine once its model is loaded."""

from __future__ import annotations

import msgspec

__all__ = ["EngineInfo"]


class EngineInfo(msgspec.Struct, frozen=True):
    """What is known of an engine once its model is loaded; constant for its life."""

    model: str
    """Folder, or id, that the weights came from."""
    max_model_len: int
    """Prompt plus output tokens of a request at most."""
    vocab_size: int
    hidden_size: int
    embedding_size: int
    """Columns of one row that the vision encoder makes."""
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    """Of the stored weights, where they are not quantised."""
    kv_dtype: str
    block_size: int
    """Tokens in one block of the KV cache."""
    num_blocks: int
    max_num_seqs: int
    max_item_patches: int
    """Patches of one image or video that the encoder has memory for; 0 for a text model."""
    lora: str | None = None
    """Folder of the adapter that is merged into the weights."""
    quant_type: str = "none"
    """How the text model's weights are quantised, as `--quant-type` says it."""
    vision_quant_type: str = "none"
    state_bytes: int = 0
    """Of one request, in layers that keep a state in place of keys and values."""
    num_states: int = 0
    """That there is memory for: of requests that run, and saved for others that begin alike."""

    @property
    def precision(self) -> str:
        """What the weights are stored as, for a line that people read."""
        parts = (("", self.quant_type), ("vision ", self.vision_quant_type))
        quantised = [name + quant_type for name, quant_type in parts if quant_type != "none"]
        return " with ".join([self.dtype, " and ".join(quantised)] if quantised else [self.dtype])
