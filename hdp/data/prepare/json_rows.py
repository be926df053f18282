"""Rows of JSON files: one object per line, one array of objects, or objects one after the other.

All three mean the same: each object is a row, and a null is a column that the row does not have.
Lines are split among workers by bytes; arrays and pretty-printed objects are parsed as a stream, so
their size does not matter. A bad row is one rejection: the reader finds the end of a bad object by
its brackets, and says so where it cannot.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from typing import Any, Literal

from .documents import MALFORMED, Rejected, parse_line
from .files import READ_ERRORS, inner_suffix, is_compressed, open_file
from .json_text import unique_keys

Layout = Literal["lines", "array", "values"]

_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_REST = "the rest of the file is skipped"


def layout(path: str) -> Layout:
    """How a file holds its rows, from its first line. Raises files.READ_ERRORS."""
    with open_file(path) as file:
        first = b""
        while not first:
            line = file.readline(_CHUNK)
            if not line:
                return "lines"
            first = line.removeprefix(b"\xef\xbb\xbf").strip()
    is_json = inner_suffix(path) == ".json"
    if is_json and first[:1] == b"[":
        return "array"
    if is_json and first[:1] == b"{":  # no pretty-printed object has a line that long
        return "lines" if _is_json(first) or len(line) == _CHUNK else "values"
    # In lines, a line that holds a list is a bad row; the start of a list of objects is an array.
    opens_array = re.match(rb"\[\s*(\{|$)", first) is not None
    return "array" if opens_array and not _is_json(first) else "lines"


def line_rows(path: str, start: int, stop: int) -> Iterator[Any]:
    """Rows of the lines that begin in bytes [start, stop); None for a blank line.

    Raises files.READ_ERRORS.
    """
    with open_file(path) as file:
        position = 0
        if start:
            assert not is_compressed(path), path
            file.seek(start - 1)
            position = start - 1 + len(file.readline())
        while position < stop:
            line = file.readline()
            if not line:
                return
            position += len(line)
            row, line = parse_line(line), b""  # a long line is not kept while it is tokenized
            yield row


def value_rows(path: str, *, is_array: bool) -> Iterator[Any]:
    """Rows of an array, or of values that follow each other. Raises files.READ_ERRORS."""
    with open_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        stream = _Stream(text)
        if is_array:
            stream.skip_space()
            stream.take("[")
        is_first = True
        while True:
            stream.skip_space()
            if is_array and stream.take("]"):
                stream.skip_space()
                if not stream.at_end():
                    yield Rejected(reason=MALFORMED, detail="text after the end of the array")
                return
            if stream.at_end():
                if is_array:
                    yield Rejected(reason=MALFORMED, detail="the array ends early: truncated")
                return
            if is_array and not is_first and not stream.take(","):
                yield Rejected(reason=MALFORMED, detail=f"no comma after the row before; {_REST}")
                return
            stream.skip_space()
            is_first = False
            row = stream.value()
            yield row if isinstance(row, (dict, Rejected)) else _not_an_object(row)
            if isinstance(row, Rejected) and row.detail.endswith(_REST):
                return


class _Stream:
    """JSON values from a text stream. The buffer holds one value and what follows it."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text, self._decoder = text, json.JSONDecoder(object_pairs_hook=unique_keys)
        self._buffer, self._position, self._ended = "", 0, False

    def _more(self) -> bool:
        """Read on, as much again as there is: a long value costs linear time."""
        if self._ended:
            return False
        rest = self._buffer[self._position :]
        chunk = self._text.read(max(_CHUNK, len(rest)))
        self._buffer, self._position, self._ended = rest + chunk, 0, not chunk
        return bool(chunk)

    def skip_space(self) -> None:
        while True:
            match = _SPACE.match(self._buffer, self._position)
            assert match is not None
            self._position = match.end()
            if self._position < len(self._buffer) or not self._more():
                return

    def at_end(self) -> bool:
        return self._position >= len(self._buffer) and not self._more()

    def take(self, character: str) -> bool:
        if self.at_end() or self._buffer[self._position] != character:
            return False
        self._position += 1
        return True

    def value(self) -> Any:
        """The next value; a Rejected for one that is not JSON."""
        while True:
            try:
                value, stop = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                # A value that goes on after the buffer looks broken at its end, or in a string.
                at_the_end = error.pos >= len(self._buffer) - 16
                if (at_the_end or error.msg.startswith("Unterminated")) and self._more():
                    continue
                return self._skip(f"not JSON: {error.msg}")
            except RecursionError:
                return self._skip("nested too deeply")
            except ValueError as error:  # a key that comes twice, an integer of thousands of digits
                return self._skip(f"not JSON: {error}")
            if stop == len(self._buffer) and not isinstance(value, (dict, list)) and self._more():
                continue  # a number may go on
            self._position = stop
            return value

    def _skip(self, detail: str) -> Rejected:
        """Move behind a bad value by counting its brackets."""
        while True:
            stop = self._balanced()
            if stop is not None:
                self._position = stop
                self.skip_space()
                if self.at_end() or self._buffer[self._position] in ",]{":
                    return Rejected(reason=MALFORMED, detail=detail)
                break
            if not self._more():
                break
        return Rejected(reason=MALFORMED, detail=f"{detail}; {_REST}")

    def _balanced(self) -> int | None:
        if self._buffer[self._position : self._position + 1] not in ("{", "["):
            return None
        depth = 0
        for match in _BRACKET.finditer(self._buffer, self._position):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
            if depth == 0:
                return match.end()
        return None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _not_an_object(value: Any) -> Rejected:
    return Rejected(reason=MALFORMED, detail=f"a JSON {type(value).__name__}, not an object")


def has_rows(path: str, recognized: Any) -> bool:
    """Whether a .json file holds rows (an array or lines) whose columns satisfy `recognized`."""
    try:
        kind = layout(path)
        if kind == "values":
            return False
        size = os.path.getsize(path)
        rows = line_rows(path, 0, size) if kind == "lines" else value_rows(path, is_array=True)
        first = next((row for row in rows if row is not None), None)
        return isinstance(first, dict) and bool(recognized(list(first)))
    except (*READ_ERRORS, ValueError):
        return False
