"""Lines of the log as JSON objects, one format for all processes of a server (`--log-format json`)."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from typing import Any, Literal

import msgspec

__all__ = ["JsonFormatter", "LogFormat", "LogStyle"]

LogFormat = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """One object a line: `time`, `level`, `logger`, `message`, `error` where there is a traceback, and the `facts` that
    a record was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class LogStyle(msgspec.Struct, frozen=True):
    """What a child process is told of its parent's log, so that its lines look the same."""

    level: int
    format: LogFormat

    @classmethod
    def current(cls) -> LogStyle:
        """That of this process."""
        root = logging.getLogger()
        is_json = any(isinstance(handler.formatter, JsonFormatter) for handler in root.handlers)
        return cls(root.getEffectiveLevel(), "json" if is_json else "text")

    def apply(self) -> None:
        """Log to standard error like this from now on."""
        text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter() if self.format == "json" else text)
        logging.basicConfig(handlers=[handler], level=self.level)
