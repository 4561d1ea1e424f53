"""The request bodies of Anthropic's Messages API.

Fields are in the same three lists as in `server/protocol.py`: they work, have no effect here by their nature, or are
refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.messages import Dialogue
from dashinfer_vlm.frontend.params import MAX_STOP_STRINGS, GenerationParams
from dashinfer_vlm.frontend.schema import Body, Positive, Whole, no_effect, only, unsupported
from dashinfer_vlm.frontend.tools import FREE_CHOICE, Tool, ToolChoice, check_tool_name, offer
from dashinfer_vlm.request import Grammar, SamplingParams
from dashinfer_vlm.server.anthropic.blocks import TextOrBlocks, TurnBody
from dashinfer_vlm.server.anthropic.conversation import read_turns


def _own_tool(value: Any) -> Any:
    """Anthropic's own tools are known to its models alone."""
    if isinstance(value, dict) and value.get("type") not in (None, "custom"):
        raise unsupported(f"has type {str(value['type'])[:80]!r}; only tools of your own are served", field="type")
    return value


class CustomToolBody(Body):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    cache_control: Annotated[dict[str, Any] | None, no_effect] = None
    eager_input_streaming: Annotated[bool | None, no_effect] = None
    """No effect: arguments are streamed as soon as they are certain."""

    allowed_callers: Annotated[Any, only(["direct"])] = None
    defer_loading: Annotated[Any, only(False)] = None
    input_examples: Annotated[Any, only([])] = None

    def tool(self, where: str) -> Tool:
        """Raises InvalidRequestError for a name that cannot be."""
        check_tool_name(self.name, f"{where}.name")
        return Tool(
            name=self.name, description=self.description, strict=bool(self.strict), parameters=self.input_schema
        )


class ToolChoiceBody(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def choice(self) -> ToolChoice | None:
        """None for `none`; raises InvalidRequestError."""
        if (self.type == "tool") != (self.name is not None):
            raise InvalidRequestError(
                "tool_choice has a name if and only if its type is tool", param="tool_choice.name"
            )
        if self.name is not None:
            return ToolChoice(must_call=True, names=(self.name,), parallel=False)
        if self.type == "none":
            return None
        return ToolChoice(must_call=self.type == "any", parallel=not self.disable_parallel_tool_use)


class ThinkingConfigBody(Body):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[Positive | None, no_effect] = None
    """No bound of its own: `max_tokens` counts reasoning and answer together."""
    display: Literal["summarized", "omitted"] | None = None

    @property
    def thinks(self) -> bool | None:
        """`adaptive` leaves it to the model."""
        return None if self.type == "adaptive" else self.type == "enabled"


class OutputFormatBody(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfigBody(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormatBody | None = None


class MetadataBody(Body):
    user_id: str | None = None


class PromptBody(Body):
    """What answers and counts of tokens share."""

    model: str | None = None
    messages: list[TurnBody]
    system: TextOrBlocks | None = None
    tools: list[Annotated[CustomToolBody, BeforeValidator(_own_tool)]] | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: ThinkingConfigBody | None = None
    output_config: OutputConfigBody | None = None

    # no effect by their nature
    cache_control: Annotated[dict[str, Any] | None, no_effect] = None
    user_profile_id: Annotated[str | None, no_effect] = None
    workspace_id: Annotated[str | None, no_effect] = None

    # known, not served
    context_management: Annotated[Any, only({}, {"edits": []})] = None
    mcp_servers: Annotated[Any, only([])] = None
    speed: Annotated[Any, only("standard")] = None

    def dialogue(self) -> Dialogue:
        """Raises InvalidRequestError."""
        tools, choice = self._tools()
        return Dialogue(
            read_turns(self.system, self.messages),
            tools=tools,
            choice=choice,
            effort=None if self.output_config is None else self.output_config.effort,
            thinks=None if self.thinking is None else self.thinking.thinks,
        )

    def prompt_params(self) -> GenerationParams:
        """What the parameters say about the prompt: an assistant's last turn goes on."""
        return GenerationParams(
            continue_final_message=bool(self.messages) and self.messages[-1].role == "assistant",
            ends_with_context=True,
        )

    def _tools(self) -> tuple[tuple[Tool, ...], ToolChoice]:
        tools = [tool.tool(f"tools[{i}]") for i, tool in enumerate(self.tools or ())]
        return offer(tools, FREE_CHOICE if self.tool_choice is None else self.tool_choice.choice())


class CountTokensBody(PromptBody):
    """`POST /v1/messages/count_tokens`."""


class MessagesBody(PromptBody):
    """`POST /v1/messages`."""

    max_tokens: Whole
    stop_sequences: list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=MAX_STOP_STRINGS)
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None

    # no effect by their nature
    metadata: Annotated[MetadataBody | None, no_effect] = None
    service_tier: Annotated[Literal["auto", "standard_only"] | None, no_effect] = None

    # known, not served
    container: Annotated[Any, only()] = None
    diagnostics: Annotated[Any, only({}, {"previous_message_id": None})] = None
    inference_geo: Annotated[Any, only()] = None

    @property
    def tells_thoughts(self) -> bool:
        return self.thinking is None or self.thinking.display != "omitted"

    def params(self, defaults: dict[str, float | int]) -> GenerationParams:
        """`defaults` are the checkpoint's; what the request says goes first."""
        sent = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        fields: dict[str, Any] = defaults | {name: value for name, value in sent.items() if value is not None}
        sampling = SamplingParams(**fields, max_tokens=self.max_tokens, grammar=self._grammar())
        return replace(self.prompt_params(), sampling=sampling, stop=tuple(self.stop_sequences or ()))

    def _grammar(self) -> Grammar | None:
        if self.output_config is None or self.output_config.format is None:
            return None
        return Grammar.json_schema(self.output_config.format.schema_, param="output_config.format")
