"""The body of `POST /v1/responses`, in the three lists of every body: works, has no effect, is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag

from dashinfer_vlm.errors import InvalidRequestError, UnsupportedError
from dashinfer_vlm.frontend.conversation import ProcessorBody
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.schema import Body, Whole, by_shape, no_effect, only
from dashinfer_vlm.frontend.structured import Schema
from dashinfer_vlm.frontend.tool_schema import function_only, functions_only
from dashinfer_vlm.frontend.tools import Tool, ToolChoice, check_tool_name, offer
from dashinfer_vlm.request import Grammar
from dashinfer_vlm.server.responses.items import Input
from dashinfer_vlm.server.sampling import NumLogprobs, SamplingBody

Includable = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
"""All but `message.output_text.logprobs` have no effect: pictures and reasoning are told anyway, and the rest is about
tools that are refused."""


class FormatBody(Body):
    """What form the text of the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    description: Annotated[str | None, no_effect] = None
    """For people: the model is not shown it."""
    strict: Annotated[bool | None, no_effect] = None
    """An answer follows the schema either way."""

    def grammar(self) -> Grammar | None:
        """Raises InvalidRequestError where the schema is missing, or is there for another type."""
        param = "text.format"
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise InvalidRequestError(f"{param} has a schema if and only if its type is json_schema", param=param)
        if self.schema_ is not None:
            return Grammar.json_schema(self.schema_, param=param)
        return Grammar.json_object(param=param) if self.type == "json_object" else None


class TextConfigBody(Body):
    format: FormatBody | None = None
    verbosity: Annotated[Any, only("medium")] = None


class ReasoningBody(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Annotated[Any, only("auto")] = None
    """Reasoning is told as it is, and needs no summary."""
    generate_summary: Annotated[Any, only("auto")] = None
    context: Annotated[Any, only("auto")] = None
    mode: Annotated[Any, only("standard")] = None


class ResponseToolBody(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """As at OpenAI, and other than in chat, arguments follow the schema unless this is false."""
    defer_loading: Annotated[Any, only(False)] = None
    allowed_callers: Annotated[Any, only(["direct"])] = None
    async_: Annotated[Any, only(False)] = Field(None, alias="async")
    output_schema: Annotated[dict[str, Any] | None, no_effect] = None
    """For programs that call tools; the model is not shown it."""

    def tool(self, where: str) -> Tool:
        """Raises InvalidRequestError for a name that cannot be."""
        check_tool_name(self.name, f"{where}.name")
        schema = {} if self.parameters is None else {"parameters": self.parameters}
        return Tool(name=self.name, description=self.description, strict=self.strict is not False, **schema)


class ResponseToolNameBody(Body):
    type: Literal["function"]
    name: str


class ResponseChoiceBody(Body):
    """`{"type": "function", "name": ...}` or `{"type": "allowed_tools", "mode": ..., "tools": [...]}`."""

    type: Literal["function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[Annotated[ResponseToolNameBody, function_only]] | None = Field(None, min_length=1)

    def choice(self, *, parallel: bool) -> ToolChoice:
        """Raises InvalidRequestError for fields of the other type."""
        if self.type == "function" and self.name is not None and self.mode is None and self.tools is None:
            return ToolChoice(must_call=True, names=(self.name,), parallel=False)
        if self.type == "allowed_tools" and self.name is None and self.mode is not None and self.tools is not None:
            names = tuple(tool.name for tool in self.tools)
            return ToolChoice(must_call=self.mode == "required", names=names, parallel=parallel)
        raise InvalidRequestError(f"tool_choice has type {self.type!r} and not its fields alone", param="tool_choice")


ResponseToolChoiceBody = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(":text")] | Annotated[ResponseChoiceBody, Tag(":object")],
    by_shape,
    functions_only,
]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class ResponseStreamOptions(Body):
    include_obfuscation: Annotated[bool | None, no_effect] = None
    """OpenAI pads events against eavesdroppers when true; the padding is optional and absent here."""


class PromptedBody(Body):
    """What the prompt is made of; enough to count its tokens."""

    input: Input
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Annotated[ResponseToolBody, function_only]] | None = None
    tool_choice: ResponseToolChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningBody | None = None
    text: TextConfigBody | None = None
    truncation: Annotated[Any, only("disabled")] = None
    conversation: Annotated[Any, only()] = None
    # extensions, named as in vLLM
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: ProcessorBody | None = None

    def offered(self) -> tuple[tuple[Tool, ...], ToolChoice]:
        """The tools that the model is shown, and how it may choose. Raises InvalidRequestError."""
        tools = [body.tool(f"tools[{i}]") for i, body in enumerate(self.tools or ())]
        parallel = self.parallel_tool_calls is not False
        if isinstance(self.tool_choice, ResponseChoiceBody):
            return offer(tools, self.tool_choice.choice(parallel=parallel))
        if self.tool_choice == "none":
            return offer(tools, None)
        return offer(tools, ToolChoice(must_call=self.tool_choice == "required", parallel=parallel))

    @property
    def grammar(self) -> Grammar | None:
        return self.text.format.grammar() if self.text and self.text.format else None


class ResponseBody(SamplingBody, PromptedBody):
    """`POST /v1/responses`."""

    max_output_tokens: Whole | None = None
    top_logprobs: NumLogprobs | None = None
    include: list[Includable] | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: Annotated[Metadata | None, no_effect] = None
    """Kept with the response."""
    stream_options: ResponseStreamOptions | None = None

    # no effect by their nature
    max_tool_calls: Annotated[Whole | None, no_effect] = None
    """Of built-in tools, of which there are none."""

    # known, not served
    access_programs: Annotated[Any, only()] = None
    background_options: Annotated[Any, only({})] = None
    context_management: Annotated[Any, only([])] = None
    image: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    prompt: Annotated[Any, only()] = None

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    def params(self, defaults: dict[str, float | int]) -> GenerationParams:
        """Raises InvalidRequestError for fields that contradict each other."""
        if self.stream_options and not self.stream:
            raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
        if self.top_logprobs and not self.wants_logprobs:
            raise InvalidRequestError(
                "top_logprobs needs message.output_text.logprobs in include", param="top_logprobs"
            )
        if self.background and self.stream:
            raise UnsupportedError(
                "background and stream are not supported together; leave stream out and poll GET /v1/responses/{id}",
                param="stream",
            )
        if self.background and not self.is_stored:
            raise InvalidRequestError("background needs a response that is stored", param="background")
        logprobs = (self.top_logprobs or 0) if self.wants_logprobs else None
        params = self.sampled(defaults, max_tokens=self.max_output_tokens, logprobs=logprobs, grammar=self.grammar)
        return replace(params, max_tokens_name="max_output_tokens")


class CountBody(PromptedBody):
    """`POST /v1/responses/input_tokens`."""

    model: str | None = None
    personality: Annotated[Any, only()] = None


class RetrieveQuery(BaseModel):
    """The query of `GET /v1/responses/{id}`."""

    model_config = ConfigDict(extra="forbid")

    include: list[Includable] | None = None
    include_obfuscation: bool | None = None
    stream: Annotated[bool | None, only(False)] = None
    starting_after: Annotated[int | None, only()] = None


class ItemsQuery(BaseModel):
    """The query of `GET /v1/responses/{id}/input_items`."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = None
    include: list[Includable] | None = None
    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"
