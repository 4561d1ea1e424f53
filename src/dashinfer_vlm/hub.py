"""From what `--model` says to a folder on this machine: a folder as it is, or a hub's id, downloaded and cached.

The hubs' own client libraries do the download, so their variables work as documented there: `HF_ENDPOINT`, `HF_HOME`,
`HF_HUB_OFFLINE`, `HF_TOKEN`, `MODELSCOPE_ENDPOINT`, `MODELSCOPE_CACHE`, `MODELSCOPE_API_TOKEN`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from dashinfer_vlm.config import EngineConfig, HubName
from dashinfer_vlm.errors import ConfigError

__all__ = ["DEMO_MODEL", "DEMO_NAME", "FILE_PATTERNS", "resolve_model"]

logger = logging.getLogger(__name__)

DEMO_MODEL = Path(__file__).parent / "demo_model"
"""The model that is served when none is named."""
DEMO_NAME = "demo"
"""What clients call it."""

FILE_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
"""What is downloaded: weights without code, settings, templates and vocabularies."""

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_TITLES = {"modelscope": "ModelScope", "huggingface": "Hugging Face"}


def resolve_model(config: EngineConfig) -> Path:
    """The folder that `config.model` stands for, downloaded now if it is an id that is not cached yet.

    Raises ConfigError when there is no such folder and no hub has such an id, with what each hub said.
    """
    name = config.model
    if not name:
        return _demo_model()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not _ID.fullmatch(name):
        raise ConfigError(f"--model {name}: there is no such folder, and it is not a hub id (organisation/name)")
    said: list[str] = []
    for hub in _order(config.hub, name):
        try:
            return Path(_HUBS[hub](name, config.revision))
        except Exception as error:  # the two clients share no base class, and each raises a dozen
            said.append(f"{_TITLES[hub]}: {_first_line(error)}")
            logger.debug("%s has no %s", _TITLES[hub], name, exc_info=True)
    raise ConfigError(f"--model {name}: there is no such folder, and no hub delivered it. {'; '.join(said)}")


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
