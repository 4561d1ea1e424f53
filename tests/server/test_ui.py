"""The files of the page, without a browser; tests/browser has one."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from dashinfer_vlm.frontend.checkpoint import FrontendConfig
from dashinfer_vlm.server.ui import FOLDER, page_files
from tests.conftest import CheckpointMaker
from tests.server.conftest import Serve


def test_the_page_is_served_with_a_strict_policy(shared: httpx.Client) -> None:
    reply = shared.get("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize("path", sorted(page_files()))
def test_every_file_is_served_and_fetched_once(path: str, shared: httpx.Client) -> None:
    first = shared.get(path)
    assert first.status_code == 200
    assert first.headers["x-content-type-options"] == "nosniff"
    again = shared.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304
    assert again.content == b""


def test_the_page_knows_the_model(shared: httpx.Client) -> None:
    known = shared.get("/page/model.json").json()
    assert known == {
        "name": "models/scripted",
        "max_model_len": 4096,
        "min_pixels": 1000,
        "max_pixels": 1_000_000,
        "side_step": 28,
        "box_unit": "pixels",
    }


async def test_without_ui_there_is_no_page(serve: Serve) -> None:
    running = await serve(config={"ui": False})
    assert (await running.get("/")).status_code == 404
    assert (await running.get("/page/app.js")).status_code == 404


async def test_with_keys_the_page_loads_and_the_model_stays_closed(serve: Serve) -> None:
    running = await serve(config={"api_keys": ("secret",)})
    for path in page_files():
        assert (await running.get(path)).status_code == 200
    assert (await running.get("/page/model.json")).status_code == 401
    assert (await running.get("/page/")).status_code == 401
    opened = await running.get("/page/model.json", headers={"Authorization": "Bearer secret"})
    assert opened.status_code == 200


async def test_without_ui_its_paths_want_a_key(serve: Serve) -> None:
    running = await serve(config={"api_keys": ("secret",), "ui": False})
    assert (await running.get("/")).status_code == 401


@pytest.mark.parametrize("file", sorted(FOLDER.iterdir()), ids=lambda file: file.name)
def test_no_file_names_another_host_or_makes_markup_of_text(file: Path) -> None:
    text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"(?:src|href|from|import)\s*[=(]?\s*[\"']?(?:https?:)?//", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|srcdoc", text)


@pytest.mark.parametrize(("arch", "unit"), [("qwen2_5_vl", "pixels"), ("qwen3_vl", "thousandths")])
def test_the_family_says_what_boxes_count(arch: str, unit: str, checkpoint: CheckpointMaker) -> None:
    assert FrontendConfig.from_folder(checkpoint(arch)).box_unit == unit
