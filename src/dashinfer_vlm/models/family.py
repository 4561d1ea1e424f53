"""What tells one family of models from another: the interface that `families/` implements, one file each.

A family has no state and its module needs no torch, so that the HTTP process may ask it what a placeholder stands for;
the builders of encoder and decoder import the modules that they put together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.models.config import CheckpointConfig, MixtureConfig, TextConfig, VisionConfig, read_mixture
from dashinfer_vlm.models.mrope import mrope_positions
from dashinfer_vlm.models.published import Scoring
from dashinfer_vlm.models.section import Section
from dashinfer_vlm.processors.qwen import ProcessorConfig
from dashinfer_vlm.request import Item, ItemKind

if TYPE_CHECKING:  # they bring torch
    from dashinfer_vlm.layers.backend import Backend
    from dashinfer_vlm.models.base import VisionEncoder
    from dashinfer_vlm.models.decoder import Decoder
    from dashinfer_vlm.models.weights import Weights

__all__ = [
    "Expansion",
    "Family",
    "LoadedItem",
    "Names",
    "NormalisedExperts",
    "Part",
    "Run",
    "ScorePrompt",
    "TransformersTower",
    "VectorPrompt",
    "VisionFamily",
    "read_vision",
    "refuse_attention_bias",
]

Part = Literal["text", "vision"]
DRAFTS = "mtp."
"""Prefix of the tensors of a head that guesses the token after the next."""
"""Parts of a model that are loaded, quantised and identified each by itself."""


BoxUnit = Literal["pixels", "thousandths"]
"""What the numbers of `bbox_2d` in an answer count: pixels of the resized picture, or thousandths of its sides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """How the tensors of a checkpoint are called. Models ask for them by the names of their first publication."""

    parts: dict[Part, tuple[str, ...]]
    """Prefixes of the tensors of each part."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Prefixes of other exports, each with ours; the first that fits counts."""
    ignored: tuple[str, ...] = ()
    """Prefixes of tensors that no part of ours has a use for."""

    def with_drafts(self) -> Names:
        """With the head that guesses as a part of the text model."""
        ignored = tuple(prefix for prefix in self.ignored if prefix != DRAFTS)
        return replace(self, parts={**self.parts, "text": (*self.parts["text"], DRAFTS)}, ignored=ignored)

    def ours(self, name: str) -> str:
        """What the models call the tensor that a file calls `name`."""
        for theirs, ours in self.renamed:
            if name.startswith(theirs):
                return ours + name[len(theirs) :]
        return name


@dataclass(frozen=True, slots=True)
class TransformersTower:
    """The ViT of the `transformers` library, for `--vision-engine transformers`."""

    module: str
    """Below `transformers.models`."""
    name: str


@dataclass(frozen=True, slots=True)
class Run:
    """Placeholders for `num_tokens` rows of an item's embedding, from `first_row` on."""

    first_row: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Expansion:
    """What stands in the prompt instead of the placeholder that the chat template wrote."""

    pieces: tuple[int | Run, ...]
    """Tokens, and the runs that stand for all rows of the item in order."""
    lead: str = ""
    """Text in front of the pieces, which is encoded together with the text before it."""
    around: tuple[int, int] | None = None
    """Tokens to the left and right of the placeholder that are replaced with it, if they stand there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorPrompt:
    """How a family's models were trained to be asked for a vector: by a conversation whose answer is opened."""

    instruction: str = ""
    """The system turn, where the caller has none; empty: what the chat template says."""
    end: str = ""
    """The special token at the very end, where the tokenizer's own files name none; empty: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePrompt:
    """How a family's models were trained to be asked whether a document answers a query: what its publisher's script
    writes around the two in a user's turn, all of which begins with `<Instruct>: `."""

    instruction: str
    """Where the caller has none."""
    query: str
    """In front of the query."""
    document: str
    """In front of the document."""
    opening: str = ""
    """What the assistant's turn begins with."""


class LoadedItem(Protocol):
    """What the media room knows of an item."""

    @property
    def kind(self) -> ItemKind: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def timestamps(self) -> tuple[float, ...]:
        """Seconds from the start of a video, one per temporal step of the grid."""
        ...


class Family(ABC):
    """One family; without the overrides of `VisionFamily` a text model."""

    names = Names(
        parts={"text": ("model.", "lm_head.")},
        renamed=tuple((name, f"model.{name}") for name in ("embed_tokens.", "layers.", "norm.")),
    )
    tower: TransformersTower | None = None
    box_unit: BoxUnit = "pixels"
    vector_prompt: VectorPrompt | None = None
    """None: a vector is asked for by plain text."""
    score_prompt: ScorePrompt | None = None
    """None: nobody has said how a score is asked for."""
    scoring: Scoring | None = None
    """How its architecture makes scores, where it has that in place of a head."""

    @abstractmethod
    def text(self, section: Section, root: Section) -> TextConfig:
        """The text model's configuration, from `text_config` and the whole file, which may be the same; raises
        CheckpointError for what this family cannot do."""

    def mixture(self, section: Section) -> MixtureConfig | None:
        """Experts in place of MLPs, for `text`; None: there are none."""
        return None

    @abstractmethod
    def decoder(self, config: CheckpointConfig, weights: Weights, backend: Backend) -> Decoder:
        """The text model. Takes every tensor of the part `text`."""

    def vision(self, root: Section, text: TextConfig, folder: Path) -> VisionConfig | None:
        """The ViT's configuration, with the processor's settings, which `folder` holds in other files; None for a text
        model."""
        return None

    def encoder(self, config: VisionConfig, weights: Weights, backend: Backend) -> VisionEncoder:
        """The ViT. Takes every tensor of the part `vision`."""
        raise NotImplementedError(f"{type(self).__name__} has no encoder")

    def placeholder_ids(self, root: Section) -> dict[ItemKind, int]:
        """The token that stands for each kind of item that the model takes."""
        return {}

    def embedding_size(self, config: CheckpointConfig) -> int:
        """Columns of one row that the encoder makes."""
        return config.text.hidden_size

    def expand(self, config: CheckpointConfig, item: LoadedItem, encode: Callable[[str], list[int]]) -> Expansion:
        """What an item's placeholder expands to; `encode` turns plain text into ids."""
        return Expansion(pieces=(Run(0, item.num_tokens),))

    def positions(self, config: CheckpointConfig, num_tokens: int, items: Sequence[Item]) -> tuple[np.ndarray, int]:
        """int64 [3, num_tokens] of a prompt, and the offset from a later token's index to its position."""
        return mrope_positions(num_tokens, items, merge_size=config.merge_size)


class NormalisedExperts(Family):
    """To be mixed into a family: experts whose shares add up to 1 in every row, whether the file says so or not."""

    def mixture(self, section: Section) -> MixtureConfig:
        if not section.boolean("norm_topk_prob", True):
            raise section.error("norm_topk_prob", "is false; this architecture is supported with true")
        return read_mixture(section, is_normalised=True)


class VisionFamily(Family):
    """A family whose models see pictures and videos as Qwen2-VL does."""

    names = Names(
        parts={"text": ("model.", "lm_head."), "vision": ("visual.",)},
        renamed=(("model.visual.", "visual."), ("model.language_model.", "model.")),
    )
    vector_prompt: VectorPrompt | None = VectorPrompt()

    @abstractmethod
    def vision(self, root: Section, text: TextConfig, folder: Path) -> VisionConfig: ...

    @abstractmethod
    def encoder(self, config: VisionConfig, weights: Weights, backend: Backend) -> VisionEncoder: ...

    def placeholder_ids(self, root: Section) -> dict[ItemKind, int]:
        kinds = [kind for kind in get_args(ItemKind) if root.has(f"{kind}_token_id")]
        return {kind: root.integer(f"{kind}_token_id") for kind in kinds}


def refuse_attention_bias(section: Section) -> None:
    """Of families that were published without; raises CheckpointError."""
    if section.boolean("attention_bias", False):
        raise section.error("attention_bias", "is true; this architecture is supported without")


def read_vision(section: Section, text: TextConfig, folder: Path, *, width: str, out_size: str) -> VisionConfig:
    """The ViT's sizes that all families write alike, and the processor's settings, which must fit them. `width` and
    `out_size` are this family's keys for those two."""
    channels = "in_channels" if section.has("in_channels") else "in_chans"  # published files have the second
    vision = VisionConfig(
        depth=section.integer("depth"),
        width=section.integer(width),
        num_heads=section.integer("num_heads"),
        out_size=section.integer(out_size),
        in_channels=section.integer(channels, 3),
        patch_size=section.integer("patch_size"),
        temporal_patch_size=section.integer("temporal_patch_size"),
        merge_size=section.integer("spatial_merge_size"),
        rope_theta=section.optional("rope_parameters").number("rope_theta", 10000.0),
        processor=ProcessorConfig.read(folder),
        section=section,
    )
    _check_processor(vision, folder)
    if vision.width % vision.num_heads or (vision.width // vision.num_heads) % 4:
        raise section.error("num_heads", f"is {vision.num_heads}; a width of {vision.width} needs a divisor of it")
    if vision.out_size != text.hidden_size:
        raise section.error(out_size, f"is {vision.out_size}; the text model's is {text.hidden_size}")
    return vision


def _check_processor(vision: VisionConfig, folder: Path) -> None:
    processor = vision.processor
    for key, theirs, ours in (
        ("patch_size", processor.patch_size, vision.patch_size),
        ("temporal_patch_size", processor.temporal_patch_size, vision.temporal_patch_size),
        ("spatial_merge_size", processor.merge_size, vision.merge_size),
        ("in_channels", 3, vision.in_channels),
    ):
        if theirs != ours:
            raise vision.section.error(key, f"is {ours}, but the image processor's settings give {theirs}")
    if min(processor.image_std) <= 0:
        std = processor.image_std
        raise CheckpointError(f"{folder}: the image processor's image_std is {std}; it must be above 0")
