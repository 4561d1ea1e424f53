"""What the front end reads of a model folder besides tokenizer and template: placeholder ids and sampling defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dashinfer_vlm.errors import CheckpointError, InvalidRequestError
from dashinfer_vlm.models.config import CheckpointConfig, read_config
from dashinfer_vlm.models.family import BoxUnit
from dashinfer_vlm.request import ItemKind, SamplingParams
from dashinfer_vlm.tokenizer_file import read_json

if TYPE_CHECKING:  # the tokenizer stands on this module
    from dashinfer_vlm.frontend.expansion import ExpandItem

_DEFAULTED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendConfig:
    """Facts of a checkpoint that turn messages into prompts."""

    placeholder_ids: Mapping[ItemKind, int]
    """The token that stands for each kind of item; a kind that is absent cannot be sent to this model."""
    expand_item: ExpandItem
    """What the model's family puts in the place of a placeholder."""
    box_unit: BoxUnit
    sampling_defaults: dict[str, float | int]
    """Fields of SamplingParams that `generation_config.json` sets for requests that do not."""
    config: CheckpointConfig
    """What all of that was read from."""

    @classmethod
    def from_folder(cls, folder: Path) -> FrontendConfig:
        """What the model's family reads in `config.json`, and `generation_config.json` where there is one; raises
        CheckpointError."""
        config = read_config(folder)
        return cls(
            placeholder_ids=config.placeholder_ids,
            expand_item=partial(config.family.expand, config),
            box_unit=config.family.box_unit,
            sampling_defaults=_sampling_defaults(folder / "generation_config.json"),
            config=config,
        )


def _sampling_defaults(path: Path) -> dict[str, float | int]:
    """The published recommendation: `do_sample: false` means greedy, absent fields keep the API's defaults.

    Raises CheckpointError for what no request could ask for: every request that says nothing would be refused.
    """
    if not path.is_file():
        return {}
    config = read_json(path)
    defaults = {name: config[name] for name in _DEFAULTED if config.get(name) is not None}
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    if defaults.get("top_k") == -1:
        defaults["top_k"] = 0  # off, as some publishers write it
    try:
        msgspec.convert(defaults, SamplingParams).validate(1)
    except (msgspec.ValidationError, InvalidRequestError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return defaults
