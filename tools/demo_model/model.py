"""Qwen2-VL in its smallest trainable form: patches as one linear layer, block masks, fp32; `export.py` writes the
published names."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_model.scenes import CELL, COLOUR_NAMES, COLUMNS, KINDS, PATCH, ROWS, SHAPES

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
PATCH_VALUES = 3 * PATCH * PATCH
MERGE = CELL // PATCH


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; the fields carry the names of the published config."""

    vocab_size: int = 1024
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 3
    num_key_value_heads: int = 1
    rope_theta: float = 10.0
    mrope_section: tuple[int, int, int] = (8, 12, 12)
    vision_depth: int = 5
    vision_dim: int = 128
    vision_heads: int = 4

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def patches_of(pictures: np.ndarray) -> np.ndarray:
    """Pictures uint8 [B, H, W, 3] as normalised patches float32 [B, P, 588] in the order of the published processor."""
    batch, height, width, _ = pictures.shape
    values = (pictures.astype(np.float32) / 255 - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    tiles = values.reshape(batch, height // CELL, MERGE, PATCH, width // CELL, MERGE, PATCH, 3)
    tiles = tiles.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # [B, cell row, cell column, row, column, channel, y, x]
    return np.ascontiguousarray(tiles.reshape(batch, -1, PATCH_VALUES))


def patch_places(rows: int, columns: int) -> Tensor:
    """(row, column) of each patch, int64 [P, 2], in the order of `patches_of`."""
    row = torch.arange(rows)[:, None].expand(rows, columns)
    column = torch.arange(columns)[None, :].expand(rows, columns)
    both = torch.stack([row, column], -1).reshape(rows // MERGE, MERGE, columns // MERGE, MERGE, 2)
    return both.permute(0, 2, 1, 3, 4).reshape(-1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    turned: Tensor = x * cos + torch.cat([-second, first], -1) * sin
    return turned


def vision_rotary(rows: int, columns: int, head_dim: int) -> tuple[Tensor, Tensor]:
    rates = 1.0 / 10000.0 ** (torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    angles = (patch_places(rows, columns).float()[:, :, None] * rates).flatten(1)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


class VisionBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key = rotate(qkv[:2], cos, sin)
        seen = F.scaled_dot_product_attention(query, key, qkv[2])
        x = x + self.proj(seen.transpose(1, 2).reshape(batch, tokens, dim))
        hidden = self.fc1(self.norm2(x))
        out: Tensor = x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))
        return out


class Merger(nn.Module):
    """Two by two patches [B, P, dim] to one token of the text model [B, P / 4, hidden]."""

    def __init__(self, dim: int, hidden_size: int) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(dim, eps=1e-6)
        self.first = nn.Linear(4 * dim, 4 * dim)
        self.second = nn.Linear(4 * dim, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        merged = self.ln_q(x).reshape(x.shape[0], x.shape[1] // 4, -1)
        out: Tensor = self.second(F.gelu(self.first(merged)))
        return out


class Vision(nn.Module):
    """Patches [B, P, 588] to merged tokens [B, P / 4, hidden]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        dim = shape.vision_dim
        self.head_dim = dim // shape.vision_heads
        self.patch_embed = nn.Linear(PATCH_VALUES, dim, bias=False)
        self.blocks = nn.ModuleList([VisionBlock(dim, shape.vision_heads) for _ in range(shape.vision_depth)])
        self.merger = Merger(dim, shape.hidden_size)

    def see(self, patches: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What the merger reads [B, P, dim]."""
        x: Tensor = self.patch_embed(patches)
        for block in self.blocks:
            x = block(x, cos, sin)
        return x

    def forward(self, patches: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out: Tensor = self.merger(self.see(patches, cos, sin))
        return out


class CellHeads(nn.Module):
    """What stands in a cell, read from its merged token; only for training."""

    kind_weight: Tensor
    colour_weight: Tensor

    SIZES = (len(SHAPES) + 2, len(COLOUR_NAMES), len(ROWS) + 1, len(COLUMNS) + 1)

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.patch = nn.Linear(hidden_size, 4 * (len(KINDS) + len(COLOUR_NAMES)))
        self.centre = nn.Linear(hidden_size, sum(self.SIZES))
        self.register_buffer("kind_weight", torch.tensor([0.3] + [1.0] * (len(KINDS) - 1)), persistent=False)
        self.register_buffer("colour_weight", torch.tensor([0.3] + [1.0] * (len(COLOUR_NAMES) - 1)), persistent=False)

    def loss(self, tokens: Tensor, kind: Tensor, colour: Tensor, centre: Tensor) -> tuple[Tensor, dict[str, float]]:
        """`kind` and `colour` int64 [B, P], `centre` int64 [B, P / 4, 4]; the loss and the shares seen right."""
        x = self.norm(tokens)
        logits = self.patch(x).reshape(-1, len(KINDS) + len(COLOUR_NAMES))
        kinds, colours = logits.split([len(KINDS), len(COLOUR_NAMES)], -1)
        kind, colour = kind.reshape(-1), colour.reshape(-1)
        loss = F.cross_entropy(kinds, kind, weight=self.kind_weight) + 0.5 * F.cross_entropy(
            colours, colour, weight=self.colour_weight
        )
        parts = torch.split(self.centre(x).reshape(-1, sum(self.SIZES)), list(self.SIZES), -1)
        flat = centre.reshape(-1, 4)
        loss = loss + sum(F.cross_entropy(part, flat[:, i]) for i, part in enumerate(parts))
        with torch.no_grad():
            right = kinds.argmax(-1) == kind
            shape, char = (kind > 0) & (kind <= len(SHAPES)), kind > len(SHAPES)
            there = flat[:, 0] > 0
            seen = {
                "shape": right[shape].float().mean().item(),
                "char": right[char].float().mean().item(),
                "colour": (colours.argmax(-1) == colour)[colour > 0].float().mean().item(),
                "centre": (parts[0].argmax(-1) == flat[:, 0])[there].float().mean().item(),
                "row": (parts[2].argmax(-1) == flat[:, 2])[there].float().mean().item(),
            }
        return loss, seen


def text_rotary(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, head_dim] of positions int64 [3, B, T] (time, height, width)."""
    rates = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    angles = positions.float()[..., None] * rates
    parts = torch.split(angles, list(shape.mrope_section), -1)
    mixed = torch.cat([part[i] for i, part in enumerate(parts)], -1)
    mixed = torch.cat([mixed, mixed], -1)
    return mixed.cos(), mixed.sin()


class TextBlock(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        hidden, kv = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
        self.norm1 = nn.RMSNorm(hidden, eps=1e-6)
        self.norm2 = nn.RMSNorm(hidden, eps=1e-6)
        self.q = nn.Linear(hidden, hidden)
        self.k = nn.Linear(hidden, kv)
        self.v = nn.Linear(hidden, kv)
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.gate = nn.Linear(hidden, shape.intermediate_size, bias=False)
        self.up = nn.Linear(hidden, shape.intermediate_size, bias=False)
        self.down = nn.Linear(shape.intermediate_size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        normed = self.norm1(x)
        query, key, value = (
            layer(normed).view(batch, tokens, -1, self.shape.head_dim).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.o(seen.transpose(1, 2).reshape(batch, tokens, hidden))
        normed = self.norm2(x)
        out: Tensor = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return out


class Text(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList([TextBlock(shape) for _ in range(shape.num_hidden_layers)])
        self.norm = nn.RMSNorm(shape.hidden_size, eps=1e-6)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, hidden], positions [3, B, T], mask bool [B, 1, T, T] (true where a token may look).

        Returns the hidden states after the last norm, and those that the second half of the blocks reads.
        """
        cos, sin = text_rotary(positions, self.shape)
        cos, sin = cos[:, None], sin[:, None]
        halfway = x
        for i, block in enumerate(self.blocks):
            if i == len(self.blocks) // 2:
                halfway = x
            x = block(x, cos, sin, mask)
        return self.norm(x), halfway


def look_beside(block: VisionBlock, head_dim: int, first: int, strength: float = 4.8) -> None:
    """Biases under which all heads but the last begin by looking one patch up, down, left, right or at their own patch.

    With rotary positions a query bias turned by `rate * offset` against the key bias peaks at that offset.
    """
    offsets = [(0, 1), (0, -1), (1, 0), (-1, 0), (0, 0)]
    half = head_dim // 2
    rates = 1.0 / 10000.0 ** (torch.arange(0, half, 2).float() / half)
    bias = block.qkv.bias.data.view(3, -1, head_dim)
    for head in range(block.num_heads - 1):
        for axis, distance in enumerate(offsets[(first + head) % len(offsets)]):
            for i in range(3):
                slot = axis * len(rates) + i
                angle = float(rates[i]) * distance
                bias[0, head, slot] = strength * math.cos(angle)
                bias[0, head, slot + half] = strength * math.sin(angle)
                bias[1, head, slot] = strength


def initialise(vision: Vision, text: Text | None, patches: Tensor) -> None:
    """Whitened patches, local first attention, blocks that begin as the identity."""
    for module in [*vision.modules(), *(text.modules() if text is not None else ())]:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7 / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    flat = patches.reshape(-1, PATCH_VALUES).double()
    flat = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    dim = vision.patch_embed.out_features
    values, vectors = values.flip(0)[:dim], vectors.flip(1)[:, :dim]
    vision.patch_embed.weight.data = (vectors / (values + values[12]).sqrt()).T.float().contiguous()
    for i, vision_block in enumerate(vision.blocks):
        assert isinstance(vision_block, VisionBlock)
        nn.init.zeros_(vision_block.proj.weight)
        nn.init.zeros_(vision_block.fc2.weight)
        if i < len(vision.blocks) - 1:
            look_beside(vision_block, vision.head_dim, 3 * i)
    if text is not None:
        nn.init.normal_(text.embed.weight, std=0.05)
        for text_block in text.blocks:
            assert isinstance(text_block, TextBlock)
            nn.init.zeros_(text_block.o.weight)
            nn.init.zeros_(text_block.down.weight)
            key = text_block.k.weight  # the first head begins by looking for what is alike
            text_block.q.weight.data[: key.shape[0]] = key.data
