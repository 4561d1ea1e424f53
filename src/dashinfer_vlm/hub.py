"""From what `--model` and `--lora` say to folders on this machine: a folder as it is, or a hub's id, downloaded and
cached.

The hubs' own client libraries do the download, so their variables work as documented there: `HF_ENDPOINT`, `HF_HOME`,
`HF_HUB_OFFLINE`, `HF_TOKEN`, `MODELSCOPE_ENDPOINT`, `MODELSCOPE_CACHE`, `MODELSCOPE_API_TOKEN`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from dashinfer_vlm.config import EngineConfig, HubName
from dashinfer_vlm.errors import ConfigError

__all__ = ["DEMO_MODEL", "DEMO_NAME", "FILE_PATTERNS", "names_of", "resolve", "resolve_lora", "resolve_model"]

logger = logging.getLogger(__name__)

DEMO_MODEL = Path(__file__).parent / "demo_model"
"""The model that is served when none is named."""
DEMO_NAME = "demo"
"""What clients call it."""

FILE_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
"""What is downloaded: weights without code, settings, templates and vocabularies."""

_ADAPTER = "adapter_config.json"
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_TITLES = {"modelscope": "ModelScope", "huggingface": "Hugging Face"}


class _Adapter(msgspec.Struct):
    """What is read here of an adapter's settings."""

    base_model_name_or_path: str | None = None
    revision: str | None = None
    """Of that model."""


def names_of(config: EngineConfig) -> tuple[str, ...]:
    """What clients may call the model by, unless they are told otherwise: its adapter's name, as it was given, and its
    own."""
    return (*([config.lora] if config.lora else []), config.model or DEMO_NAME)


def resolve(config: EngineConfig) -> EngineConfig:
    """`config` with the folders that its model and its adapter stand for, downloaded now if they are ids that are not
    cached yet. An adapter in place of the model brings the model that it was trained on.

    Raises ConfigError when there is no such folder and no hub has such an id, with what each hub said.
    """
    folder = resolve_model(config)
    if config.lora is not None:
        return replace(config, model=str(folder), lora=str(resolve_lora(config.lora, config.hub)))
    if (folder / "config.json").exists() or not (folder / _ADAPTER).exists():
        return replace(config, model=str(folder))
    return replace(config, model=str(_base_of(folder, config)), lora=str(folder))


def resolve_model(config: EngineConfig) -> Path:
    """The folder that `config.model` stands for; as `resolve`."""
    return _folder("--model", config.model, config.hub, config.revision) if config.model else _demo_model()


def resolve_lora(name: str, hub: HubName = "auto") -> Path:
    """The folder of the adapter `name`; as `resolve`."""
    return _folder("--lora", name, hub, None)


def _base_of(folder: Path, config: EngineConfig) -> Path:
    """The model that the adapter in `folder` says it was trained on: often a folder of another machine."""
    try:
        adapter = msgspec.json.decode((folder / _ADAPTER).read_bytes(), type=_Adapter)
        if not adapter.base_model_name_or_path:
            raise ConfigError(f"{_ADAPTER} names none")
        return _folder("base_model_name_or_path", adapter.base_model_name_or_path, config.hub, adapter.revision)
    except (OSError, msgspec.MsgspecError, ConfigError) as error:
        told = f"--model {config.model} is an adapter; name its model, too: --model MODEL --lora {config.model}"
        raise ConfigError(f"{told}. {error}") from error


def _folder(flag: str, name: str, hub: HubName, revision: str | None) -> Path:
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if not _ID.fullmatch(name):
        raise ConfigError(f"{flag} {name}: there is no such folder, and it is not a hub id (organisation/name)")
    said: list[str] = []
    for site in _order(hub, name):
        try:
            return Path(_HUBS[site](name, revision))
        except Exception as error:  # the two clients share no base class, and each raises a dozen
            said.append(f"{_TITLES[site]}: {_first_line(error)}")
            logger.debug("%s has no %s", _TITLES[site], name, exc_info=True)
    raise ConfigError(f"{flag} {name}: there is no such folder, and no hub delivered it. {'; '.join(said)}")


def _demo_model() -> Path:
    if not (DEMO_MODEL / "config.json").is_file():
        raise ConfigError("this installation has no demo model; name one with --model FOLDER or --model ID")
    return DEMO_MODEL


def _order(hub: HubName, name: str) -> list[str]:
    if hub != "auto":
        return [hub]
    from huggingface_hub import try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    return ["huggingface", "modelscope"] if cached else ["modelscope", "huggingface"]


def _from_huggingface(name: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    folder: str = snapshot_download(name, revision=revision, allow_patterns=FILE_PATTERNS)
    return folder


def _from_modelscope(name: str, revision: str | None) -> str:
    from modelscope.hub.snapshot_download import snapshot_download

    folder: str = snapshot_download(name, revision=revision, allow_patterns=FILE_PATTERNS)
    return folder


_HUBS: dict[str, Callable[[str, str | None], str]] = {
    "modelscope": _from_modelscope,
    "huggingface": _from_huggingface,
}


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:200]}..."
