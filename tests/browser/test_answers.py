"""What the page makes of an answer's text: Markdown without markup, and boxes over the picture."""

from __future__ import annotations

from typing import Any

import pytest

from dashinfer_vlm.processors.sizes import smart_resize
from tests.browser.visit import Visit, png
from tests.frontend.scripted import ScriptedLoader
from tests.server.conftest import Serve

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

SHOW = """text => import("/page/markdown.js").then(({showMarkdown}) => {
    const parent = document.createElement("div");
    document.body.append(parent);
    showMarkdown(parent, text);
    for (const node of parent.querySelectorAll("*")) for (const name of ["data-source", "tabindex"]) node.removeAttribute(name);
    return parent.innerHTML;
})"""  # noqa: E501
FIND = """([text, picture, model]) => import("/page/boxes.js").then(({findBoxes}) => findBoxes(text, picture, model))"""
MODEL = {"side_step": 28, "min_pixels": 3136, "max_pixels": 1_003_520}


async def shown(visit: Visit, text: str) -> str:
    made: str = await visit.page.evaluate(SHOW, text)
    return made


async def test_markdown_becomes_elements(serve: Serve, visit: Visit) -> None:
    await visit.open((await serve()).url)
    cases = {
        "one *two* **three** `fo*u*r`": "<p>one <em>two</em> <strong>three</strong> <code>fo*u*r</code></p>",
        "snake_case_name and 2 * 3 * 4": "<p>snake_case_name and 2 * 3 * 4</p>",
        "## Title ##\nbody": "<h4>Title</h4><p>body</p>",
        "- a\n- b\n  - c": "<ul><li>a</li><li><p>b</p><ul><li>c</li></ul></li></ul>",
        "3. c\n4. d": '<ol start="3"><li>c</li><li>d</li></ol>',
        "> said\n> so": "<blockquote><p>said\nso</p></blockquote>",
        "---": "<hr>",
        "~~gone~~": "<p><del>gone</del></p>",
    }
    for text, elements in cases.items():
        assert await shown(visit, text) == elements


async def test_links_lead_to_the_web_only(serve: Serve, visit: Visit) -> None:
    await visit.open((await serve()).url)
    link = '<a href="https://a.example/b" target="_blank" rel="noopener noreferrer">{}</a>'
    assert await shown(visit, "[here](https://a.example/b)") == f"<p>{link.format('here')}</p>"
    assert await shown(visit, "at https://a.example/b.") == f"<p>at {link.format('https://a.example/b')}.</p>"
    assert "<a" not in await shown(visit, "[here](javascript:alert(1)) [there](data:text/html,x)")


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)>",
        "<script>alert(1)</script>",
        "![picture](https://evil.example/?secret)",
        "`<b>` **<b>** [<b>](https://a.example/)",
        "| <i> |\n|---|\n| <svg onload=alert(1)> |",
        '```"><img src=x>\n<iframe>\n```',
    ],
)
async def test_text_never_becomes_markup(text: str, serve: Serve, visit: Visit) -> None:
    running = await serve(text)
    await visit.open(running.url)
    await visit.ask("hi")
    await visit.answered()
    made = await visit.page.evaluate(
        "[...document.querySelectorAll('.answer img, .answer script, .answer iframe, .answer b, .answer i, .answer svg')]"  # noqa: E501
        ".filter((node) => !node.closest('button')).length"
    )
    assert made == 0
    assert visit.hosts == {f"127.0.0.1:{running.port}"}


async def test_an_open_fence_at_the_end_of_a_stream_is_code(serve: Serve, visit: Visit) -> None:
    await visit.open((await serve()).url)
    assert "<pre><code>x = 1\n\ny = 2</code></pre>" in await shown(visit, "so:\n```python\nx = 1\n\ny = 2")


async def test_a_very_long_paragraph_is_shown_at_once(serve: Serve, visit: Visit) -> None:
    await visit.open((await serve()).url)
    text = "so " + "**" * 200_000
    assert await shown(visit, text) == f"<p>{text}</p>"


async def boxes(visit: Visit, text: str, width: int, height: int, **model: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await visit.page.evaluate(
        FIND, [text, {"width": width, "height": height}, {**MODEL, **model}]
    )
    return found


@pytest.mark.parametrize(("width", "height"), [(280, 140), (1920, 1080), (40, 40), (3000, 500), (43, 71), (70, 42)])
async def test_json_boxes_are_in_pixels_of_the_resized_picture(
    width: int, height: int, serve: Serve, visit: Visit
) -> None:
    await visit.open((await serve()).url)
    bounds = {"min_pixels": MODEL["min_pixels"], "max_pixels": MODEL["max_pixels"]}
    right, bottom = smart_resize(width, height, factor=28, **bounds)
    text = f'```json\n[{{"bbox_2d": [{right // 2}, 0, {right}, {bottom}], "label": "half"}}]\n```'
    (box,) = await boxes(visit, text, width, height)
    assert box == {"label": "half", "left": (right // 2) / right, "top": 0, "right": 1, "bottom": 1}


async def test_box_tokens_are_in_thousandths(serve: Serve, visit: Visit) -> None:
    await visit.open((await serve()).url)
    text = "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(100,250),(500,1000)<|box_end|>"
    (box,) = await boxes(visit, text, 640, 480)
    assert box == {"label": "a cat", "left": 0.1, "top": 0.25, "right": 0.5, "bottom": 1}


async def test_json_boxes_of_other_families_are_in_thousandths(serve: Serve, visit: Visit) -> None:
    await visit.open((await serve()).url)
    (box,) = await boxes(visit, '{"bbox_2d": [100, 250, 500, 1000]}', 640, 480, box_unit="thousandths")
    assert box == {"label": "", "left": 0.1, "top": 0.25, "right": 0.5, "bottom": 1}


async def test_nonsense_is_no_box_and_half_a_box_waits(serve: Serve, visit: Visit) -> None:
    await visit.open((await serve()).url)
    for text in (
        '{"bbox_2d": [1, 2, 3, ',
        '{"bbox_2d": [1, 2, 3]}',
        '{"bbox_2d": ["a", 2, 3, 4]}',
        '{"bbox_2d": "x"}',
        "<|box_start|>(1,2),(3",
        "bbox_2d",
    ):
        assert await boxes(visit, text, 280, 140) == []
    (outside,) = await boxes(visit, '{"bbox_2d": [-50, 1000, 140, 70]}', 280, 140)
    assert outside == {"label": "", "left": 0, "top": 0.5, "right": 0.5, "bottom": 1}


@pytest.mark.parametrize(
    "text",
    [
        'Here: {"bbox_2d": [70, 35, 210, 105], "label": "square"}',
        "<|object_ref_start|>square<|object_ref_end|><|box_start|>(250,250),(750,750)<|box_end|>",
    ],
)
async def test_a_box_is_drawn_over_the_picture(text: str, serve: Serve, visit: Visit) -> None:
    running = await serve(text, loader=ScriptedLoader(pixel_bounds=(3136, 1_003_520)))
    await visit.open(running.url)
    await visit.upload(content=png(280, 140))
    await visit.ask("Where is the square?")
    assert "<|" not in await visit.answered()
    await visit.sees(".box-name", "square")
    picture = await visit.page.locator(".boxes img").bounding_box()
    drawn = await visit.page.locator(".boxes rect").bounding_box()
    assert picture
    assert drawn
    assert drawn["width"] == pytest.approx(picture["width"] / 2, abs=4)
    assert drawn["x"] - picture["x"] == pytest.approx(picture["width"] / 4, abs=4)
    assert drawn["y"] - picture["y"] == pytest.approx(picture["height"] / 4, abs=4)
    alt = await visit.page.get_attribute(".boxes img", "alt")
    assert alt == "The picture with 1 marked: square at 25% across, 25% down"
    await visit.page.reload()
    await visit.sees(".box-name", "square")
