"""The page in a browser, against the real server over a scripted engine."""

from __future__ import annotations

import pytest

from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.browser.visit import Visit
from tests.frontend.scripted import ScriptedLoader
from tests.server.conftest import Parts, Running, Serve
from tests.server.test_reasoning import ALWAYS, THOUGHT

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

STORY = "Once upon a time there was a small green square that wanted to be round."
PAUSE = 10
"""So many tokens are more than its first four words."""


def sources(running: Running) -> list[str]:
    return [str(ref.source) for ref in running.loader.loaded]


@pytest.mark.parametrize("way", ["upload", "paste", "drop"])
async def test_a_picture_is_sent_by(way: str, serve: Serve, visit: Visit) -> None:
    running = await serve("A green square.")
    await visit.open(running.url)
    await (visit.upload() if way == "upload" else visit.hand_over(way))
    await visit.ask("What is this?")
    assert await visit.answered() == "A green square."
    assert [source[:22] for source in sources(running)] == ["data:image/png;base64,"]
    await visit.sees(".user .media img")
    assert visit.hosts == {f"127.0.0.1:{running.port}"}


async def test_a_picture_is_sent_by_its_url(serve: Serve, visit: Visit) -> None:
    running = await serve("An eye.")
    url = f"{running.url}/page/icon.svg"
    await visit.open(running.url)
    await visit.add_url(url)
    await visit.ask("What is this?")
    assert await visit.answered() == "An eye."
    assert sources(running) == [url]
    assert await visit.page.get_attribute(".user .media img", "src") == url


async def test_a_video_is_sent_by_upload(serve: Serve, visit: Visit) -> None:
    running = await serve("It rolls.")
    await visit.open(running.url)
    await visit.upload(name="film.mp4", kind="video/mp4", content=b"not really")
    await visit.ask("What happens?")
    assert await visit.answered() == "It rolls."
    assert [ref.kind for ref in running.loader.loaded] == ["video"]
    assert sources(running)[0].startswith("data:video/mp4;base64,")


async def test_a_picture_alone_is_a_turn_and_can_be_taken_back(serve: Serve, visit: Visit) -> None:
    running = await serve("hello")
    await visit.open(running.url)
    await visit.upload()
    await visit.page.click("#tray .remove")
    assert await visit.page.is_disabled("#send")
    await visit.upload()
    await visit.page.press("#prompt", "Enter")
    await visit.answered()
    assert len(sources(running)) == 1


async def test_the_answer_streams_and_tells_its_figures(serve: Serve, visit: Visit) -> None:
    running = await serve(STORY, engine={"pauses_after": PAUSE, "num_cached_tokens": 7})
    await visit.open(running.url)
    await visit.ask("Tell me a story.")
    await visit.sees(".assistant.writing .answer", "Once upon a time")
    assert "round" not in await visit.page.inner_text(".answer")
    await visit.sees("#send[aria-label=Stop]")
    running.engine.resume.set()
    assert await visit.answered() == STORY
    figures = await visit.page.inner_text(".figures")
    for part in ("to the first token", "tokens/s", "tokens", "7 cached"):
        assert part in figures
    assert await visit.page.inner_text("#status") == STORY  # what a screen reader says
    await visit.sees("#send[aria-label=Send]")


COSTS = """[...document.querySelectorAll(".figures span")].map((span) => {
    const range = document.createRange();
    range.selectNodeContents(span.firstChild);
    const { left, top } = range.getBoundingClientRect();
    return [Math.round(top), Math.round(left)];
})"""


async def test_figures_that_need_two_lines_on_a_phone_begin_below_each_other(serve: Serve, visit: Visit) -> None:
    running = await serve(STORY)
    await visit.page.set_viewport_size({"width": 320, "height": 700})
    await visit.open(running.url)
    await visit.ask("Tell me a story.")
    await visit.answered()
    places = await visit.page.evaluate(COSTS)
    starts = [min(left for at, left in places if at == top) for top in {at for at, _ in places}]
    assert len(starts) > 1
    assert len(set(starts)) == 1, places


async def test_reasoning_is_in_sight_until_the_answer_begins(tokenizer: Tokenizer, visit: Visit) -> None:
    thinking = Parts(tokenizer, ChatTemplate(ALWAYS, tokenizer))
    pause = len(tokenizer.encode_text("\nhm, so\n\nyes"))
    async with thinking.running(THOUGHT, engine={"pauses_after": pause}) as running:
        await visit.open(running.url)
        await visit.ask("Is it?")
        await visit.sees(".reasoning[open] summary", "Thinking")
        await visit.sees(".thoughts", "hm, so")
        assert await visit.page.inner_text(".answer") == ""
        running.engine.resume.set()
        assert (await visit.answered()).strip() == "It is."
        await visit.sees(".reasoning:not([open]) summary", "Reasoning")
        assert await visit.page.locator(".thoughts").is_hidden()
        await visit.page.focus(".reasoning summary")
        await visit.page.keyboard.press("Enter")
        assert await visit.page.inner_text(".thoughts") == "hm, so\n\nyes"
        assert (await visit.page.inner_text("#status")).strip() == "It is."  # the answer alone is read out
        await visit.page.reload()
        await visit.sees(".reasoning:not([open]) summary", "Reasoning")


async def test_an_answer_without_reasoning_shows_none(serve: Serve, visit: Visit) -> None:
    running = await serve("It is.")
    await visit.open(running.url)
    await visit.ask("Is it?")
    await visit.answered()
    assert await visit.page.locator(".reasoning").is_hidden()


@pytest.mark.parametrize("key", [False, True])
async def test_an_answer_can_be_stopped(key: bool, serve: Serve, visit: Visit) -> None:
    running = await serve(STORY, engine={"pauses_after": PAUSE})
    await visit.open(running.url)
    await visit.ask("Tell me a story.")
    await visit.sees(".answer", "Once upon a time")
    await (visit.page.press("#prompt", "Escape") if key else visit.page.click("#send"))
    await running.engine.idle.wait()
    assert len(running.engine.aborted) == 1
    assert (await visit.answered()).startswith("Once upon a time")
    await visit.sees(".figures", "stopped")


async def test_chats_survive_a_reload(serve: Serve, visit: Visit) -> None:
    running = await serve("A green square.")
    await visit.open(running.url)
    await visit.upload()
    await visit.ask("What is this?")
    await visit.answered()
    await visit.page.reload()
    assert await visit.answered() == "A green square."
    await visit.sees("#history [aria-current]", "What is this?")
    await visit.page.wait_for_function("() => document.querySelector('.user img').naturalWidth === 280")
    await visit.ask("And now?")
    await visit.answered(2)
    assert len(sources(running)) == 2  # the picture is sent again with the second turn


async def test_a_reload_in_the_middle_keeps_what_was_asked(serve: Serve, visit: Visit) -> None:
    running = await serve(STORY, engine={"pauses_after": PAUSE})
    await visit.open(running.url)
    await visit.ask("Tell me a story.")
    await visit.sees(".answer", "Once upon a time")
    await visit.page.reload()
    await visit.sees(".user .bubble", "Tell me a story.")
    await visit.sees(".figures", "stopped")


async def test_chats_are_chosen_and_deleted(serve: Serve, visit: Visit) -> None:
    running = await serve("hello")
    await visit.open(running.url)
    await visit.ask("first")
    await visit.answered()
    await visit.page.click("#sidebar .new-chat")
    await visit.ask("second")
    await visit.sees("#history [aria-current]", "second")
    await visit.page.click("#history .chat >> text=first")
    await visit.sees(".bubble", "first")
    await visit.page.hover("#history li:has-text('first')")
    await visit.page.click("[aria-label='Delete “first”']")
    await visit.page.click("#delete-dialog >> text=Delete >> nth=-1")
    await visit.sees("#welcome")
    assert await visit.page.locator("#history .chat").all_inner_texts() == ["second"]


async def test_a_refusal_is_shown_and_can_be_tried_again(serve: Serve, visit: Visit) -> None:
    running = await serve("hello")
    await visit.open(running.url)
    await visit.fill_parameters({"max-tokens": "100000"})
    await visit.ask("hi")
    await visit.sees(".problem", "context")
    await visit.fill_parameters({"max-tokens": ""})
    await visit.page.click("[aria-label='Try again']")
    assert await visit.answered() == "hello"


async def test_an_error_in_the_middle_keeps_the_text(serve: Serve, visit: Visit) -> None:
    running = await serve(STORY, engine={"failure": "the engine tripped", "fails_after": PAUSE})
    await visit.open(running.url)
    await visit.ask("Tell me a story.")
    await visit.sees(".problem", "the engine tripped")
    assert (await visit.answered()).startswith("Once upon a time")


async def test_a_medium_that_is_refused_is_explained(serve: Serve, visit: Visit) -> None:
    from dashinfer_vlm.errors import MediaRefusedError

    loader = ScriptedLoader(fails={"http://127.0.0.1/cat.png": MediaRefusedError("127.0.0.1 is private")})
    running = await serve("hello", loader=loader)
    await visit.open(running.url)
    await visit.add_url("http://127.0.0.1/cat.png")
    await visit.sees("#tray .medium-name", "cat.png")
    await visit.ask("What is this?")
    await visit.sees(".problem", "127.0.0.1 is private")


async def test_parameters_reach_the_engine(serve: Serve, visit: Visit) -> None:
    running = await serve("hello")
    await visit.open(running.url)
    await visit.fill_parameters({"temperature": "0.3", "top-p": "0.8", "max-tokens": "2", "system": "Be brief."})
    await visit.page.reload()
    await visit.sees("#model:not(:empty)")
    await visit.ask("hi")
    await visit.answered()
    params = running.engine.requests[0].params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.3, 0.8, 2)
    prompt = running.service.tokenizer.decode(running.engine.requests[0].prompt_ids, skip_special=False)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt


async def test_a_turn_is_edited_and_what_followed_is_forgotten(serve: Serve, visit: Visit) -> None:
    running = await serve("hello")
    await visit.open(running.url)
    await visit.ask("first")
    await visit.answered()
    await visit.ask("second")
    await visit.answered(2)
    await visit.page.hover(".user >> nth=0")
    await visit.page.click(".user >> nth=0 >> [aria-label=Edit]")
    await visit.page.fill(".editor textarea", "other")
    await visit.page.press(".editor textarea", "Enter")
    await visit.sees(".bubble", "other")
    await visit.answered(1)
    assert await visit.page.locator(".bubble").all_inner_texts() == ["other"]
    prompt = running.service.tokenizer.decode(running.engine.requests[-1].prompt_ids, skip_special=False)
    assert "first" not in prompt
    assert "second" not in prompt


async def test_a_schema_that_is_no_json_is_not_sent(serve: Serve, visit: Visit) -> None:
    running = await serve("hello")
    await visit.open(running.url)
    await visit.fill_parameters({"schema": "{nonsense"})
    await visit.sees("#schema-problem", "no JSON")
    await visit.ask("hi")
    assert running.engine.requests == []
    await visit.fill_parameters({"schema": ""})
    await visit.page.press("#prompt", "Enter")
    assert await visit.answered() == "hello"


async def test_a_schema_is_sent_as_response_format(serve: Serve, visit: Visit) -> None:
    running = await serve("hello")
    await visit.open(running.url)
    await visit.fill_parameters({"schema": '{"type": "object"}'})
    async with visit.page.expect_request("**/v1/chat/completions") as sent:
        await visit.ask("hi")
    body = (await sent.value).post_data_json
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": {"type": "object"}},
    }
    await visit.answered()


async def test_with_keys_on_the_page_asks_for_one(serve: Serve, visit: Visit) -> None:
    running = await serve("hello", config={"api_keys": ("secret",)})
    await visit.page.goto(running.url)
    await visit.page.fill("#key", "wrong")
    await visit.page.press("#key", "Enter")
    await visit.sees("#key-problem", "does not know")
    await visit.page.fill("#key", "secret")
    await visit.page.press("#key", "Enter")
    await visit.sees("#model", "models/scripted")
    await visit.page.reload()
    await visit.sees("#model", "models/scripted")
    await visit.ask("hi")
    assert await visit.answered() == "hello"


async def test_a_server_that_is_gone_is_told(serve: Serve, visit: Visit) -> None:
    running = await serve("hello")
    await visit.open(running.url)
    await visit.page.route("**/v1/chat/completions", lambda route: route.abort())
    await visit.ask("hi")
    await visit.sees(".problem", "cannot be reached")


async def test_colours_are_chosen_and_kept(serve: Serve, visit: Visit) -> None:
    running = await serve("hello")
    await visit.open(running.url)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = await visit.page.evaluate(ground)
    await visit.page.click("#theme")
    dark = await visit.page.evaluate(ground)
    assert dark != light
    await visit.page.reload()
    assert await visit.page.evaluate(ground) == dark


async def test_the_end_of_a_long_answer_stays_in_sight_unless_the_user_leaves_it(serve: Serve, visit: Visit) -> None:
    running = await serve("\n\n".join(f"Line {i}." for i in range(60)), engine={"pauses_after": 200})
    await visit.open(running.url)
    at_end = "() => { const s = document.getElementById('scroller'); return s.scrollHeight - s.scrollTop - s.clientHeight < 2; }"  # noqa: E501
    await visit.ask("Count.")
    await visit.sees(".answer", "Line 20.")
    await visit.page.wait_for_function(at_end)
    await visit.page.hover(".answer p >> nth=-3")
    await visit.page.mouse.wheel(0, -400)
    running.engine.resume.set()
    await visit.answered()
    assert not await visit.page.evaluate(f"({at_end})()")
