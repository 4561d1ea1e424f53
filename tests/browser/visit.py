"""What a user does with the page, and sees of it."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from PIL import Image

if TYPE_CHECKING:
    from playwright.async_api import FilePayload, Page, Request

HAND_OVER = """([name, base64, makeEvent]) => {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name, {type: "image/png"}));
    if (makeEvent === "paste") document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
    else for (const type of ["dragenter", "drop"]) document.dispatchEvent(new DragEvent(type, {dataTransfer: data}));
}"""  # noqa: E501
"""Paste or drop a file, which the operating system would otherwise have to do."""


def png(width: int = 280, height: int = 140) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (90, 140, 120)).save(file, "PNG")
    return file.getvalue()


class Visit:
    """A tab with the page. Errors in its console, and requests to anybody but its server, are complaints."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        page.on("pageerror", lambda error: self.complaints.append(f"{error.name}: {error.message}"))
        page.on("request", self._note_host)

    def _note_host(self, request: Request) -> None:
        url = urlsplit(request.url)
        if url.scheme not in ("blob", "data"):
            self.hosts.add(url.netloc)

    async def open(self, url: str) -> None:
        await self.page.goto(url)
        await self.sees("#model:not(:empty)")

    async def sees(self, selector: str, text: str | None = None) -> None:
        """Wait until an element is visible, and holds `text`."""
        found = self.page.locator(selector)
        await (found if text is None else found.filter(has_text=text)).first.wait_for(timeout=10_000)

    async def upload(self, *, name: str = "picture.png", kind: str = "image/png", content: bytes | None = None) -> None:
        file: FilePayload = {"name": name, "mimeType": kind, "buffer": png() if content is None else content}
        await self.page.set_input_files("#files", file)
        await self.sees("#tray li")

    async def hand_over(self, how: str) -> None:
        await self.page.evaluate(HAND_OVER, ["picture.png", base64.b64encode(png()).decode(), how])
        await self.sees("#tray li")

    async def add_url(self, url: str) -> None:
        await self.page.click("#link")
        await self.page.fill("#url", url)
        await self.page.press("#url", "Enter")
        await self.sees("#tray li")

    async def ask(self, text: str) -> None:
        """Send `text` without waiting for the answer."""
        await self.page.fill("#prompt", text)
        await self.page.press("#prompt", "Enter")

    async def answered(self, count: int = 1) -> str:
        """Wait until `count` answers are complete; the text of the last."""
        await self.page.wait_for_function(
            "count => document.querySelectorAll('.assistant[aria-busy=false]').length === count", arg=count
        )
        text: str = await self.page.locator(".answer").last.inner_text()
        return text

    async def fill_parameters(self, values: dict[str, str]) -> None:
        """By the ids of the fields."""
        if await self.page.locator("#panel").is_hidden():
            await self.page.click("#panel-toggle")
        for name, value in values.items():
            await self.page.fill(f"#{name}", value)

    async def axe(self, script: str) -> list[str]:
        """What axe-core, the text of which is `script`, finds to be serious or critical."""
        await self.page.evaluate(script)
        found: list[dict[str, Any]] = await self.page.evaluate("axe.run().then((result) => result.violations)")
        return [
            f"{rule['id']}: {node['html']}: {node['failureSummary']}"
            for rule in found
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]
