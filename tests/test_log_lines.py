"""The log as JSON, in this process and in its children."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

from dashinfer_vlm.log_lines import JsonFormatter, LogStyle


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    return logging.getLogger("a").makeRecord("a", logging.INFO, "f", 1, message, args, None, extra=extra)


def test_a_record_is_one_object_on_one_line() -> None:
    line = JsonFormatter().format(record("two\nlines of %s", '"text"', facts={"status": 200, "key": None}))
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "level": "info",
        "logger": "a",
        "message": 'two\nlines of "text"',
        "status": 200,
        "key": None,
    }


def test_a_traceback_is_a_field() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        made = logging.getLogger("a").makeRecord("a", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    assert json.loads(JsonFormatter().format(made))["error"].endswith("ValueError: no")


def test_a_child_logs_as_its_parent_does() -> None:
    script = (
        "import logging\nfrom dashinfer_vlm.log_lines import LogStyle\nLogStyle(20, 'json').apply()\n"
        "logging.info('hello')\nassert LogStyle.current() == LogStyle(20, 'json')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr)["message"] == "hello"


def test_without_json_lines_are_text() -> None:
    assert LogStyle.current().format == "text"
