"""What is stored of a response, and what is read of it again: its input's items, and its output's as turns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgspec
from pydantic import TypeAdapter

from dashinfer_vlm.server.responses.ids import item_id
from dashinfer_vlm.server.responses.items import AnyItem, AnyItemBody, MessageItemBody, ReferenceBody
from dashinfer_vlm.server.responses.store import Kept

_ITEMS = TypeAdapter(list[AnyItemBody])
_KINDS = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


class _Reply(msgspec.Struct):
    """What is read of a stored response."""

    output: list[msgspec.Raw]
    background: bool


class _Id(msgspec.Struct):
    id: str


def written(items: Sequence[AnyItem], response: str) -> bytes:
    """The items of an input as a JSON list; those without an id get one."""
    told = [_told(item, item_id(response, _KINDS[item.type], f"in{i}")) for i, item in enumerate(items)]
    return msgspec.json.encode(told)


def items_of(kept: Kept) -> list[AnyItem]:
    """What was said in it, by both sides."""
    return _read(kept.input) + _read(_list(_outputs(kept)))


def find_items(kept: Kept, ids: Collection[str]) -> dict[str, tuple[AnyItem, int]]:
    """Those of its output and its input that have one of the ids, and how many bytes each has."""
    raws = {id_of(raw): raw for raw in inputs(kept.input) + _outputs(kept)}
    return {id: (_read(_list([raws[id]]))[0], memoryview(raws[id]).nbytes) for id in ids if id in raws}


def inputs(input: bytes) -> list[msgspec.Raw]:
    """The items of a stored input."""
    return msgspec.json.decode(input, type=list[msgspec.Raw])


def was_in_background(kept: Kept) -> bool:
    return msgspec.json.decode(kept.reply, type=_Reply).background


def id_of(raw: msgspec.Raw) -> str:
    return msgspec.json.decode(raw, type=_Id).id


def _outputs(kept: Kept) -> list[msgspec.Raw]:
    return msgspec.json.decode(kept.reply, type=_Reply).output


def _read(items: bytes) -> list[AnyItem]:
    """Those of a JSON list; what was stored holds what references stood for, and none of them."""
    return [item for item in _ITEMS.validate_json(items) if not isinstance(item, ReferenceBody)]


def _list(raws: list[msgspec.Raw]) -> bytes:
    return msgspec.json.encode(raws)


def _told(item: AnyItem, new_id: str) -> dict[str, Any]:
    """An item as OpenAI lists it, whatever short form it was sent in."""
    told = item.model_dump(mode="json", by_alias=True, exclude_none=True)
    if isinstance(item, MessageItemBody) and isinstance(item.content, str):
        kind = "output_text" if item.role == "assistant" else "input_text"
        told["content"] = [{"type": kind, "text": item.content}]
    return {"id": new_id, "status": "completed"} | told
