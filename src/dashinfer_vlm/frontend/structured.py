"""The ways in which a request may say what form its answer has, and the one form that the engine knows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.schema import Body, by_shape, no_effect, only
from dashinfer_vlm.request import Grammar

Schema = dict[str, Any]


SchemaOrText = Annotated[Annotated[str, Tag(":text")] | Annotated[Schema, Tag(":object")], by_shape]


class JsonSchemaBody(Body):
    name: str
    schema_: Schema | None = Field(None, alias="schema")
    description: Annotated[str | None, no_effect] = None
    """For people: the model is not shown it."""
    strict: Annotated[bool | None, no_effect] = None
    """An answer follows the schema either way."""


class ResponseFormatBody(Body):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaBody | None = None

    def grammar(self) -> Grammar | None:
        """Raises InvalidRequestError where the schema is missing, or is there for another type."""
        param = "response_format"
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequestError(f"{param} has json_schema if and only if its type is json_schema", param=param)
        if self.json_schema is None:
            return Grammar.json_object(param=param) if self.type == "json_object" else None
        if self.json_schema.schema_ is None:
            raise InvalidRequestError(f"{param}.json_schema.schema is missing", param=param)
        return Grammar.json_schema(self.json_schema.schema_, param=param)


class StructuredOutputsBody(Body):
    """`structured_outputs`, as vLLM has it: exactly one of the first five."""

    json_: SchemaOrText | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Annotated[Any, only()] = None
    disable_any_whitespace: Annotated[Any, only(False)] = None
    disable_additional_properties: Annotated[Any, only(False)] = None
    whitespace_pattern: Annotated[Any, only()] = None

    def grammars(self, param: str = "structured_outputs.{}") -> list[Grammar]:
        """`param` is what the caller calls each of them."""
        found = [
            None if self.json_ is None else Grammar.json_schema(self.json_, param=param.format("json")),
            Grammar.json_object(param=param.format("json_object")) if self.json_object else None,
            None if self.regex is None else Grammar("regex", self.regex, param.format("regex")),
            None if self.choice is None else Grammar.choices(self.choice, param=param.format("choice")),
            None if self.grammar is None else Grammar("grammar", self.grammar, param.format("grammar")),
        ]
        return [grammar for grammar in found if grammar is not None]


class StructuredBody(Body):
    """The fields of a request that say what form its answer has. At most one of them does."""

    response_format: ResponseFormatBody | None = None
    structured_outputs: StructuredOutputsBody | None = None
    # vLLM's names before 0.12
    guided_json: SchemaOrText | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def grammar(self) -> Grammar | None:
        """Raises InvalidRequestError for more than one, and for `structured_outputs` without any."""
        found = [*self._response_format(), *self._structured_outputs()]
        for kind in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{kind}")) is not None:
                found += StructuredOutputsBody.model_validate({kind: value}).grammars("guided_{}")
        if len(found) > 1:
            names = " and ".join(grammar.param for grammar in found)
            raise InvalidRequestError(f"{names} say what form the answer has; send one of them", param=found[1].param)
        return found[0] if found else None

    def _response_format(self) -> list[Grammar]:
        grammar = None if self.response_format is None else self.response_format.grammar()
        return [] if grammar is None else [grammar]

    def _structured_outputs(self) -> list[Grammar]:
        if self.structured_outputs is None:
            return []
        found = self.structured_outputs.grammars()
        if not found:
            raise InvalidRequestError(
                "structured_outputs needs one of json, json_object, regex, choice and grammar",
                param="structured_outputs",
            )
        return found
