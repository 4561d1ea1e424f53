"""The rules that all JSON from callers shares: unknown fields are refused, known but unsupported ones are named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from dashinfer_vlm.errors import InvalidRequestError, UnsupportedError

DEEPEST = 200
"""Arrays and objects within each other in a field of a body: what the parser takes."""
_UNSUPPORTED = "unsupported"
"""Type of the validation error of a known field whose value is not served."""
_AN_OBJECT = "Input should be an object"
"""What pydantic says of JSON; of a Python value it would name our classes."""
_MEANT = "meant"
"""Type of a validation error whose text says all that there is to say."""


class Body(BaseModel):
    """A JSON object; numbers are numbers, and what is not declared is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


def _all_whole(values: Any) -> Any:
    if not isinstance(values, list) or float not in set(map(type, values)):  # most often so, and lists may be long
        return values
    return [_whole(value) for value in values]


Whole = Annotated[int, BeforeValidator(_whole)]
"""An integer; JSON has one kind of number, so that some clients write it `16.0`."""
Positive = Annotated[Whole, Field(ge=1)]
all_whole = BeforeValidator(_all_whole)
Wholes = Annotated[list[int], all_whole]


@dataclass(frozen=True, slots=True, eq=False)  # equal to none: typing keeps one of equal annotations, and True == 1
class Only:
    """Of a known field that is accepted only with a value that means "not used"."""

    neutral: tuple[Any, ...]
    """Those values, beside null."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.neutral], "description": "Not served: only what means that it is not used."}

    def _check(self, value: Any) -> Any:
        neutral = (isinstance(value, bool) == isinstance(n, bool) and value == n for n in self.neutral)
        if value is None or any(neutral):
            return value
        raise unsupported("is not supported by this server; leave it out")


def only(*neutral: Any) -> Only:
    """Annotation of a known field that is accepted only with a value that means "not used"."""
    return Only(neutral)


class NoEffect:
    """Of a field that is accepted and, by its nature, changes nothing here."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "description": "No effect."}


no_effect = NoEffect()


def state_of(field: FieldInfo) -> Literal["works", "no effect", "refused"]:
    """What becomes of a field that a client sends."""
    if any(isinstance(note, Only) for note in field.metadata):
        return "refused"
    return "no effect" if any(note is no_effect for note in field.metadata) else "works"


def meant(message: str, field: str | None = None) -> PydanticCustomError:
    """An error for validators to raise: `message` follows the value's path, `field` of the value is at fault."""
    return PydanticCustomError(_MEANT, "{message}", {"message": message, "field": field})


def unsupported(message: str, field: str | None = None) -> PydanticCustomError:
    """`meant` for what is known and not served."""
    return PydanticCustomError(_UNSUPPORTED, "{message}", {"message": message, "field": field})


def _shape(value: Any) -> str | None:
    if isinstance(value, str):
        return ":text"
    if isinstance(value, list):
        return ":list"
    return ":object" if isinstance(value, dict) else None


by_shape = Discriminator(_shape)
"""Tells apart members of a union that are tagged `:text`, `:list` and `:object`; colons keep tags out of paths."""


def explain(error: ValidationError, root: str = "") -> InvalidRequestError:
    """The first finding in the words of the API: the field's path, what is wrong, and what was sent if it is short.

    `root` is the path of what was validated, where that was a part of something.
    """
    finding = error.errors(include_url=False)[0]
    kind, where = finding["type"], path_of(finding["loc"], root)
    if kind == "json_invalid" and "recursion limit" in finding["msg"]:
        return InvalidRequestError(f"the body is nested too deep: a field may hold {DEEPEST} levels of JSON")
    if kind == "json_invalid":
        return InvalidRequestError(f"the body is not JSON: {finding['msg'].removeprefix('Invalid JSON: ')}")
    if kind in (_MEANT, _UNSUPPORTED):
        field = finding["ctx"]["field"]
        fault = UnsupportedError if kind == _UNSUPPORTED else InvalidRequestError
        return fault(f"{where} {finding['msg']}", param=f"{where}.{field}" if field else where)
    if kind == "extra_forbidden":
        return UnsupportedError(f"{where} is not a field that this server knows", param=where)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return InvalidRequestError(f"{where} has the wrong type, {json_type(finding['input'])}", param=where)
    if kind == "missing":
        return InvalidRequestError(f"{where} is missing", param=where)
    sent = repr(finding["input"])
    value = f" (it is {sent})" if len(sent) <= 80 else ""
    message = _AN_OBJECT if kind in ("model_type", "dict_type") else finding["msg"]
    return InvalidRequestError(f"{where or 'the body'}: {message[:1].lower()}{message[1:]}{value}", param=where or None)


def json_type(value: Any) -> str:
    """What JSON calls the type of `value`, for messages."""
    names = {bool: "boolean", dict: "object", float: "number", int: "number", list: "array", str: "string"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def path_of(location: tuple[int | str, ...], root: str = "") -> str:
    """`messages[0].content[1].image_url.url`; tags of union members (`:text`) and of keys (`[key]`) are left out."""
    path = root
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith((":", "[")):
            path += f".{step}" if path else step
    return path
