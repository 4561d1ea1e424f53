"""From `--model` to a folder, with the hubs' real clients against stand-ins on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dashinfer_vlm import hub
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError
from tests.loopback import Hub, running

NAME = "qwen/Qwen2-VL-2B-Instruct"
RESOLVE = """
import sys
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.hub import resolve_model
try:
    print("folder:", resolve_model(EngineConfig(model=sys.argv[1], hub=sys.argv[2])))
except ConfigError as error:
    print("error:", error)
"""


class Resolver:
    """`resolve_model` in a process of its own, since the clients read their variables when they are imported."""

    def __init__(self, home: Path, modelscope: str, huggingface: str) -> None:
        self._env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HOME": str(home),
            "MODELSCOPE_ENDPOINT": modelscope,
            "HF_ENDPOINT": huggingface,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
        }

    def __call__(self, model: str, hub: str = "auto", **env: str) -> str:
        command = [sys.executable, "-c", RESOLVE, model, hub]
        done = subprocess.run(command, env=self._env | env, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    (folder / "merges.txt").write_text("a b")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling.py").write_text("print('code')")
    return folder


@pytest.fixture
def site(published: Path) -> Iterator[tuple[Hub, str]]:
    site = Hub(NAME, published)
    with running(site) as address:
        yield site, address


@pytest.fixture
def empty() -> Iterator[str]:
    with running(Hub("nobody/nothing", Path())) as address:
        yield address


def _folder(line: str) -> Path:
    assert line.startswith("folder: "), line
    return Path(line.removeprefix("folder: "))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert hub.resolve_model(EngineConfig(model=str(tmp_path))) == tmp_path


@pytest.mark.parametrize("model", ["/no/such/folder", "./missing", "missing", "a/b/c"])
def test_what_is_neither_folder_nor_id_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="no such folder, and it is not a hub id"):
        hub.resolve_model(EngineConfig(model=model))


@pytest.mark.parametrize("hub", ["modelscope", "huggingface"])
def test_an_id_comes_from_the_hub_that_has_it_without_code_and_pickles(
    tmp_path: Path, site: tuple[Hub, str], empty: str, published: Path, hub: str
) -> None:
    addresses = {"modelscope": empty, "huggingface": empty} | {hub: site[1]}
    folder = _folder(Resolver(tmp_path, **addresses)(NAME))
    assert _names(folder) == {"config.json", "model.safetensors", "merges.txt"}
    assert (folder / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    assert not any(name in url for url in site[0].asked for name in ("pytorch_model", "modeling"))


def test_a_cached_copy_serves_without_a_network(tmp_path: Path, site: tuple[Hub, str], empty: str) -> None:
    resolve = Resolver(tmp_path, modelscope=empty, huggingface=site[1])
    folder = _folder(resolve(NAME, "huggingface"))
    num_asked = len(site[0].asked)
    assert _folder(resolve(NAME, HF_HUB_OFFLINE="1")) == folder
    assert len(site[0].asked) == num_asked


def test_an_id_that_no_hub_has_is_an_error_that_says_what_each_hub_said(tmp_path: Path, empty: str) -> None:
    line = Resolver(tmp_path, modelscope=empty, huggingface=empty)(NAME)
    assert line.startswith(f"error: --model {NAME}: there is no such folder, and no hub delivered it. ModelScope: ")
    assert "Hugging Face: " in line


def _adapter(folder: Path, text: str) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(text)
    return str(folder)


def test_a_model_has_the_adapter_that_is_named(tmp_path: Path) -> None:
    lora = _adapter(tmp_path / "adapter", "{}")
    found = hub.resolve(EngineConfig(model=str(tmp_path), lora=lora))
    assert (found.model, found.lora) == (str(tmp_path), lora)
    assert hub.resolve(EngineConfig(model=str(tmp_path))).lora is None


@pytest.mark.parametrize("lora", ["/no/such/folder", "missing", ""])
def test_an_adapter_that_is_neither_folder_nor_id_is_refused(tmp_path: Path, lora: str) -> None:
    with pytest.raises(ConfigError, match=f"--lora {lora}: there is no such folder, and it is not a hub id"):
        hub.resolve(EngineConfig(model=str(tmp_path), lora=lora))


def test_an_adapter_in_place_of_the_model_brings_its_model(tmp_path: Path) -> None:
    lora = _adapter(tmp_path / "adapter", json.dumps({"base_model_name_or_path": str(tmp_path), "r": 8}))
    found = hub.resolve(EngineConfig(model=lora, dtype="float32"))
    assert found == EngineConfig(model=str(tmp_path), lora=lora, dtype="float32")
    (tmp_path / "adapter" / "config.json").write_text("{}")
    assert hub.resolve(EngineConfig(model=lora)).lora is None, "a model that holds an adapter, too"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"base_model_name_or_path": "/root/of/another"}', "/root/of/another: there is no such folder"),
        ('{"base_model_name_or_path": null}', "adapter_config.json names none"),
        ("{}", "adapter_config.json names none"),
        ('{"base_model_name_or_path": 5}', "Expected `str"),
        ("{", "truncated"),
    ],
)
def test_an_adapter_whose_model_is_not_found_says_how_to_name_it(tmp_path: Path, text: str, why: str) -> None:
    lora = _adapter(tmp_path / "adapter", text)
    with pytest.raises(ConfigError, match=f"--model {lora} is an adapter.*--model MODEL --lora {lora}.*{why}"):
        hub.resolve(EngineConfig(model=lora))


def test_a_model_with_an_adapter_has_both_names() -> None:
    assert hub.names_of(EngineConfig()) == ("demo",)
    assert hub.names_of(EngineConfig(model="a/b")) == ("a/b",)
    assert hub.names_of(EngineConfig(model="a/b", lora="c/d")) == ("c/d", "a/b")
