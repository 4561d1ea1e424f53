"""Tools and the choice among them as OpenAI's chat completions write them in JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, ValidationError

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.schema import Body, by_shape, explain, unsupported
from dashinfer_vlm.frontend.tools import Tool, ToolChoice, check_tool_name, offer


def _only(*types: str) -> BeforeValidator:
    """Tools that others run for their models are known, and not served."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] not in types:
            raise unsupported(f"has type {value['type'][:80]!r}; this server has function tools only", field="type")
        return value

    return BeforeValidator(check)


function_only = _only("function")
functions_only = _only("function", "allowed_tools")
"""Of a choice among tools."""


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
    tools: list[Annotated[NamedToolBody, function_only]] = Field(min_length=1)


class ChoiceBody(Body):
    """`{"type": "function", "function": ...}` or `{"type": "allowed_tools", "allowed_tools": ...}`."""

    type: Literal["function", "allowed_tools"]
    function: NameBody | None = None
    allowed_tools: AllowedToolsBody | None = None


ToolChoiceBody = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(":text")] | Annotated[ChoiceBody, Tag(":object")],
    by_shape,
    functions_only,
]


class ToolsBody(Body):
    """The fields about tools of a request."""

    tools: list[Annotated[ToolBody, function_only]] | None = None
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
