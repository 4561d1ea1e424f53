"""What the tests of other people's clients share. They run in environments of their own (`tools/clients/run.py`),
against a server at DASHINFER_URL that serves random weights; elsewhere none of them is collected."""

from __future__ import annotations

import base64
import io
import os
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

URL = os.environ.get("DASHINFER_URL", "")
MODEL = "model"

collect_ignore_glob = [] if URL else ["test_*.py"]


def pytest_exception_interact(node: pytest.Item, report: pytest.TestReport) -> None:
    """A failure is told when it is found, too: a run that is ended from outside never comes to its summary."""
    writer = node.config.get_terminal_writer()
    writer.line()
    writer.line(report.longreprtext)


class Seen(BaseModel):
    """An answer to a question about a picture, in words that end and without fields of the model's own: random weights
    come to no end of others."""

    model_config = ConfigDict(extra="forbid")

    shape: Literal["circle", "square", "triangle"]
    colour: Literal["red", "white", "blue"]


class Place(BaseModel):
    """Arguments of a tool, of the same kind."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Paris", "Rome"]


QUESTION = "What shape is it, and of what colour?"


@pytest.fixture(scope="session")
def url() -> str:
    """With the `/v1` that most clients want."""
    return f"{URL}/v1"


@pytest.fixture(scope="session")
def png() -> bytes:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (112, 112), "white")
    ImageDraw.Draw(image).ellipse((20, 20, 90, 90), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def picture(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
