"""What a checkpoint's JSON files say about the model, in the words that all families share. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.models.published import Scoring, read_scoring, read_why_no_vectors
from dashinfer_vlm.models.registry import family_of
from dashinfer_vlm.models.rope import Rope, read_head_dim
from dashinfer_vlm.models.section import Section, read_section
from dashinfer_vlm.models.stored import Stored, read_stored
from dashinfer_vlm.processors.qwen import ProcessorConfig
from dashinfer_vlm.request import ItemKind

if TYPE_CHECKING:  # families are made of these configurations
    from dashinfer_vlm.models.family import Family

__all__ = [
    "CheckpointConfig",
    "MixtureConfig",
    "TextConfig",
    "VisionConfig",
    "read_config",
    "read_mixture",
    "read_text",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNetConfig:
    """The layers of a hybrid text model that keep a state of fixed size in place of keys and values."""

    layers: frozenset[int]
    """Which of the text model's they are."""
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    """Of one head, as `value_dim`."""
    value_dim: int
    conv_size: int
    """Tokens that the causal convolution sees."""

    @property
    def num_channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def state_shapes(self) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Of one sequence and layer: the convolution's last inputs, and the memory of each value head."""
        inputs = (self.conv_size - 1, self.num_channels)
        return inputs, (self.num_value_heads, self.key_dim, self.value_dim)

    @property
    def state_bytes(self) -> int:
        """Of one sequence over all layers, in float32."""
        return 4 * len(self.layers) * sum(math.prod(shape) for shape in self.state_shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """Experts in place of the MLP."""

    num_experts: int
    num_chosen: int
    """Experts of a token."""
    intermediate_size: int
    """Channels of one expert."""
    is_normalised: bool
    """Whether the shares of a token add up to 1."""
    layers: frozenset[int]
    """That have them; the others have an MLP."""
    has_shared: bool = False
    """Whether there is one more, which every token takes, by a share of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """The text model's sizes and constants."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Channels of an MLP; 0 where no layer has one."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    norm_offset: float = 0.0
    """Added to the gains of RMSNorms as they are stored; 1 where those are distances from 1."""
    delta_net: DeltaNetConfig | None = None
    """None: every layer attends."""
    mixture: MixtureConfig | None = None
    embeds: bool = False
    """Whether it was published for vectors; such a model may lack the head that makes logits."""
    scoring: Scoring | None = None
    """How it scores pairs of a query and a document, in place of vectors; None: it does not."""

    @property
    def num_kv_layers(self) -> int:
        """Layers that keep keys and values."""
        return self.num_layers - (len(self.delta_net.layers) if self.delta_net else 0)

    @property
    def state_bytes(self) -> int:
        """Of one sequence in the other layers."""
        return self.delta_net.state_bytes if self.delta_net else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The ViT's sizes that all families have; what one family adds stays in `section`."""

    depth: int
    width: int
    num_heads: int
    out_size: int
    """Width of the merged embeddings, which is that of the text model."""
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    rope_theta: float
    processor: ProcessorConfig
    """Of whoever cuts pictures and videos into the patches."""
    section: Section

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Everything that the JSON files of a model folder say."""

    folder: Path
    architecture: str
    family: Family
    dtype: str
    """As written in the checkpoint: bfloat16, float16 or float32."""
    text: TextConfig
    vision: VisionConfig | None
    """None for a text model."""
    placeholder_ids: Mapping[ItemKind, int]
    """The token that stands for each kind of item; a kind that is absent cannot be sent to this model."""
    eos_token_ids: tuple[int, ...]
    stored: Stored | None
    """How quantised weights are stored; None: there are none."""
    root: Section
    """The whole `config.json`, for what one family adds."""
    why_no_vectors: str | None
    """Why its states are not asked for as vectors; None: the model was published for that."""

    @property
    def embedding_size(self) -> int:
        """Columns of one embedding row that the encoder makes and the decoder takes."""
        return self.family.embedding_size(self)

    @property
    def processor(self) -> ProcessorConfig | None:
        """None for a text model."""
        return self.vision.processor if self.vision else None

    @property
    def merge_size(self) -> int:
        """Patches along one side of a token; 1 for a text model, which has none."""
        return self.vision.merge_size if self.vision else 1


def read_config(folder: Path) -> CheckpointConfig:
    """Read `config.json`, `generation_config.json` and the processor's settings of a model folder.

    Both layouts of `config.json` are understood: text values at the top, and in `text_config`. Raises CheckpointError.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; --model takes a model folder or the id of one to download")
    root = read_section(folder, "config.json")
    section = root.section("text_config") if root.has("text_config") else root
    architecture = _architecture(root)
    family = family_of(architecture)
    text = family.text(section, root)
    scoring = family.scoring or read_scoring(folder, text.vocab_size)
    why_no_vectors = read_why_no_vectors(folder) if scoring is None else "it scores pairs"
    text = replace(text, embeds=why_no_vectors is None, scoring=scoring)
    return CheckpointConfig(
        folder=folder,
        architecture=architecture,
        family=family,
        dtype=_dtype(root, section),
        text=text,
        vision=family.vision(root, text, folder),
        placeholder_ids=family.placeholder_ids(root),
        eos_token_ids=_eos_token_ids(folder, root, section),
        stored=read_stored(root),
        root=root,
        why_no_vectors=why_no_vectors,
    )


def read_text(section: Section, root: Section, rope: Rope, mixture: MixtureConfig | None = None) -> TextConfig:
    """The text model's sizes, which all families write alike; `root` may hold what `section` leaves out."""
    section.choice("hidden_act", ("silu",), "silu")
    _refuse_windows(section)
    num_heads, head_dim = section.integer("num_attention_heads"), read_head_dim(section)
    num_layers = section.integer("num_hidden_layers")
    has_mlps = mixture is None or len(mixture.layers) < num_layers
    num_kv_heads = section.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise section.error("num_key_value_heads", f"is {num_kv_heads}, no divisor of num_attention_heads {num_heads}")
    tied_in = root if root.has("tie_word_embeddings") else section
    return TextConfig(
        vocab_size=section.integer("vocab_size"),
        hidden_size=section.integer("hidden_size"),
        intermediate_size=section.integer("intermediate_size") if has_mlps else 0,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_context(section, rope),
        rms_norm_eps=section.number("rms_norm_eps"),
        rope=rope,
        tie_word_embeddings=tied_in.boolean("tie_word_embeddings", False),
        mixture=mixture,
    )


def read_mixture(section: Section, *, is_normalised: bool) -> MixtureConfig:
    """The experts of a text model."""
    num_layers = section.integer("num_hidden_layers")
    num_experts, num_chosen = section.integer("num_experts"), section.integer("num_experts_per_tok")
    if num_chosen > num_experts:
        raise section.error("num_experts_per_tok", f"is {num_chosen}; there are {num_experts} experts")
    plain = section.integers("mlp_only_layers") if section.values.get("mlp_only_layers") else ()
    step = section.integer("decoder_sparse_step", 1)
    inner, shared = section.integer("moe_intermediate_size"), "shared_expert_intermediate_size"
    if section.has(shared) and section.integer(shared) != inner:
        raise section.error(shared, f"is {section.integer(shared)}; supported: {inner}, as of the other experts")
    return MixtureConfig(
        num_experts=num_experts,
        num_chosen=num_chosen,
        intermediate_size=inner,
        is_normalised=is_normalised,
        layers=frozenset(i for i in range(num_layers) if i not in plain and (i + 1) % step == 0),
        has_shared=section.has(shared),
    )


def _context(section: Section, rope: Rope) -> int:
    """Files that ask for YaRN mostly keep the length of the training; what it is stretched to counts."""
    written = section.integer("max_position_embeddings")
    return written if rope.yarn is None else max(written, int(rope.yarn.factor * rope.yarn.original_length))


def _refuse_windows(section: Section) -> None:
    if section.boolean("use_sliding_window", False):
        raise section.error("use_sliding_window", "is true; sliding windows are not supported")
    if "sliding_attention" in (section.values.get("layer_types") or ()):
        raise section.error("layer_types", "names sliding_attention; sliding windows are not supported")


def _architecture(root: Section) -> str:
    names = root.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise root.error("architectures", f"is {names!r}; it must name one architecture")
    return names[0]


def _dtype(root: Section, text: Section) -> str:
    for section in (root, text):
        for key in ("dtype", "torch_dtype"):
            if section.has(key):
                return section.choice(key, ("bfloat16", "float16", "float32"), "")
    return "float32"  # what the format means by saying nothing


def _eos_token_ids(folder: Path, root: Section, text: Section) -> tuple[int, ...]:
    sections, vocab_size = [root, text], text.integer("vocab_size")
    if (folder / "generation_config.json").exists():
        sections.insert(0, read_section(folder, "generation_config.json"))
    for section in sections:
        if section.has("eos_token_id"):
            ids = section.integers("eos_token_id")
            if max(ids, default=0) >= vocab_size:
                raise section.error("eos_token_id", f"is {list(ids)}; ids are from 0 to {vocab_size - 1}")
            return ids
    raise root.error("eos_token_id", "is missing, here and in generation_config.json")
