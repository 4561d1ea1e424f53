"""`response_format` of the documented API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import allspark
from allspark import AsStatus, GenerateRequestStatus
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.allspark.conftest import NAME, Ask
from tests.tokens import IM_END

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "ending",
    [
        {},
        {"eos_token_id": IM_END},
        {"early_stopping": False},
    ],
)
@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}},
    ],
)
def test_an_answer_follows_its_schema(ask: Ask, folder: Path, form: dict[str, Any], ending: dict[str, Any]) -> None:
    answer = ask([1, 2, 3], {"temperature": 1.5, "seed": 1, "max_length": 400, "response_format": form, **ending})
    assert answer.status == GenerateRequestStatus.GenerateFinished
    assert json.loads(Tokenizer.from_folder(folder).decode(answer.ids))["ok"] in (True, False)


def test_a_form_that_is_not_supported_is_the_status_of_the_call(engine: allspark.Engine) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "array", "uniqueItems": True}}}
    status, handle, queue = engine.start_request_ids(NAME, None, [1, 2, 3], {"response_format": form})
    assert (status, handle, queue) == (AsStatus.ALLSPARK_PARAM_ERROR, None, None)
    assert "uniqueItems" in status.message
