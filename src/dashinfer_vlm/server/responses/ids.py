"""Ids of responses and of their items; an item's id tells its response, so that it is found without an index."""

from __future__ import annotations

import secrets

_RESPONSE = "resp"


def new_id() -> str:
    """Of a response; nobody can guess it."""
    return f"{_RESPONSE}_{secrets.token_hex(16)}"


def item_id(response: str, kind: str, place: int | str) -> str:
    """Of the item at `place` of a response."""
    return f"{kind}_{response.removeprefix(_RESPONSE + '_')}_{place}"


def response_of(item: str) -> str:
    """The response whose item has this id, if any has."""
    return f"{_RESPONSE}_{item.split('_')[1]}" if item.count("_") == 2 else ""
