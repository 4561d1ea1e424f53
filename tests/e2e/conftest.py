"""One server for most tests: the documented command, with a tiny model under the documented name."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.conftest import CheckpointMaker
from tests.e2e.serving import Server
from tests.loopback import Hub, Site, running

MODEL = "qwen/Qwen2-VL-2B-Instruct"


def picture(colour: str, kind: str = "JPEG") -> bytes:
    """An encoded picture of 320x240 with a circle in `colour`."""
    image = Image.new("RGB", (320, 240), "white")
    ImageDraw.Draw(image).ellipse((60, 40, 220, 200), fill=colour)
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


@pytest.fixture(scope="session")
def pictures() -> Iterator[str]:
    """A host on loopback with the two pictures of the documented examples, and one that is none."""
    site = Site(
        {
            "/3075/3168662394_7d7103de7d_z_d.jpg": ("image/jpeg", picture("red")),
            "/1533/26541536141_41abe98db3_z_d.jpg": ("image/jpeg", picture("blue")),
            "/broken.jpg": ("image/jpeg", picture("green")[:400]),
        }
    )
    with running(site) as address:
        yield address


@pytest.fixture(scope="session")
def server(pictures: str, checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`dashinfer_vlm_serve --model qwen/Qwen2-VL-2B-Instruct`, the hub's stand-in delivering a tiny checkpoint."""
    home = tmp_path_factory.mktemp("home")
    with running(Hub(MODEL, checkpoint("qwen2_vl", dtype="bfloat16"))) as hub:
        env = {"MODELSCOPE_ENDPOINT": hub, "HOME": str(home), "MODELSCOPE_CACHE": str(home / "modelscope")}
        flags = ("--model", MODEL, "--port", "0", "--allowed-media-domains", "127.0.0.1", "--kv-cache-gib", "0.05")
        server = Server(*flags, "--limit-mm-per-prompt", '{"image": 8}', env=env)
        try:
            server.wait_ready()
            yield server
        finally:
            server.kill()


@pytest.fixture
def model_folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen2_vl", dtype="bfloat16")
