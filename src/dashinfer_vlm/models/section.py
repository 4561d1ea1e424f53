"""One JSON object of a checkpoint's files, with typed access: a missing or impossible value raises CheckpointError with
the file and the key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dashinfer_vlm.errors import CheckpointError

__all__ = ["Section", "read_section"]

_MOST = 2**128 - 2**104
"""The largest number of 32 bits."""


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
        """A number above 0 that 32 bits hold."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value <= _MOST:
            raise self.error(key, f"is {value!r}; it must be a number above 0 that 32 bits hold")
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

    def sections(self, key: str) -> list[Section]:
        """A list of objects, none when it is absent."""
        values = self._get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise self.error(key, f"is {values!r}; it must be a list of objects")
        return [Section(value, f"{self.where}: {key}") for value in values]

    def optional(self, key: str) -> Section:
        """The object under `key`, empty when it is absent."""
        return self.section(key) if self.has(key) else Section({}, f"{self.where}: {key}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise self.error(key, "is missing")
        return default if value is None else value


def read_section(folder: Path, name: str) -> Section:
    """The JSON object in the file `name` of a model folder; raises CheckpointError."""
    path = folder / name
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; is {folder} a model folder?") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} cannot be read: it is nested too deep") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return Section(values, str(path))
