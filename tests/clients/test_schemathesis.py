"""schemathesis against `/openapi.json`: whatever is sent, no answer is a fault of the server, has a status that is not
told of, or breaks its schema."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from conftest import URL

pytestmark = pytest.mark.clients

api = schemathesis.openapi.from_url(f"{URL}/openapi.json")


# A request has a limit of its own. One of the whole test would go off within hypothesis's search, which takes it for a
# finding and looks for a shorter one for minutes more.
@pytest.mark.timeout(0)
@api.parametrize()
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_keep_to_the_description(case: Any) -> None:
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    case.call_and_validate(checks=checks, timeout=60)
