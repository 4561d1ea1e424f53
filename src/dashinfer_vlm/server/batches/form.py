"""Forms with a file in them (`multipart/form-data`, RFC 7578), taken apart as they come."""

from __future__ import annotations

import logging

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from dashinfer_vlm.errors import InvalidRequestError

_MOST_FIELDS = 16
_FIELD_BYTES = 1024

# What is wrong with a form is told to whoever has sent it; the log is not theirs to fill.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


class FormReader:
    """Fields are kept, the bytes of the file are handed on."""

    def __init__(self, content_type: str) -> None:
        """Raises InvalidRequestError for anything but a form."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or boundary is None:
            raise InvalidRequestError("the body is no form; send the file as multipart/form-data", param="file")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        """Of the file, once it has begun."""
        self._header = b""
        self._disposition = b""
        self._name = ""
        self._is_file = False
        self._value = bytearray()
        self._news: list[bytes] = []
        self._is_over = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_begin": self._begin_header,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._end_form,
            },
        )

    def feed(self, data: bytes) -> bytes:
        """More of the body: the bytes of the file in it. Raises InvalidRequestError."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequestError(f"the form cannot be read: {error}", param="file") from error
        news, self._news = b"".join(self._news), []
        return news

    def finish(self) -> None:
        """Raises InvalidRequestError for a form that breaks off, or has no file."""
        if not self._is_over:
            raise InvalidRequestError("the form breaks off", param="file")
        if self.filename is None:
            raise InvalidRequestError("file is missing", param="file")

    def _begin(self) -> None:
        self._disposition, self._value = b"", bytearray()

    def _begin_header(self) -> None:
        self._header = b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end].lower()

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        if self._header == b"content-disposition":
            self._disposition += data[start:end]

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = self._name == "file"
        if self._is_file:
            if self.filename is not None:
                raise InvalidRequestError("the form has two files; send one", param="file")
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        elif len(self.fields) >= _MOST_FIELDS:
            raise InvalidRequestError(f"the form has more than {_MOST_FIELDS} fields", param=self._name[:80] or None)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._news.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > _FIELD_BYTES:
            name = self._name[:80]
            raise InvalidRequestError(f"{name} has more than {_FIELD_BYTES} bytes", param=name or None)

    def _end(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end_form(self) -> None:
        self._is_over = True
