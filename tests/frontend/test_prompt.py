from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import pytest

from dashinfer_vlm.errors import ContextLengthError, InvalidRequestError, MediaFetchError
from dashinfer_vlm.frontend.messages import Dialogue, MediaPart, Message, TextPart
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.prompt import PromptBuilder
from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tenants import NOBODY
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.media.types import LoadedMedia, MediaRef
from dashinfer_vlm.models.family import Expansion
from dashinfer_vlm.request import ItemKind, SamplingParams
from tests.frontend.scripted import ScriptedLoader
from tests.tokens import FIRST_SPECIAL, IMAGE, MARKS, VIDEO, VISION_END, VISION_START, VOCAB

IDS: dict[ItemKind, int] = {"image": IMAGE, "video": VIDEO}


def medium(source: str, kind: ItemKind = "image") -> MediaPart:
    return MediaPart(MediaRef(kind=kind, source=source))


def user(*parts: str | MediaPart) -> Message:
    return Message(role="user", content=tuple(TextPart(p) if isinstance(p, str) else p for p in parts))


def builder(template: ChatTemplate, tokenizer: Tokenizer, loader: ScriptedLoader, **options: object) -> PromptBuilder:
    fields = {"placeholder_ids": IDS, "max_model_len": 100, "vocab_size": VOCAB} | options
    return PromptBuilder(tokenizer=tokenizer, template=template, loader=loader, **fields)  # type: ignore[arg-type]


async def test_each_placeholder_becomes_as_many_tokens_as_its_item_has(
    template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    prompts = builder(template, tokenizer, ScriptedLoader(num_tokens=3))
    prompt = await prompts.chat(Dialogue([user("a", medium("one"), medium("film", "video")), user(medium("two"))]))
    assert [item.kind for item in prompt.items] == ["image", "video", "image"]
    assert [item.content_hash.strip() for item in prompt.items] == [b"one", b"film", b"two"]
    for item in prompt.items:
        assert prompt.ids[item.start : item.start + item.num_tokens] == [IDS[item.kind]] * 3
        assert {prompt.ids[item.start - 1], prompt.ids[item.start + 3]} == {VISION_START, VISION_END}


async def test_the_items_of_a_prompt_share_its_turns_with_no_other(
    template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    loader = ScriptedLoader()
    prompts = builder(template, tokenizer, loader)
    for names in ("ab", "cd"):
        (await prompts.chat(Dialogue([user(*(medium(f"http://host/{name}") for name in names))]))).release()
    first, second = loader.parties[:2], loader.parties[2:]
    assert (len(set(first)), len(set(second)), len({*first, *second})) == (1, 1, 2)
    assert {party.owner for party in loader.parties} == {NOBODY.id}


async def test_media_are_given_back_whatever_goes_wrong_with_their_placeholders(
    template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    def broken(medium: LoadedMedia, encode: Callable[[str], list[int]]) -> Expansion:
        raise ZeroDivisionError("a family that did not foresee this")

    loader = ScriptedLoader()
    with pytest.raises(ZeroDivisionError):
        await builder(template, tokenizer, loader, expand_item=broken).chat(Dialogue([user(medium("one"))]))
    assert (len(loader.loaded), loader.num_held) == (1, 0)


async def test_release_gives_every_medium_back(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    loader = ScriptedLoader()
    prompt = await builder(template, tokenizer, loader).chat(Dialogue([user(medium("one"), medium("two"))]))
    assert loader.num_held == 2
    prompt.release()
    assert loader.num_held == 0


async def test_one_failing_medium_gives_the_others_back(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    loader = ScriptedLoader(fails={"bad": MediaFetchError("no such host")}, hangs={"slow"})
    with pytest.raises(MediaFetchError, match="no such host"):
        await builder(template, tokenizer, loader).chat(Dialogue([user(medium("good"), medium("slow"), medium("bad"))]))
    assert [ref.source for ref in loader.loaded] == ["good"]
    assert loader.num_held == 0


async def test_a_caller_that_leaves_gives_every_medium_back(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    loader = ScriptedLoader(hangs={"slow"})
    task = asyncio.ensure_future(
        builder(template, tokenizer, loader).chat(Dialogue([user(medium("good"), medium("slow"))]))
    )
    await loader.hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert loader.loaded
    assert loader.num_held == 0


async def test_a_template_without_placeholders_is_told_with_both_numbers(tokenizer: Tokenizer) -> None:
    loader = ScriptedLoader()
    silent = ChatTemplate("{{ messages[0].role }}", tokenizer)
    with pytest.raises(InvalidRequestError, match="0 image placeholders for 2 images"):
        await builder(silent, tokenizer, loader).chat(Dialogue([user(medium("one"), medium("two"))]))
    assert loader.num_held == 0


async def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_fetched(
    template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    loader = ScriptedLoader()
    with pytest.raises(
        ContextLengthError, match=r"maximum context length is 100 tokens\. .* at least 5\d\d tokens.* one"
    ):
        await builder(template, tokenizer, loader).chat(Dialogue([user("q!" * 250, medium("one"))]))
    assert not loader.loaded


async def test_images_count_towards_the_context(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    loader = ScriptedLoader(num_tokens=90)
    with pytest.raises(ContextLengthError, match=r"maximum context length is 100 tokens\. .* resulted in 1\d\d tokens"):
        await builder(template, tokenizer, loader).chat(Dialogue([user(medium("one"))]))
    assert loader.num_held == 0


def asks_for(max_tokens: int, name: str = "max_tokens") -> GenerationParams:
    return GenerationParams(sampling=SamplingParams(max_tokens=max_tokens), max_tokens_name=name)


async def test_outputs_that_cannot_fit_are_refused_with_their_sum(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    prompts = builder(template, tokenizer, ScriptedLoader())
    await prompts.text([1] * 60, asks_for(40))
    with pytest.raises(ContextLengthError, match=r"requested 101 tokens \(60 in the prompt, 41 in the completion\)"):
        await prompts.text([1] * 60, asks_for(41))


async def test_following_the_error_about_an_answers_length_works_with_images_too(
    template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    prompts = builder(template, tokenizer, ScriptedLoader(num_tokens=40))
    look = [user("What?", medium("one"))]
    with pytest.raises(ContextLengthError, match=r"lower max_completion_tokens to at most \d+,") as caught:
        await prompts.chat(Dialogue(look), asks_for(90, "max_completion_tokens"))
    told = re.search(r"at most (\d+)", str(caught.value))
    assert told is not None
    prompt = await prompts.chat(Dialogue(look), asks_for(int(told[1])))
    assert len(prompt.ids) + int(told[1]) == 100


async def test_a_text_may_hold_marks_and_nothing_else_that_is_special(
    template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    prompt = await builder(template, tokenizer, ScriptedLoader()).text("<|box_start|>1<|im_end|>")
    assert [id for id in prompt.ids if id >= FIRST_SPECIAL] == [MARKS[2]]


async def test_a_text_is_not_a_conversation_to_continue(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    prompts = builder(template, tokenizer, ScriptedLoader())
    for params in (GenerationParams(continue_final_message=True), GenerationParams(add_generation_prompt=False)):
        with pytest.raises(InvalidRequestError, match="about conversations"):
            await prompts.text("x", params)


async def test_more_items_than_the_limit_are_refused_with_both_numbers(
    template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    prompts = builder(template, tokenizer, ScriptedLoader(), max_items={"image": 2})
    with pytest.raises(InvalidRequestError, match="hold 3 images, the limit is 2"):
        await prompts.chat(Dialogue([user(medium("a"), medium("b")), user(medium("c"))]))
    await prompts.chat(Dialogue([user(medium("a"), medium("b"), medium("c", "video"))]))


async def test_a_kind_that_the_model_does_not_know_is_refused(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    prompts = builder(template, tokenizer, ScriptedLoader(), placeholder_ids={"image": IMAGE})
    with pytest.raises(InvalidRequestError, match="takes no video"):
        await prompts.chat(Dialogue([user(medium("film", "video"))]))


async def test_placeholder_ids_without_items_are_refused(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="1 image placeholders for 0 images"):
        await builder(template, tokenizer, ScriptedLoader()).text([1, IMAGE, 2])


async def test_an_empty_prompt_is_refused(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        await builder(template, tokenizer, ScriptedLoader()).text("")


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "messages is empty"),
        ([Message(role="robot", content="x")], r"messages\[0\].role is 'robot'; it must be one of system, user"),
        ([Message(role="system", content=(medium("one"),))], "system message with an image"),
    ],
)
async def test_conversations_that_cannot_be_are_refused(
    template: ChatTemplate, tokenizer: Tokenizer, messages: list[Message], told: str
) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        await builder(template, tokenizer, ScriptedLoader()).chat(Dialogue(messages))
