"""Qwen3.5, 3.6 and 3.8: Qwen3-VL's ViT without deepstack, in front of a text model three layers in four of which keep
a state of fixed size in place of keys and values.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from dashinfer_vlm.models.config import CheckpointConfig, DeltaNetConfig, TextConfig, read_text
from dashinfer_vlm.models.families.qwen3_vl import Qwen3VL
from dashinfer_vlm.models.family import (
    DRAFTS,
    Family,
    NormalisedExperts,
    TransformersTower,
    VisionFamily,
    refuse_attention_bias,
)
from dashinfer_vlm.models.rope import Rope, read_mrope, read_rope
from dashinfer_vlm.models.section import Section

if TYPE_CHECKING:
    from dashinfer_vlm.layers.backend import Backend
    from dashinfer_vlm.models.decoder import Decoder
    from dashinfer_vlm.models.weights import Weights

__all__ = ["Qwen35", "Qwen35Moe", "Qwen35Text", "Qwen35TextMoe"]

ROTATED = 0.25
"""Share of a head's channels that turn."""
LINEAR, FULL = "linear_attention", "full_attention"


class Qwen35Text(Family):
    """The text model by itself, as `transformers` saves what was trained without pictures."""

    names = replace(
        Family.names,
        renamed=(("model.language_model.", "model."),),
        ignored=(DRAFTS,),  # unless the engine is to guess by it
    )

    def text(self, section: Section, root: Section) -> TextConfig:
        refuse_attention_bias(section)
        if not section.boolean("attn_output_gate", True):
            raise section.error("attn_output_gate", "is false; this architecture is supported with gates")
        text = read_text(section, root, self.rope(section), self.mixture(section))
        return replace(text, norm_offset=1.0, delta_net=_read_delta_net(section, text.num_layers))

    def rope(self, section: Section) -> Rope:
        return read_rope(section, rotated=ROTATED)

    def decoder(self, config: CheckpointConfig, weights: Weights, backend: Backend) -> Decoder:
        from dashinfer_vlm.models.attention import GatedAttention
        from dashinfer_vlm.models.decoder import Decoder

        return Decoder(config.text, weights, backend, attention=partial(GatedAttention, qk_norm=True))


class Qwen35TextMoe(NormalisedExperts, Qwen35Text):
    """The text model of Qwen35Moe by itself."""


class Qwen35(Qwen35Text, Qwen3VL):
    """The text model behind a ViT."""

    names = replace(VisionFamily.names, ignored=Qwen35Text.names.ignored)
    tower = TransformersTower("qwen3_5.modeling_qwen3_5", "Qwen3_5VisionModel")

    def text(self, section: Section, root: Section) -> TextConfig:
        vision = root.section("vision_config")
        if vision.values.get("deepstack_visual_indexes"):
            indexes = vision.values["deepstack_visual_indexes"]
            raise vision.error("deepstack_visual_indexes", f"is {indexes}; this architecture is supported without")
        return super().text(section, root)

    def rope(self, section: Section) -> Rope:
        return read_mrope(section, interleaved=True, rotated=ROTATED)


class Qwen35Moe(NormalisedExperts, Qwen35):
    """As Qwen35, with experts in place of the MLP of each layer, one of which all rows share."""

    tower = TransformersTower("qwen3_5_moe.modeling_qwen3_5_moe", "Qwen3_5MoeVisionModel")


def _read_delta_net(section: Section, num_layers: int) -> DeltaNetConfig:
    sizes = DeltaNetConfig(
        layers=_recurrent_layers(section, num_layers),
        num_key_heads=section.integer("linear_num_key_heads"),
        num_value_heads=section.integer("linear_num_value_heads"),
        key_dim=section.integer("linear_key_head_dim"),
        value_dim=section.integer("linear_value_head_dim"),
        conv_size=section.integer("linear_conv_kernel_dim", minimum=2),
    )
    if sizes.num_value_heads % sizes.num_key_heads:
        problem = f"is {sizes.num_value_heads}, no multiple of linear_num_key_heads {sizes.num_key_heads}"
        raise section.error("linear_num_value_heads", problem)
    return sizes


def _recurrent_layers(section: Section, num_layers: int) -> frozenset[int]:
    """Every layer but each `full_attention_interval`-th, unless `layer_types` names them one by one."""
    interval = section.integer("full_attention_interval", 4)
    kinds = section.values.get("layer_types")
    if kinds is None:
        kinds = [FULL if (i + 1) % interval == 0 else LINEAR for i in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in (LINEAR, FULL) for kind in kinds):
        raise section.error("layer_types", f"is {kinds!r}; it must name each of {num_layers} layers {LINEAR} or {FULL}")
    if len(set(kinds)) < 2:
        raise section.error("layer_types", f"names {kinds[0]} alone; this architecture is supported with both kinds")
    return frozenset(i for i, kind in enumerate(kinds) if kind == LINEAR)
