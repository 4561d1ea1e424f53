"""What a checkpoint's JSON files say about the model. Every value is read; a missing or impossible one raises
CheckpointError with the file and the key.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.processors.qwen import ProcessorConfig

__all__ = ["CheckpointConfig", "Section", "TextConfig", "VisionConfig", "read_config"]


class Section:
    """One JSON object of a file, with typed access that names the key in its errors."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} {problem}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number of at least `minimum`."""
        value = self._get(key, default)
        if type(value) is not int or value < minimum:
            raise self.error(key, f"is {value!r}; it must be a whole number of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(key, f"is {value!r}; it must be a finite number above 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.error(key, f"is {value!r}; it must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"is {value!r}; it must be a string")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers of at least 0; a single one counts as a list."""
        value = self._get(key, None)
        items = value if isinstance(value, list) else [value]
        if not all(type(v) is int and v >= 0 for v in items):
            raise self.error(key, f"is {value!r}; it must be a whole number or a list of them")
        return tuple(items)

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.text(key, default)
        if value not in allowed:
            raise self.error(key, f"is {value!r}; supported: {', '.join(allowed)}")
        return value

    def section(self, key: str) -> Section:
        value = self._get(key, None)
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r}; it must be an object")
        return Section(value, f"{self.where}: {key}")

    def optional(self, key: str) -> Section:
        """The object under `key`, empty when it is absent."""
        return self.section(key) if self.has(key) else Section({}, f"{self.where}: {key}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise self.error(key, "is missing")
        return default if value is None else value


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """The text model's sizes and constants."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    """Pairs of channels that turn with the temporal, height and width axis."""
    tie_word_embeddings: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The ViT's sizes that both families have; what one family adds stays in `section`."""

    depth: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    rope_theta: float
    section: Section

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Everything that the JSON files of a model folder say."""

    folder: Path
    architecture: str
    dtype: str
    """As written in the checkpoint: bfloat16, float16 or float32."""
    text: TextConfig
    vision: VisionConfig
    processor: ProcessorConfig
    eos_token_ids: tuple[int, ...]


def read_config(folder: Path) -> CheckpointConfig:
    """Read `config.json`, `generation_config.json` and the image processor's settings of a model folder.

    Both layouts of `config.json` are understood: text values at the top, and in `text_config`. Raises CheckpointError.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; --model takes a model folder or the id of one to download")
    root = _read(folder, "config.json")
    if root.has("quantization_config"):
        raise root.error("quantization_config", "is set; checkpoints that are stored quantised are not supported")
    text_section = root.section("text_config") if root.has("text_config") else root
    vision = _vision(root.section("vision_config"))
    return CheckpointConfig(
        folder=folder,
        architecture=_architecture(root),
        dtype=_dtype(root, text_section),
        text=_text(text_section, root),
        vision=vision,
        processor=_processor(folder, vision),
        eos_token_ids=_eos_token_ids(folder, root, text_section),
    )


def _read(folder: Path, name: str) -> Section:
    path = folder / name
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; is {folder} a model folder?") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return Section(values, str(path))


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


def _text(section: Section, root: Section) -> TextConfig:
    section.choice("hidden_act", ("silu",), "silu")
    if section.boolean("use_sliding_window", False):
        raise section.error("use_sliding_window", "is true; sliding windows are not supported")
    hidden_size, num_heads = section.integer("hidden_size"), section.integer("num_attention_heads")
    if hidden_size % num_heads:
        raise section.error("hidden_size", f"is {hidden_size}, no multiple of num_attention_heads {num_heads}")
    head_dim = section.integer("head_dim", hidden_size // num_heads)
    num_kv_heads = section.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise section.error("num_key_value_heads", f"is {num_kv_heads}, no divisor of num_attention_heads {num_heads}")
    theta, sections = _rope(section, head_dim)
    tied_in = root if root.has("tie_word_embeddings") else section
    return TextConfig(
        vocab_size=section.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=section.integer("intermediate_size"),
        num_layers=section.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=section.integer("max_position_embeddings"),
        rms_norm_eps=section.number("rms_norm_eps"),
        rope_theta=theta,
        mrope_section=sections,
        tie_word_embeddings=tied_in.boolean("tie_word_embeddings", False),
    )


def _rope(section: Section, head_dim: int) -> tuple[float, tuple[int, int, int]]:
    """Base and sections of M-RoPE: `rope_parameters` of newer files, else `rope_scaling` beside `rope_theta`."""
    rope = section.section("rope_parameters" if section.has("rope_parameters") else "rope_scaling")
    for key in ("rope_type", "type"):
        rope.choice(key, ("mrope", "default"), "default")
    theta = (rope if rope.has("rope_theta") else section).number("rope_theta")
    sections = rope.integers("mrope_section")
    if len(sections) != 3 or sum(sections) != head_dim // 2:
        raise rope.error("mrope_section", f"is {list(sections)}; three numbers must add up to {head_dim // 2}")
    return theta, (sections[0], sections[1], sections[2])


def _vision(section: Section) -> VisionConfig:
    channels = "in_channels" if section.has("in_channels") else "in_chans"  # published files have the second
    return VisionConfig(
        depth=section.integer("depth"),
        num_heads=section.integer("num_heads"),
        in_channels=section.integer(channels, 3),
        patch_size=section.integer("patch_size"),
        temporal_patch_size=section.integer("temporal_patch_size"),
        merge_size=section.integer("spatial_merge_size"),
        rope_theta=section.optional("rope_parameters").number("rope_theta", 10000.0),
        section=section,
    )


def _processor(folder: Path, vision: VisionConfig) -> ProcessorConfig:
    """The image processor's settings, which must fit the ViT's."""
    processor = ProcessorConfig.from_checkpoint(folder)
    for key, theirs, ours in (
        ("patch_size", processor.patch_size, vision.patch_size),
        ("temporal_patch_size", processor.temporal_patch_size, vision.temporal_patch_size),
        ("spatial_merge_size", processor.merge_size, vision.merge_size),
        ("in_channels", 3, vision.in_channels),
    ):
        if theirs != ours:
            raise vision.section.error(key, f"is {ours}, but the image processor's settings give {theirs}")
    if min(processor.image_std) <= 0:
        raise CheckpointError(f"{folder}: the image processor's image_std is {processor.image_std}; it must be above 0")
    return processor


def _eos_token_ids(folder: Path, root: Section, text: Section) -> tuple[int, ...]:
    sections = [root, text]
    if (folder / "generation_config.json").exists():
        sections.insert(0, _read(folder, "generation_config.json"))
    for section in sections:
        if section.has("eos_token_id"):
            return section.integers("eos_token_id")
    raise root.error("eos_token_id", "is missing, here and in generation_config.json")
