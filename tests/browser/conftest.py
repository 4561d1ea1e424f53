"""Headless Chromium in front of real servers over a scripted engine; `make test-browser` brings the browser.

Everything runs in one event loop, since a browser takes seconds to start.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest_asyncio

from tests.browser.visit import Visit
from tests.server.conftest import Parts, Running, Serve, folder, parts, template, tokenizer

if TYPE_CHECKING:
    from playwright.async_api import Browser

__all__ = ["folder", "parts", "template", "tokenizer"]

FLAGS = (
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def browser() -> AsyncIterator[Browser]:
    from playwright.async_api import async_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert path, "there is no chromium here; run make test-browser, or name one in CHROMIUM"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session")
async def visit(browser: Browser) -> AsyncIterator[Visit]:
    """The page in a window of 1200 x 760 pixels, not opened yet; at the end it must not have complained."""
    context = await browser.new_context(viewport={"width": 1200, "height": 760}, reduced_motion="reduce")
    visit = Visit(await context.new_page())
    yield visit
    assert not visit.complaints, visit.complaints
    await context.close()


@pytest_asyncio.fixture(loop_scope="session")
async def serve(parts: Parts) -> AsyncIterator[Serve]:
    """As in tests/server."""
    async with AsyncExitStack() as stack:

        async def start(text: str = "hello", **options: Any) -> Running:
            return await stack.enter_async_context(parts.running(text, **options))

        yield start
