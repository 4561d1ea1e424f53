"""The request bodies of the OpenAI API, with the extensions that users of vLLM and DashInfer send.

A field is in one of three lists: it works; it has no effect here by its nature (`user`, `metadata`, ...) and is
accepted; or it is known and unsupported, and then any value but "not used" is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.messages import MediaPart, Message, Part, TextPart, ToolCall
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.media.types import MediaRef
from dashinfer_vlm.request import ItemKind, SamplingParams
from dashinfer_vlm.server.schema import Body, Prompts, TextOrTexts, only, shape_of_content

LOW_DETAIL_PIXELS = 512 * 512
"""`detail: "low"`: the size that OpenAI documents for it."""

_SAMPLED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "seed",
    "min_tokens",
    "logit_bias",
)


class Pixels(Body):
    """Bounds for one image or video, within the server's own."""

    min_pixels: int | None = Field(None, ge=1)
    max_pixels: int | None = Field(None, ge=1)


class ImageUrl(Pixels):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class VideoUrl(Pixels):
    url: str
    fps: float | None = Field(None, gt=0, allow_inf_nan=False)


class TextBody(Body):
    type: Literal["text"]
    text: str


class ImageBody(Body):
    type: Literal["image_url"]
    image_url: ImageUrl
    uuid: str | None = None
    """Accepted; identity here is the content itself."""

    def ref(self, where: str, bounds: tuple[int, int]) -> MediaRef:
        image, max_pixels = self.image_url, self.image_url.max_pixels
        if image.detail == "low" and max_pixels is None:
            least, most = bounds
            max_pixels = min(max(LOW_DETAIL_PIXELS, image.min_pixels or least), most)
        return _ref("image", image.url, where, image.min_pixels, max_pixels)


class VideoUrlBody(Body):
    type: Literal["video_url"]
    video_url: VideoUrl
    uuid: str | None = None

    def ref(self, where: str, bounds: tuple[int, int]) -> MediaRef:
        video = self.video_url
        return _ref("video", video.url, where, video.min_pixels, video.max_pixels, video.fps)


class VideoBody(Pixels):
    """A video as the list of its frames, each an image URL."""

    type: Literal["video"]
    video: list[str] = Field(min_length=1)
    fps: float | None = Field(None, gt=0, allow_inf_nan=False)
    uuid: str | None = None

    def ref(self, where: str, bounds: tuple[int, int]) -> MediaRef:
        return _ref("video", tuple(self.video), where, self.min_pixels, self.max_pixels, self.fps)


def _part_type(value: Any) -> str | None:
    return f":{value.get('type')}" if isinstance(value, dict) else None


PartBody = Annotated[
    Annotated[TextBody, Tag(":text")]
    | Annotated[ImageBody, Tag(":image_url")]
    | Annotated[VideoUrlBody, Tag(":video_url")]
    | Annotated[VideoBody, Tag(":video")],
    Discriminator(_part_type),
]
Content = Annotated[Annotated[str, Tag(":text")] | Annotated[list[PartBody], Tag(":list")], shape_of_content]


class FunctionBody(Body):
    name: str
    arguments: str


class ToolCallBody(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionBody
    index: int | None = None


class MessageBody(Body):
    """A turn; answers of this API may be sent back as they came."""

    role: str
    content: Content | None = None
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = Field(None, pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    refusal: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    reasoning: Annotated[Any, only()] = None
    reasoning_content: Annotated[Any, only()] = None

    def message(self, where: str, bounds: tuple[int, int]) -> Message:
        """`developer` is OpenAI's newer word for `system`; `bounds` are the least and most pixels of an image here."""
        if self.content is None and not self.tool_calls:
            raise InvalidRequestError(f"{where}.content is missing", param=f"{where}.content")
        return Message(
            role="system" if self.role == "developer" else self.role,
            content=_content(self.content, f"{where}.content", bounds),
            name=self.name,
            tool_calls=tuple(
                ToolCall(id=c.id, name=c.function.name, arguments=c.function.arguments) for c in self.tool_calls or ()
            ),
            tool_call_id=self.tool_call_id,
        )


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None
    """OpenAI pads chunks against eavesdroppers when true; the padding is optional and absent here."""
    continuous_usage_stats: Annotated[Any, only(False)] = None


class GenerationBody(Body):
    """What chat and text completions share."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    stop: TextOrTexts | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None

    # extensions, named as in vLLM
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None

    # no effect by their nature
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    request_id: str | None = None

    # known, not served
    best_of: Annotated[Any, only(1)] = None
    use_beam_search: Annotated[Any, only(False)] = None
    length_penalty: Annotated[Any, only(1, 1.0)] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    structured_outputs: Annotated[Any, only()] = None
    guided_json: Annotated[Any, only()] = None
    guided_regex: Annotated[Any, only()] = None
    guided_choice: Annotated[Any, only()] = None
    guided_grammar: Annotated[Any, only()] = None
    prompt_logprobs: Annotated[Any, only()] = None
    priority: Annotated[Any, only(0)] = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_stream_options(self) -> None:
        if self.stream_options and not self.stream:
            raise InvalidRequestError("stream_options needs stream: true", param="stream_options")

    def _params(
        self, defaults: dict[str, float | int], max_tokens: int | None, logprobs: int | None
    ) -> GenerationParams:
        """`defaults` are the checkpoint's `generation_config.json`, as in vLLM; what the request says goes first."""
        sent = {name: value for name in _SAMPLED if (value := getattr(self, name)) is not None}
        fields: dict[str, Any] = {**defaults, **sent}
        if fields.get("top_k") == -1:  # vLLM's way to say "off"
            fields["top_k"] = 0
        sampling = SamplingParams(
            **fields,
            max_tokens=max_tokens,
            logprobs=logprobs,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )
        return GenerationParams(
            sampling=sampling,
            n=1 if self.n is None else self.n,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            skip_special_tokens=self.skip_special_tokens is not False,
        )


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: list[MessageBody]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    # without tools there is nothing to choose
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    # asks to keep the answer; nothing is kept here
    store: Annotated[Any, only(False)] = None
    modalities: Annotated[Any, only(["text"])] = None

    tools: Annotated[Any, only([])] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only()] = None
    verbosity: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    echo: Annotated[Any, only(False)] = None
    add_generation_prompt: Annotated[Any, only(True)] = None
    continue_final_message: Annotated[Any, only(False)] = None
    chat_template: Annotated[Any, only()] = None
    chat_template_kwargs: Annotated[Any, only({})] = None
    documents: Annotated[Any, only([])] = None
    mm_processor_kwargs: Annotated[Any, only({})] = None

    def params(self, defaults: dict[str, float | int]) -> GenerationParams:
        """Raises InvalidRequestError for fields that contradict each other."""
        self.check_stream_options()
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise InvalidRequestError(
                f"max_tokens is {self.max_tokens}, max_completion_tokens {self.max_completion_tokens}; send one of them",
                param="max_completion_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return self._params(defaults, limits.pop() if limits else None, self._num_logprobs())

    def _num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`. Text prompts are plain text; a prompt of ids may hold any id of the vocabulary."""

    prompt: Prompts
    max_tokens: int | None = 16
    """OpenAI's default for this route; null runs to the end of the context."""
    logprobs: int | None = None

    echo: Annotated[Any, only(False)] = None
    suffix: Annotated[Any, only("")] = None

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequestError("prompt is an empty list", param="prompt")
        if isinstance(self.prompt[0], int):
            return [[i for i in self.prompt if isinstance(i, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    def params(self, defaults: dict[str, float | int]) -> GenerationParams:
        self.check_stream_options()
        return self._params(defaults, self.max_tokens, self.logprobs)


def conversation(messages: Sequence[MessageBody], bounds: tuple[int, int]) -> list[Message]:
    """`bounds` are the least and most pixels of an image here. Raises InvalidRequestError."""
    return [body.message(f"messages[{i}]", bounds) for i, body in enumerate(messages)]


def _content(content: str | list[Any] | None, where: str, bounds: tuple[int, int]) -> str | tuple[Part, ...]:
    if content is None or isinstance(content, str):
        return content or ""
    return tuple(
        TextPart(part.text) if isinstance(part, TextBody) else MediaPart(part.ref(f"{where}[{i}]", bounds))
        for i, part in enumerate(content)
    )


def _ref(
    kind: ItemKind,
    source: str | tuple[str, ...],
    where: str,
    min_pixels: int | None,
    max_pixels: int | None,
    fps: float | None = None,
) -> MediaRef:
    return MediaRef(kind=kind, source=source, min_pixels=min_pixels, max_pixels=max_pixels, fps=fps, param=where)
