"""Config fields as flags, variables and documentation."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import rich_click as click

from dashinfer_vlm import flags
from dashinfer_vlm.cli.command import CONTEXT, execute
from dashinfer_vlm.cli.options import options, reference_page
from dashinfer_vlm.cli.serve import command
from dashinfer_vlm.config import EngineConfig, MediaConfig, ServerConfig
from dashinfer_vlm.errors import ConfigError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "flags.md"


class Parsed:
    """A command with every flag; remembers what it was called with."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

        @click.command("serve", context_settings=CONTEXT)
        @options(*flags.FACES)
        def command(**values: Any) -> None:
            self.values = values

        self.command: click.Command = command

    def __call__(self, *args: str) -> int:
        return execute(self.command, args)

    def config(self, *args: str) -> tuple[EngineConfig, MediaConfig, ServerConfig]:
        assert self(*args) == 0
        engine, media, server = (flags.build(face, self.values) for face in flags.FACES)
        return engine, media, server


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Parsed:
    for face in flags.FACES:
        for name in (name for item in flags.flags_of(face) for name in item.envs):
            monkeypatch.delenv(name, raising=False)
    return Parsed()


def test_no_flags_give_the_defaults_of_the_fields(parsed: Parsed) -> None:
    assert parsed.config() == (EngineConfig(), MediaConfig(), ServerConfig())


@pytest.mark.parametrize(
    ("spelling", "field"),
    [
        ("--max-model-len", "max_model_len"),
        ("--max_length", "max_model_len"),
        ("--max-length", "max_model_len"),
        ("--max_batch", "max_num_seqs"),
        ("--max-batch", "max_num_seqs"),
        ("--parallel_size", "parallel_size"),
        ("--min_pixels", "min_pixels"),
        ("--max-pixels", "max_pixels"),
    ],
)
def test_documented_spellings_are_alike(parsed: Parsed, spelling: str, field: str) -> None:
    engine, _, _ = parsed.config(spelling, "77")
    assert getattr(engine, field) == 77


def test_the_help_tells_defaults_as_they_are_typed(parsed: Parsed, capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("-h") == 0
    defaults = re.findall(r"\[default: (\S+)\]", re.sub(r"[│\s]+", " ", capsys.readouterr().out))
    assert {"auto", "bfloat16", "0", "0.5", "localhost", "8000"} <= set(defaults)
    assert not [default for default in defaults if default.startswith("(")]


def test_booleans_can_be_said_and_unsaid(parsed: Parsed) -> None:
    assert parsed.config("--no-prefix-cache")[0].prefix_cache is False
    assert parsed.config("--no_prefix_cache", "--enable-prefix-cache")[0].prefix_cache is True


def test_lists_are_comma_separated_or_json(parsed: Parsed) -> None:
    assert parsed.config("--api-keys", "a, b")[2].api_keys == ("a", "b")
    assert parsed.config("--api-keys", "a", "--api-key", "b,c")[2].api_keys == ("a", "b", "c")
    assert parsed.config("--allowed-origins", '["https://a", "https://b"]')[2].allowed_origins == (
        "https://a",
        "https://b",
    )


@pytest.mark.parametrize("flag", ["--api-keys", "--api-key", "--allowed-media-domains", "--allowed-origins"])
@pytest.mark.parametrize("value", ["", ",", "[]", " , ", '[""]'])
def test_a_list_that_names_nothing_is_refused(
    parsed: Parsed, flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No keys would mean no authentication, no domains every host."""
    assert parsed(flag, value) == 2
    assert "the list is empty" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--api-keys-file", "--model", "--allowed-local-media-path", "--host"])
def test_a_text_that_names_nothing_is_refused(parsed: Parsed, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No file of keys would mean no authentication, no model the bundled one."""
    assert parsed(flag, "") == 2
    assert "it is empty" in capsys.readouterr().err
    parsed.config()  # the default of --model is empty, too


@pytest.mark.parametrize(
    "name",
    [
        "DASHINFER_API_KEYS",
        "DASHINFER_API_KEY",
        "DASHINFER_ALLOWED_MEDIA_DOMAINS",
        "DASHINFER_API_KEYS_FILE",
        "DASHINFER_MODEL",
    ],
)
def test_a_variable_that_is_set_to_nothing_is_refused(
    parsed: Parsed, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "")
    with pytest.raises(ConfigError, match=f"{name} is set but empty"):
        parsed.config()


def test_variables_of_aliases_count(parsed: Parsed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASHINFER_API_KEY", "secret")
    monkeypatch.setenv("DASHINFER_MAX_BATCH", "7")
    engine, _, server = parsed.config()
    assert (engine.max_num_seqs, server.api_keys) == (7, ("secret",))


def test_tables_are_json(parsed: Parsed) -> None:
    assert parsed.config("--limit-mm-per-prompt", '{"image": 3}')[1].limit_mm_per_prompt == {"image": 3}
    guesses = {"method": "ngram", "num_speculative_tokens": 4}
    assert parsed.config("--speculative-config", json.dumps(guesses))[0].speculative_config == guesses


@pytest.mark.parametrize("value", ['{"image: 3}', '{"image": "three"}', "[1]"])
def test_a_broken_table_is_refused(parsed: Parsed, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("--limit-mm-per-prompt", value) == 2
    assert "--limit-mm-per-prompt" in capsys.readouterr().err


def test_variables_stand_in_for_flags_and_flags_win(parsed: Parsed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASHINFER_PORT", "1234")
    monkeypatch.setenv("DASHINFER_PREFIX_CACHE", "false")
    monkeypatch.setenv("DASHINFER_ALLOWED_ORIGINS", '["https://a", "https://b"]')
    engine, _, server = parsed.config()
    assert (engine.prefix_cache, server.port) == (False, 1234)
    assert server.allowed_origins == ("https://a", "https://b")
    assert parsed.config("--allowed-origins", "https://c")[2].allowed_origins == ("https://c",)
    assert parsed.config("--port", "5")[2].port == 5


def test_an_unknown_flag_is_refused_with_its_nearest_kin(parsed: Parsed, capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("--modle", "x") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--modle" in error
    assert "--model" in error.split("mean")[1]


def test_help_lists_every_flag(parsed: Parsed, capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("-h") == 0
    text = capsys.readouterr().out
    for face in flags.FACES:
        for field in dataclasses.fields(face):
            assert "--" + field.name.replace("_", "-") in text


def test_every_flag_has_a_help_that_is_a_sentence() -> None:
    for face in flags.FACES:
        for item in flags.flags_of(face):
            assert item.help.endswith("."), item.field


def test_no_two_flags_share_a_spelling() -> None:
    spellings = [name for face in flags.FACES for item in flags.flags_of(face) for name in item.spellings]
    assert len(spellings) == len(set(spellings))


def test_the_page_of_flags_is_current() -> None:
    assert DOCS.read_text() == reference_page(), "run `make docs`"


def test_values_that_are_not_offered_are_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(command, ["-h"]) == 0
    told = capsys.readouterr().out
    assert "tensorrt" not in told + reference_page()
    assert "`native`, `transformers` |" in reference_page()
    assert execute(command, ["--vision-engine", "tensorrt"]) == 2
    assert "is not offered yet" in capsys.readouterr().err
    assert execute(command, ["--quant-type", "int8"]) == 2
    assert "none, a8w8, a16w8, a16w4, fp8" in told
    assert "--quant-type is 'int8': it must be one of none, a8w8, a16w8, a16w4, fp8\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "path", "told"),
    [
        ("--api-keys-file", "/nowhere", "cannot be read"),
        ("--files-path", "/proc/nowhere", "cannot be used"),
        ("--responses-store", "/nowhere/store", "cannot be used"),
    ],
)
def test_a_file_that_cannot_be_used_is_found_before_the_model_is_loaded(
    flag: str, path: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dashinfer_vlm.cli.serve.resolve", lambda _: pytest.fail("looked for the model"))
    assert execute(command, ["--port", "0", flag, path]) == 2
    assert f"{flag} {path} {told}" in capsys.readouterr().err
