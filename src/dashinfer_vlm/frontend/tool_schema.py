"""Tools and the choice among them as OpenAI's chat completions write them in JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, ValidationError

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.schema import Body, by_shape, explain
from dashinfer_vlm.frontend.tools import Tool, ToolChoice, check_tool_name, offer


class FunctionToolBody(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    type: Literal["function"]
    function: FunctionToolBody

    def tool(self, where: str) -> Tool:
        """Raises InvalidRequestError for a name that cannot be."""
        body = self.function
        check_tool_name(body.name, f"{where}.function.name")
        schema = {} if body.parameters is None else {"parameters": body.parameters}
        return Tool(name=body.name, description=body.description, strict=bool(body.strict), **schema)


class NameBody(Body):
    name: str


class NamedToolBody(Body):
    type: Literal["function"]
    function: NameBody


class AllowedToolsBody(Body):
    mode: Literal["auto", "required"]
    tools: list[NamedToolBody] = Field(min_length=1)


class ChoiceBody(Body):
    """`{"type": "function", "function": ...}` or `{"type": "allowed_tools", "allowed_tools": ...}`."""

    type: Literal["function", "allowed_tools"]
    function: NameBody | None = None
    allowed_tools: AllowedToolsBody | None = None


ToolChoiceBody = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(":text")] | Annotated[ChoiceBody, Tag(":object")], by_shape
]


class ToolsBody(Body):
    """The fields about tools of a request."""

    tools: list[ToolBody] | None = None
    tool_choice: ToolChoiceBody | None = None
    parallel_tool_calls: bool | None = None

    def offered(self) -> tuple[tuple[Tool, ...], ToolChoice]:
        """The tools that the model is shown, and how it may choose. Raises InvalidRequestError."""
        read = [body.tool(f"tools[{i}]") for i, body in enumerate(self.tools or ())]
        return offer(read, _choice(self.tool_choice, self.parallel_tool_calls is not False))


def parse_tools(tools: object, choice: object) -> tuple[tuple[Tool, ...], ToolChoice]:
    """`ToolsBody.offered` for a caller in this process. Raises InvalidRequestError."""
    try:
        return ToolsBody.model_validate({"tools": tools, "tool_choice": choice}).offered()
    except ValidationError as error:
        raise explain(error) from None


def _choice(choice: ToolChoiceBody | None, parallel: bool) -> ToolChoice | None:
    if choice == "none":
        return None
    if not isinstance(choice, ChoiceBody):
        return ToolChoice(must_call=choice == "required", parallel=parallel)
    if (choice.type == "function") != (choice.function is not None) or (choice.type == "allowed_tools") != (
        choice.allowed_tools is not None
    ):
        raise InvalidRequestError(f"tool_choice has type {choice.type!r} and not its field alone", param="tool_choice")
    if choice.function is not None:
        return ToolChoice(must_call=True, names=(choice.function.name,), parallel=False)
    assert choice.allowed_tools is not None
    allowed = choice.allowed_tools
    names = tuple(tool.function.name for tool in allowed.tools)
    return ToolChoice(must_call=allowed.mode == "required", names=names, parallel=parallel)
