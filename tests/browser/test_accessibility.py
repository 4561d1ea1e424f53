"""The page for keyboards, screen readers and eyes of all kinds, as axe-core judges it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.browser.visit import Visit
from tests.server.conftest import Parts, Serve
from tests.server.test_reasoning import ALWAYS, THOUGHT

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

RICH = """# A title

Some *words*, a [link](https://a.example/) and `code`.

```python
print("x" * 200)
```

| a | b |
|---|---|
| 1 | 2 |

{"bbox_2d": [10, 10, 100, 60], "label": "square"}"""


@pytest.fixture(scope="module")
def axe() -> str:
    return Path(os.environ["AXE"]).read_text(encoding="utf-8")


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
async def test_axe_finds_nothing_serious(colours: str, width: int, axe: str, serve: Serve, visit: Visit) -> None:
    running = await serve(RICH)
    await visit.page.emulate_media(color_scheme="dark" if colours == "dark" else "light", reduced_motion="reduce")
    await visit.page.set_viewport_size({"width": width, "height": 800})
    await visit.open(running.url)
    assert await visit.axe(axe) == []
    await visit.upload()
    assert await visit.axe(axe) == []
    await visit.ask("Tell me all.")
    await visit.answered()
    await visit.sees(".boxes")
    assert await visit.axe(axe) == []
    await visit.fill_parameters({"schema": "{nonsense"})
    assert await visit.axe(axe) == []


@pytest.mark.parametrize("colours", ["light", "dark"])
async def test_reasoning_is_legible_to_axe(colours: str, axe: str, tokenizer: Tokenizer, visit: Visit) -> None:
    await visit.page.emulate_media(color_scheme="dark" if colours == "dark" else "light", reduced_motion="reduce")
    async with Parts(tokenizer, ChatTemplate(ALWAYS, tokenizer)).running(THOUGHT) as running:
        await visit.open(running.url)
        await visit.ask("Is it?")
        await visit.answered()
        assert await visit.axe(axe) == []
        await visit.page.click(".reasoning summary")
        await visit.sees(".thoughts", "hm, so")
        assert await visit.axe(axe) == []


@pytest.mark.parametrize("opener", ["#link", "[aria-label^=Delete]"])
async def test_axe_finds_nothing_serious_in_dialogs(opener: str, axe: str, serve: Serve, visit: Visit) -> None:
    running = await serve()
    await visit.open(running.url)
    await visit.ask("hi")
    await visit.answered()
    await visit.page.focus(opener)
    await visit.page.keyboard.press("Enter")
    await visit.sees("dialog[open]")
    assert await visit.axe(axe) == []


async def test_a_problem_is_legible_to_axe(axe: str, serve: Serve, visit: Visit) -> None:
    running = await serve(engine={"failure": "the engine tripped"})
    await visit.open(running.url)
    await visit.ask("hi")
    await visit.sees(".problem", "tripped")
    assert await visit.axe(axe) == []


async def test_everything_is_reached_by_keyboard(serve: Serve, visit: Visit) -> None:
    running = await serve()
    await visit.open(running.url)
    await visit.ask("hi")
    await visit.answered()
    reached = set()
    for _ in range(40):
        await visit.page.keyboard.press("Tab")
        reached.add(await visit.page.evaluate("document.activeElement.getAttribute('aria-label')"))
    wanted = {"Parameters", "Add pictures or videos", "Add a picture by its address", "Message", "Edit", "Try again"}
    assert wanted | {"Copy answer", "Delete “hi”"} <= reached


async def test_the_focus_goes_back_to_the_message(serve: Serve, visit: Visit) -> None:
    running = await serve()
    await visit.open(running.url)
    focused = "document.activeElement.id"
    assert await visit.page.evaluate(focused) == "prompt"
    await visit.page.click("#link")
    assert await visit.page.evaluate(focused) == "url"
    await visit.page.keyboard.press("Escape")
    await visit.page.wait_for_function("() => document.activeElement.id === 'prompt'")
