"""What the engine needs of a model, and what a model is told about a step. No model is defined here.

A step's state (positions, block tables, lengths) is an argument of `forward`, never a global, so that a model holds
nothing but weights and two sequences can never see each other's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dashinfer_vlm.layers.ranks import Ranks
from dashinfer_vlm.models.config import DeltaNetConfig
from dashinfer_vlm.request import Grid, Item


@dataclass(frozen=True, slots=True, kw_only=True)
class TextShape:
    """The sizes of the text model that the engine plans with."""

    vocab_size: int
    hidden_size: int
    num_kv_layers: int
    """Layers that keep keys and values."""
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    delta_net: DeltaNetConfig | None = None
    """The other layers, which keep a state per sequence; None: there are none."""
    has_head: bool = True
    """Without one it gives vectors and no logits."""

    @property
    def state_bytes(self) -> int:
        """Of one sequence; 0 where there are no such layers."""
        return self.delta_net.state_bytes if self.delta_net else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRows:
    """Embeddings that overwrite the word embeddings of rows `start .. start + len(rows)` of the step."""

    start: int
    rows: torch.Tensor
    """[n, `Model.embedding_size`], on the model's device."""


@dataclass(frozen=True, slots=True)
class StagedRows:
    """The same for every row of the step, where it must not matter which rows they are: a graph is captured once."""

    rows: torch.Tensor
    """[T, `Model.embedding_size`]; anything in rows of words, and 0 in columns that an item's embedding lacks."""
    is_item: torch.Tensor
    """bool [T]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """One model call: the tokens of all sequences of the step, packed.

    Sequence s owns rows `query_starts[s] .. query_starts[s + 1]`; they are the last tokens of its context of
    `context_lens[s]` tokens. Tensors are on the model's device. A runner that replays graphs pads: with rows at the end
    that no sequence owns, which are computed and not looked at, and with sequences of no rows and no context.
    """

    ids: torch.Tensor
    """int64 [T]; placeholder rows hold 0 (their embedding is overwritten), so every id is inside the vocabulary."""
    positions: torch.Tensor
    """int64 [3, T]: temporal, height and width axes of M-RoPE."""
    slots: torch.Tensor
    """int64 [T]: block * block_size + offset, where each token's K and V are written."""
    query_starts: torch.Tensor
    """int32 [S + 1]."""
    context_lens: torch.Tensor
    """int32 [S]."""
    block_tables: torch.Tensor
    """int32 [S, most blocks of any sequence]; surplus entries are 0 and never read."""
    logits_rows: torch.Tensor
    """int64 [L]: the rows whose logits are wanted."""
    embeddings: Sequence[EmbeddingRows] = ()
    staged: StagedRows | None = None
    """In place of `embeddings`."""
    seats: torch.Tensor | None = None
    """int64 [S]: where the states of each sequence lie. None, or not looked at, where the model has none."""


@dataclass(frozen=True, slots=True)
class KVCache:
    """Paged keys and values: per layer that has them `[num_blocks, block_size, num_kv_heads, head_dim]`; in int8, rows
    are longer (see `layers.attention.write_kv`). And what the other layers keep of a sequence, in its seat."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    states: tuple[torch.Tensor, ...] = ()
    """Of the layers without keys and values: float32 [layers, num_seats, *shape] for each of
    `DeltaNetConfig.state_shapes`. A sequence's first rows read nothing of it."""

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[1]

    @property
    def num_blocks(self) -> int:
        return self.keys[0].shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, *self.states))

    @property
    def num_seats(self) -> int | None:
        """For states; None: there are none."""
        return self.states[0].shape[1] if self.states else None

    def copy_state(self, source: int, target: int) -> None:
        """From seat to seat."""
        for state in self.states:
            state[:, target] = state[:, source]


class EncoderState(Protocol):
    """A packed batch on its way through the ViT. What it holds is known only to the encoder that began it, and it is
    handed back to no other."""

    @property
    def done(self) -> bool:
        """Whether only `finish` is left; true from the first `run` that found no more slices."""
        ...


class VisionEncoder(Protocol):
    """The ViT in three verbs, so that it can be handed out in slices between the steps of the LLM. How much a slice
    does is the encoder's own choice: little enough that a stream barely notices, enough to be efficient."""

    @property
    def bytes_per_patch(self) -> int:
        """Memory that one patch takes on its way through, at the most."""
        ...

    def begin(self, patches: Sequence[torch.Tensor], grids: Sequence[Grid]) -> EncoderState:
        """Pack uint8 [P_i, patch_dim] items of any sizes; all arithmetic is left to the slices."""
        ...

    def run(self, state: Any, num_slices: int) -> None:
        """Advance `state` by up to `num_slices` slices."""
        ...

    def finish(self, state: Any) -> list[torch.Tensor]:
        """Merge patches; one [tokens_i, `Model.embedding_size`] per item, after all slices have run."""
        ...


class Model(Protocol):
    """A text or vision-language model as the engine sees it."""

    text: TextShape
    embedding_size: int
    """Columns of an item's rows; families that feed several layers have more than the hidden size."""
    eos_token_ids: tuple[int, ...]
    device: torch.device
    kv_dtype: torch.dtype
    """Of the stored weights, and of the KV cache unless another one is asked for."""
    activation_dtype: torch.dtype
    """What it computes in, embeddings included."""
    ranks: Ranks
    """Who shares it: all of them must make the same calls."""

    @property
    def encoder(self) -> VisionEncoder | None:
        """None for a text model."""
        ...

    def forward(self, batch: StepBatch, kv: KVCache) -> torch.Tensor:
        """Run the text model over the step, write K and V at `batch.slots`; float32 logits [L, vocab]."""
        ...

    def forward_with_vectors(self, batch: StepBatch, kv: KVCache, num_logits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, but only the first `num_logits` of `batch.logits_rows` give logits. The others give their final
        states, normed: float32 [L - num_logits, hidden]; of a model that scores pairs the scores, [L - num_logits, 1].
        """
        ...

    def positions(self, num_tokens: int, items: Sequence[Item]) -> tuple[torch.Tensor, int]:
        """M-RoPE positions of a prompt: int64 [3, num_tokens], and the offset that turns the index of a generated
        token into its position (position = index + offset)."""
        ...


class GuessingModel(Model, Protocol):
    """One with a head of its own that guesses, whose keys and values are the cache's last layer."""

    def forward_with_states(
        self, batch: StepBatch, kv: KVCache, num_logits: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`forward_with_vectors`, and for `guess` the states of all rows: [T, hidden]."""
        ...

    def guess(self, batch: StepBatch, states: torch.Tensor, kv: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [L, vocab]: what follows the tokens of `batch.logits_rows`. The batch is that of `states` but for
        tokens and item rows, each of which is the one that follows. And [L, hidden], to guess on with: in place of the
        states of these tokens."""
        ...


def embedding_row_bytes(model: Model) -> int:
    """Bytes of one token's embedding."""
    return model.embedding_size * model.activation_dtype.itemsize
