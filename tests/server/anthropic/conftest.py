"""The real Anthropic client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from anthropic import AsyncAnthropic

from tests.server.conftest import Running

Client = Callable[..., AsyncAnthropic]


@pytest.fixture
async def anthropic_client() -> AsyncIterator[Client]:
    """`anthropic_client(running)` is a client that does not try again."""
    clients: list[AsyncAnthropic] = []

    def make(running: Running, api_key: str = "EMPTY") -> AsyncAnthropic:
        clients.append(AsyncAnthropic(base_url=running.url, api_key=api_key, max_retries=0))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()
