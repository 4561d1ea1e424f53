"""Messages, or text, to what the engine takes: ids with every item's placeholders in place, and the items."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import anyio

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.answer_parser import PLAIN, AnswerForm
from dashinfer_vlm.frontend.context import check_prompt, check_total, too_long
from dashinfer_vlm.frontend.expansion import Expander, ExpandItem, one_run
from dashinfer_vlm.frontend.messages import Dialogue, MediaPart, validate_messages
from dashinfer_vlm.frontend.params import DEFAULT_PARAMS, GenerationParams
from dashinfer_vlm.frontend.scores import NO_SCORES, Pair, ScoreForm
from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tenants import current_tenant
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.frontend.vectors import NO_VECTORS, VectorForm
from dashinfer_vlm.media.turns import ANYBODY, Party
from dashinfer_vlm.media.types import LoadedMedia, MediaCounters, MediaRef
from dashinfer_vlm.models.family import BoxUnit
from dashinfer_vlm.request import Item, ItemKind

T = TypeVar("T")
Held = TypeVar("Held", LoadedMedia, "Prompt")

_SHORT_CHARS = 4000
"""About 3 ms of template and tokenizer."""
_TURN_CHARS = 40
"""A turn without text takes the template as long as this many characters."""
_LOADS_AT_ONCE = 8
"""Media of one request that are on their way together, so that its neighbours' media get their turn too."""
_PAIRS_AT_ONCE = 4
"""Likewise."""


class Loader(Protocol):
    """Who fetches and decodes; `media.loader.MediaLoader` is the real one."""

    max_patches: int | None
    """Patches of one medium that the engine's encoder has memory for; set once the engine is known."""

    @property
    def pixel_bounds(self) -> tuple[int, int]:
        """The least and the most pixels that a reference may ask for."""
        ...

    @property
    def side_step(self) -> int:
        """Both sides of a resized picture are multiples of this many pixels."""
        ...

    @property
    def counters(self) -> MediaCounters:
        """What it has done so far, for metrics."""
        ...

    async def start(self) -> None:
        """Get ready ahead of the first load."""
        ...

    async def load(self, ref: MediaRef, party: Party = ANYBODY, *, salt: str = "") -> LoadedMedia:
        """`party` is whom it is for: owners take turns, and their requests. Items with another `salt` share nothing."""
        ...

    async def close(self) -> None:
        """Give back what was started; idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids and items of one request. Its owner calls `release` once, after the engine's last word on it."""

    ids: list[int]
    items: tuple[Item, ...] = ()
    form: AnswerForm = PLAIN
    """How its answers are to be read."""
    media: tuple[LoadedMedia, ...] = field(default=(), repr=False)

    def release(self) -> None:
        for medium in self.media:
            medium.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBuilder:
    """Turns what a client wrote into prompts for one model."""

    tokenizer: Tokenizer
    template: ChatTemplate
    loader: Loader
    placeholder_ids: Mapping[ItemKind, int]
    """The token that stands for each kind of item."""
    max_model_len: int
    """Prompt plus output tokens at most."""
    vocab_size: int
    expand_item: ExpandItem = one_run
    """What the model's family puts in the place of a placeholder."""
    box_unit: BoxUnit = "pixels"
    """What the numbers of boxes in the model's answers count."""
    vectors: VectorForm = NO_VECTORS
    """How the prompts are written that are answered with a vector."""
    scores: ScoreForm = NO_SCORES
    """... with a score."""
    max_items: Mapping[str, int] = field(default_factory=dict)
    """Items of a kind in one prompt at most; kinds that are absent have no limit."""

    async def chat(
        self,
        dialogue: Dialogue,
        params: GenerationParams = DEFAULT_PARAMS,
        *,
        media_salt: str = "",
        ending: tuple[int, ...] = (),
    ) -> Prompt:
        """Render, fetch and expand; `params` say how the prompt ends, and how many tokens are to follow. Media are
        shared only with prompts that have the same `media_salt`. The last tokens are the `ending`, whatever is cut.

        Raises InvalidRequestError for messages that cannot be, ContextLengthError when prompt and answer do not fit,
        and MediaError for the first medium that cannot be used (the others are given back).
        """
        messages, param = dialogue.messages, dialogue.param
        validate_messages(messages)
        refs = [ref for message in messages for ref in message.refs]
        self._check_items(refs, param)
        num_chars = sum(message.num_chars for message in messages) + dialogue.num_tool_chars
        self._check_chars(num_chars, param, self.max_model_len)
        effort = num_chars + sum(_TURN_CHARS + message.num_argument_chars for message in messages)
        encode = partial(self.template.encode, then=params.next)
        ids = self._cut(await _encode(effort, encode, dialogue, self._most(params), param), params, ending)
        self._check_placeholders(ids, len(refs), params)
        check_prompt(len(ids), self.max_model_len, param, len(refs))  # before anything is fetched
        form = self.template.answer_form(dialogue, ids)
        if not refs:
            return replace(self._finish(ids, (), params, param), form=form)
        media = await _load_all(self.loader, refs, media_salt)
        try:
            return replace(self._finish(ids, media, params, param), form=form)
        except BaseException:
            for medium in media:
                medium.release()
            raise

    async def text(
        self,
        prompt: str | Sequence[int],
        params: GenerationParams = DEFAULT_PARAMS,
        *,
        ending: tuple[int, ...] = (),
        param: str = "prompt",
    ) -> Prompt:
        """A prompt without template and items; text is plain text, ids may be any of the vocabulary. `param` is what
        its caller calls it, the `ending` as in `chat`.

        Raises as `chat` does.
        """
        if params.next != "answer":
            name = "continue_final_message" if params.continue_final_message else "add_generation_prompt"
            raise InvalidRequestError(f"{name} is about conversations; a text goes on anyway", param=name)
        if not prompt:
            raise InvalidRequestError(f"the {param} is empty", param=param)
        if isinstance(prompt, str):
            prompt = await self.text_ids(prompt, self.max_model_len, params, param)
        ids = self._cut(prompt, params, ending)
        for id in (min(ids), max(ids)):
            if not 0 <= id < self.vocab_size:
                raise InvalidRequestError(
                    f"the {param} holds id {id}; ids are from 0 to {self.vocab_size - 1}", param=param
                )
        return self._finish(ids, (), params, param)

    async def for_vectors(
        self, inputs: Sequence[str | Sequence[int]], params: GenerationParams, ending: tuple[int, ...]
    ) -> list[Prompt]:
        """Texts as this model is to be asked for their vectors; ids are taken as they are. Raises as `chat` does."""
        prompts = []
        for each in inputs:
            prompts.append(await self._for_vector(each, params, ending))
            await asyncio.sleep(0)  # short texts are encoded here and now, and there may be thousands
        return prompts

    async def _for_vector(
        self, prompt: str | Sequence[int], params: GenerationParams, ending: tuple[int, ...]
    ) -> Prompt:
        if not isinstance(prompt, str):
            return await self.text(prompt, params, param="input")
        if prompt and self.vectors.is_conversation:
            return await self.chat(self.vectors.dialogue(prompt), params, ending=ending)
        return await self.text(prompt, params, ending=ending, param="input")

    async def for_scores(
        self, pairs: Sequence[Pair], params: GenerationParams, instruction: str | None, *, media_salt: str = ""
    ) -> tuple[Prompt, ...]:
        """Pairs as this model is to be asked for their scores. Raises as `chat` does, and none is left then; all media
        of the pairs together are held, and count as those of one prompt."""
        form, places = self.scores, asyncio.Semaphore(_PAIRS_AT_ONCE)
        assert form.template is not None, "the model scores no pairs"
        parts = [part for pair in pairs for side in (pair.query, pair.document) for part in side]
        media = {id(part): part for part in parts if isinstance(part, MediaPart)}
        self._check_items([part.ref for part in media.values()], "documents")
        builder = replace(self, template=form.template)

        async def build(pair: Pair) -> Prompt:
            async with places:
                dialogue = form.dialogue(pair, instruction)
                return await builder.chat(dialogue, params, media_salt=media_salt, ending=form.ending)

        return await _all(build(pair) for pair in pairs)

    async def text_ids(
        self, text: str, most: int, params: GenerationParams = DEFAULT_PARAMS, param: str = "prompt"
    ) -> list[int]:
        """Ids of plain text, in which only marks are special; raises ContextLengthError for more than `most`, unless
        `params` say that they will be cut."""
        self._check_chars(len(text), param, most)

        def encode(text: str, most: int | None) -> list[int]:
            return self.tokenizer.encode_marked(text, most=most)

        return await _encode(len(text), encode, text, None if params.truncation else most, param)

    def _most(self, params: GenerationParams) -> int | None:
        """Tokens beyond which a prompt need not be encoded to its end."""
        return None if params.truncation else self.max_model_len

    def _cut(self, ids: Sequence[int], params: GenerationParams, ending: tuple[int, ...]) -> list[int]:
        """With the ending behind what is left of them."""
        if params.truncation is not None:
            ids = params.truncation.cut(ids, self.max_model_len - len(ending), params.sampling.max_tokens)
        return [*ids, *ending]

    def _check_placeholders(self, ids: list[int], num_items: int, params: GenerationParams) -> None:
        if params.truncation is None:
            return
        num_left = sum(map(ids.count, self.placeholder_ids.values()))
        if num_left != num_items:
            raise InvalidRequestError(
                f"truncate_prompt_tokens takes away {num_items - num_left} of {num_items} images and videos; "
                "leave them out of the messages, or keep more tokens",
                param="truncate_prompt_tokens",
            )

    def _finish(self, ids: Sequence[int], media: Sequence[LoadedMedia], params: GenerationParams, param: str) -> Prompt:
        full, items = Expander(self.tokenizer, self.placeholder_ids, self.expand_item)(ids, media, param)
        max_tokens = None if params.ends_with_context else params.sampling.max_tokens
        check_total(len(full), max_tokens, self.max_model_len, param, params.max_tokens_name)
        return Prompt(full, items, media=tuple(media))

    def _check_items(self, refs: Sequence[MediaRef], param: str) -> None:
        for kind in dict.fromkeys(ref.kind for ref in refs):
            count, limit = sum(ref.kind == kind for ref in refs), self.max_items.get(kind)
            if kind not in self.placeholder_ids:
                raise InvalidRequestError(f"the model takes no {kind} input", param=param)
            if limit is not None and count > limit:
                raise InvalidRequestError(
                    f"the {param} hold {count} {kind}s, the limit is {limit}; send fewer or start with "
                    f"--limit-mm-per-prompt",
                    param=param,
                )

    def _check_chars(self, num_chars: int, param: str, most_tokens: int) -> None:
        """What cannot fit is refused before it costs anything."""
        most = most_tokens * self.tokenizer.max_chars_per_token
        if num_chars > most:
            reason = f"your {param} have {num_chars} characters, and no text of more than {most} fits; shorten it."
            raise too_long(self.max_model_len, reason, param)


async def _encode(
    effort: int, encode: Callable[[T, int | None], list[int]], text: T, most: int | None, param: str
) -> list[int]:
    """Long texts are encoded in a thread; for short ones the change of threads would cost more than it saves."""
    try:
        if effort <= _SHORT_CHARS:
            return encode(text, most)
        return await asyncio.to_thread(encode, text, most)
    except InvalidRequestError as error:
        error.param = error.param or param
        raise


async def _load_all(loader: Loader, refs: Sequence[MediaRef], salt: str) -> tuple[LoadedMedia, ...]:
    """Load a few at a time."""
    places, party = asyncio.Semaphore(_LOADS_AT_ONCE), Party(current_tenant.get().id, object())

    async def load(ref: MediaRef) -> LoadedMedia:
        async with places:
            return await loader.load(ref, party, salt=salt)

    return await _all(load(ref) for ref in refs)


async def _all(jobs: Iterable[Coroutine[Any, Any, Held]]) -> tuple[Held, ...]:
    """What they give; when one fails, or the caller leaves, the others are stopped and given back."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return tuple(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):  # a time that is over cancels again and again whoever waits
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if not isinstance(result, BaseException):
                    result.release()
        raise
