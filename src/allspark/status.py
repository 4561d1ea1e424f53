"""What every call of the engine answers: a code as documented, and in our version also the reason."""

from __future__ import annotations

import logging
from typing import ClassVar

logger = logging.getLogger("allspark")


class AsStatus(int):
    """Result of a call. Equal to the constant of its code, and to that number; `message` says what went wrong.

    Constants: ALLSPARK_SUCCESS 0, ALLSPARK_UNKNOWN_ERROR 1, ALLSPARK_PARAM_ERROR 2, ALLSPARK_IO_ERROR 3,
    ALLSPARK_MEMORY_ERROR 4, ALLSPARK_RUNTIME_ERROR 5, ALLSPARK_EXCEED_LIMIT_ERROR 7, ALLSPARK_INVALID_CALL_ERROR 8,
    ALLSPARK_EMPTY_REQUEST 9, ALLSPARK_ILLEGAL_REQUEST_ID 10, ALLSPARK_CACHE_MEMORY_OUT 11, ALLSPARK_REQUEST_DENIED 12,
    ALLSPARK_LORA_NUM_EXCEED_LIMIT_ERROR 21, ALLSPARK_LORA_RANK_EXCEED_LIMIT_ERROR 22, ALLSPARK_LORA_NOT_FOUND 23,
    ALLSPARK_LORA_ALREADY_LOADED 24, ALLSPARK_LORA_IN_USE 25, ALLSPARK_STREAMING 200.
    """

    ALLSPARK_SUCCESS: ClassVar[AsStatus]
    ALLSPARK_UNKNOWN_ERROR: ClassVar[AsStatus]
    ALLSPARK_PARAM_ERROR: ClassVar[AsStatus]
    ALLSPARK_IO_ERROR: ClassVar[AsStatus]
    ALLSPARK_MEMORY_ERROR: ClassVar[AsStatus]
    ALLSPARK_RUNTIME_ERROR: ClassVar[AsStatus]
    ALLSPARK_EXCEED_LIMIT_ERROR: ClassVar[AsStatus]
    ALLSPARK_INVALID_CALL_ERROR: ClassVar[AsStatus]
    ALLSPARK_EMPTY_REQUEST: ClassVar[AsStatus]
    ALLSPARK_ILLEGAL_REQUEST_ID: ClassVar[AsStatus]
    ALLSPARK_CACHE_MEMORY_OUT: ClassVar[AsStatus]
    ALLSPARK_REQUEST_DENIED: ClassVar[AsStatus]
    ALLSPARK_LORA_NUM_EXCEED_LIMIT_ERROR: ClassVar[AsStatus]
    ALLSPARK_LORA_RANK_EXCEED_LIMIT_ERROR: ClassVar[AsStatus]
    ALLSPARK_LORA_NOT_FOUND: ClassVar[AsStatus]
    ALLSPARK_LORA_ALREADY_LOADED: ClassVar[AsStatus]
    ALLSPARK_LORA_IN_USE: ClassVar[AsStatus]
    ALLSPARK_STREAMING: ClassVar[AsStatus]

    message: str

    def __new__(cls, code: int, message: str = "") -> AsStatus:
        status = super().__new__(cls, code)
        status.message = message
        return status

    @property
    def name(self) -> str:
        return _NAMES[int(self)]

    @property
    def value(self) -> int:
        return int(self)

    def __repr__(self) -> str:
        return f"<AsStatus.{self.name}: {int(self)}{': ' if self.message else ''}{self.message}>"

    def __str__(self) -> str:
        return f"AsStatus.{self.name}"


_NAMES = {
    0: "ALLSPARK_SUCCESS",
    1: "ALLSPARK_UNKNOWN_ERROR",
    2: "ALLSPARK_PARAM_ERROR",
    3: "ALLSPARK_IO_ERROR",
    4: "ALLSPARK_MEMORY_ERROR",
    5: "ALLSPARK_RUNTIME_ERROR",
    7: "ALLSPARK_EXCEED_LIMIT_ERROR",
    8: "ALLSPARK_INVALID_CALL_ERROR",
    9: "ALLSPARK_EMPTY_REQUEST",
    10: "ALLSPARK_ILLEGAL_REQUEST_ID",
    11: "ALLSPARK_CACHE_MEMORY_OUT",
    12: "ALLSPARK_REQUEST_DENIED",
    21: "ALLSPARK_LORA_NUM_EXCEED_LIMIT_ERROR",
    22: "ALLSPARK_LORA_RANK_EXCEED_LIMIT_ERROR",
    23: "ALLSPARK_LORA_NOT_FOUND",
    24: "ALLSPARK_LORA_ALREADY_LOADED",
    25: "ALLSPARK_LORA_IN_USE",
    200: "ALLSPARK_STREAMING",
}
for _code, _name in _NAMES.items():
    setattr(AsStatus, _name, AsStatus(_code))


class RefusalError(Exception):
    """A call that cannot be served; the public face turns it into its status."""

    def __init__(self, code: AsStatus, message: str) -> None:
        super().__init__(message)
        self.code = code

    def status(self) -> AsStatus:
        logger.warning("%s: %s", self.code, self)
        return AsStatus(self.code, str(self))


def wrong(message: str) -> RefusalError:
    """The most frequent refusal: a parameter that cannot be."""
    return RefusalError(AsStatus.ALLSPARK_PARAM_ERROR, message)
