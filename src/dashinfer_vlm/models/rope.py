"""How files write the angles by which a text model turns queries and keys. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dashinfer_vlm.models.section import Section

__all__ = ["Rope", "Yarn", "read_head_dim", "read_mrope", "read_rope"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """Frequencies stretched to a longer context than the model was trained with (YaRN, Peng et al. 2023)."""

    factor: float
    original_length: int
    """Tokens of the context that the model was trained with."""
    attention_factor: float
    """Cosines and sines are multiplied by it."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """Channels that turn more often than `beta_fast` times in the original context keep their frequency; those that
    turn less often than `beta_slow` times are stretched in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """How the text model turns queries and keys."""

    theta: float
    sections: tuple[int, int, int]
    """Pairs of channels that turn with the temporal, height and width axis; text models have only the first. A head
    may have more channels, which do not turn."""
    interleaved: bool = False
    """Whether the axes take turns from channel to channel; else each has its own range of channels."""
    yarn: Yarn | None = None


def read_head_dim(section: Section) -> int:
    """Width of one head: as written, else the heads' even share of the hidden size."""
    hidden_size, num_heads = section.integer("hidden_size"), section.integer("num_attention_heads")
    if not section.has("head_dim") and hidden_size % num_heads:
        raise section.error("hidden_size", f"is {hidden_size}, no multiple of num_attention_heads {num_heads}")
    return section.integer("head_dim", max(1, hidden_size // num_heads))


def read_mrope(section: Section, *, interleaved: bool = False, rotated: float = 1.0) -> Rope:
    """M-RoPE: `rope_parameters` of newer files, else `rope_scaling` beside `rope_theta`. `interleaved`, and the share
    of a head's channels that is `rotated`, are what the family is; a file that says otherwise is refused."""
    rope = section.section("rope_parameters" if section.has("rope_parameters") else "rope_scaling")
    for key in ("rope_type", "type"):
        rope.choice(key, ("mrope", "default"), "default")
    if rope.boolean("mrope_interleaved", interleaved) != interleaved:
        raise rope.error(
            "mrope_interleaved", f"is {not interleaved}; this architecture is supported with {interleaved}"
        )
    sections, half = rope.integers("mrope_section"), _rotated_pairs(rope, section, rotated)
    if len(sections) != 3 or sum(sections) != half:
        raise rope.error("mrope_section", f"is {list(sections)}; three numbers must add up to {half}")
    return Rope(theta=_theta(rope, section), sections=(sections[0], sections[1], sections[2]), interleaved=interleaved)


def read_rope(section: Section, *, rotated: float = 1.0) -> Rope:
    """RoPE of a text model, stretched by YaRN where the file asks for it; `rotated` as of `read_mrope`, whose sections
    make no difference to text."""
    rope = section.optional("rope_parameters" if section.has("rope_parameters") else "rope_scaling")
    kinds = [rope.choice(key, ("default", "yarn"), "default") for key in ("rope_type", "type")]
    yarn = _yarn(rope, section) if "yarn" in kinds else None
    return Rope(theta=_theta(rope, section), sections=(_rotated_pairs(rope, section, rotated), 0, 0), yarn=yarn)


def _rotated_pairs(rope: Section, section: Section, rotated: float) -> int:
    share = (rope if rope.has("partial_rotary_factor") else section).number("partial_rotary_factor", rotated)
    if share != rotated:
        raise rope.error("partial_rotary_factor", f"is {share:g}; this architecture is supported with {rotated:g}")
    return int(read_head_dim(section) * rotated) // 2


def _theta(rope: Section, section: Section) -> float:
    return (rope if rope.has("rope_theta") else section).number("rope_theta")


def _yarn(rope: Section, section: Section) -> Yarn:
    for key in ("mscale", "mscale_all_dim", "truncate"):
        if rope.has(key):
            raise rope.error(key, f"is {rope.values[key]!r}; this setting of YaRN is not supported")
    factor = rope.number("factor")
    if factor < 1:
        raise rope.error("factor", f"is {factor}; it must be at least 1")
    original = "original_max_position_embeddings"
    return Yarn(
        factor=factor,
        original_length=(rope if rope.has(original) else section).integer(original),
        attention_factor=rope.number("attention_factor", 0.1 * math.log(factor) + 1),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
    )
