"""LoRA adapters (Hu et al. 2021) as PEFT writes them, merged into a model's matrices when those are read.

Each matrix W is read as W + scale * B A. The scale is alpha / r, or alpha / sqrt(r) where `use_rslora` is set
(Kalajdzievski 2023). An adapter's tensors carry the names that a model's modules had where it was trained, which a
family translates as it does those of checkpoints. What would change numbers in another way is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.models.entries import Entry, LowRank, header_of
from dashinfer_vlm.models.family import Names
from dashinfer_vlm.models.section import Section, read_section

__all__ = ["paths_of_adapter", "with_adapter"]

_CONFIG, _TENSORS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_TYPES = ("BF16", "F16", "F32")
_PATTERN = re.compile(r"(\^|\.\*\\?\.)?[\w-]+(\\?\.[\w-]+)*")
"""What a key of `rank_pattern` may be, of all regular expressions: the end of a module's name, or all of it."""

_LEAVING_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` with which training begins at the model's own weights; others change them first."""

_READ = ("peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "target_parameters",
    "task_type",
)
"""Keys that say how training began and went, or what the tensors say, too."""


@dataclass(frozen=True, slots=True)
class _Settings:
    """Ranks and scales by the name of a module."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    is_stabilised: bool

    def rank_of(self, module: str) -> int:
        return next((rank for pattern, rank in self.ranks.items() if _fits(pattern, module)), self.rank)

    def scale_of(self, module: str) -> float:
        alpha = next((alpha for pattern, alpha in self.alphas.items() if _fits(pattern, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.is_stabilised else rank)


@dataclass(frozen=True, slots=True)
class _Pair:
    """What an adapter has for one module."""

    module: str
    """As the adapter calls it."""
    a: Entry
    b: Entry


def paths_of_adapter(folder: Path) -> list[Path]:
    """The files that an adapter consists of. Raises CheckpointError for a folder that is none."""
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {_CONFIG}; --lora takes an adapter that PEFT wrote")
    if not (folder / _TENSORS).is_file():
        why = f"; {_PICKLE} may hold code and is not read" if (folder / _PICKLE).exists() else ""
        raise CheckpointError(f"{folder} holds no {_TENSORS}{why}")
    if others := sorted(path.name for path in folder.glob("*.safetensors") if path.name != _TENSORS):
        raise CheckpointError(f"{folder} holds {others[0]}, which is no part of a LoRA adapter and would be left out")
    return [folder / _CONFIG, folder / _TENSORS]


def with_adapter(entries: dict[str, Entry], folder: Path, names: Names) -> dict[str, Entry]:
    """The same tensors, those that the adapter in `folder` adds to with their updates. Only headers are read. Raises
    CheckpointError for an adapter that is not understood in all its parts, or does not fit."""
    _, path = paths_of_adapter(folder)
    settings = _read_settings(read_section(folder, _CONFIG))
    found = dict(entries)
    pairs = list(_pairs(path))
    if not pairs:
        raise CheckpointError(f"{path} holds no tensors")
    for pair in pairs:
        for name, update in _updates(pair, names, entries, settings):
            if name not in found:
                raise _no_place(pair)
            if found[name].update is not None:
                raise CheckpointError(f"{path}: tensor {pair.a.name} adds to {name}, as another one does")
            found[name] = replace(found[name], update=update)
    return found


def _read_settings(section: Section) -> _Settings:
    section.choice("peft_type", ("LORA",), "")
    section.choice("bias", ("none",), "none")
    if section.values.get("init_lora_weights", True) not in _LEAVING_THE_BASE:
        kind = section.values["init_lora_weights"]
        raise section.error(
            "init_lora_weights", f"is {kind!r}, which changes the model's own weights; convert it to plain LoRA"
        )
    for key, value in section.values.items():
        if value and key not in (*_READ, *_WITHOUT_EFFECT):
            raise section.error(key, f"is {value!r}; adapters are supported without")
    ranks, alphas = (section.optional(key) for key in ("rank_pattern", "alpha_pattern"))
    return _Settings(
        rank=section.integer("r"),
        alpha=section.number("lora_alpha"),
        ranks={_plain(pattern, ranks): ranks.integer(pattern) for pattern in ranks.values},
        alphas={_plain(pattern, alphas): alphas.number(pattern) for pattern in alphas.values},
        is_stabilised=section.boolean("use_rslora", False),
    )


def _plain(pattern: str, section: Section) -> str:
    """A name, or ^ and a name. What a stranger's regular expression may take to match nobody knows."""
    if not _PATTERN.fullmatch(pattern):
        raise section.error(pattern, "is a regular expression; names of modules are supported")
    return pattern.replace("\\", "").removeprefix(".*.")


def _fits(pattern: str, module: str) -> bool:
    return f".{module}".endswith(f".{pattern}") or pattern == f"^{module}"


def _pairs(path: Path) -> Iterator[_Pair]:
    """Of every module that has tensors in the file."""
    halves: dict[str, dict[str, Entry]] = {}
    for entry in header_of(path):
        match = _NAME.fullmatch(entry.name)
        if match is None:
            raise CheckpointError(f"{path}: tensor {entry.name} is no part of a LoRA adapter of matrices")
        if entry.dtype not in _TYPES:
            raise CheckpointError(f"{path}: tensor {entry.name} is {entry.dtype}; supported: {', '.join(_TYPES)}")
        module, half = match.groups()
        halves.setdefault(module, {})[half] = entry
    for module, found in halves.items():
        if len(found) < 2:
            (entry,) = found.values()
            raise CheckpointError(f"{path}: tensor {entry.name} has no other half")
        yield _Pair(module, found["A"], found["B"])


def _updates(
    pair: _Pair, names: Names, entries: Mapping[str, Entry], settings: _Settings
) -> Iterator[tuple[str, LowRank]]:
    """What a pair adds to which matrices of the model: one, or those of all experts."""
    ours = names.ours(pair.module)
    experts = ours.removesuffix(".base_layer")
    if f"{experts}.0.gate_proj.weight" in entries:
        yield from _updates_of_experts(experts, pair, entries, settings)
        return
    target, rank = entries.get(f"{ours}.weight"), settings.rank_of(pair.module)
    if target is None or len(target.shape) < 2:
        raise _no_place(pair)
    rows, *behind = target.shape
    for entry, shape in ((pair.a, (rank, *behind)), (pair.b, (rows, rank, *(1 for _ in behind[1:])))):
        if entry.shape != shape:
            raise _misfit(entry, f"not {list(shape)}, which rank {rank} gives a weight of {list(target.shape)}")
    yield f"{ours}.weight", LowRank(pair.a, pair.b, settings.scale_of(pair.module))


def _updates_of_experts(
    prefix: str, pair: _Pair, entries: Mapping[str, Entry], settings: _Settings
) -> Iterator[tuple[str, LowRank]]:
    """PEFT has a pair for all experts of a layer (`target_parameters`): A [E * r, K], expert by expert, and B
    [N, r * E], where an expert has each E-th column. Which of two matrices it is for, its shapes say: the pair of one
    is nested in that of the other where there are both."""
    inner, hidden = entries[f"{prefix}.0.gate_proj.weight"].shape
    count = sum(f"{prefix}.{i}.gate_proj.weight" in entries for i in range(len(entries)))
    module = pair.module.removesuffix(".base_layer")
    halves = {"gate": slice(0, inner), "up": slice(inner, 2 * inner)}
    for parameter, (depth, rows), kinds in (
        ("gate_up_proj", (hidden, 2 * inner), halves),
        ("down_proj", (inner, hidden), {"down": slice(None)}),
    ):
        name = f"{module}.{parameter}"
        rank, scale = settings.rank_of(name), settings.scale_of(name)
        if (pair.a.shape, pair.b.shape) != ((count * rank, depth), (rows, rank * count)):
            continue
        for i in range(count):
            for kind, half in kinds.items():
                part = slice(i * rank, (i + 1) * rank)
                update = LowRank(pair.a, pair.b, scale, a_rows=part, b_rows=half, b_columns=slice(i, None, count))
                yield f"{prefix}.{i}.{kind}_proj.weight", update
        return
    what = f"and {pair.b.name} {list(pair.b.shape)}, which fit no matrices of {count} experts, {inner} x {hidden}"
    raise _misfit(pair.a, what)


def _no_place(pair: _Pair) -> CheckpointError:
    return CheckpointError(f"{pair.a.path}: the model has no place for tensor {pair.a.name}")


def _misfit(entry: Entry, what: str) -> CheckpointError:
    return CheckpointError(f"{entry.path}: tensor {entry.name} has shape {list(entry.shape)}, {what}")
