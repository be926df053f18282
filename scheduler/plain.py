"""Plain values at the door: what comes from outside is made plain once, or refused by name.

Lengths come from numpy and limits from YAML; plans and cost models come from files that anybody may
have written. Everything that is taken in passes one of these functions, so nothing further in meets
a numpy scalar (which `json` refuses), a bool that counts as 1, or an integer that no column holds.

* whole, real, flag   one argument: a Python int, float or bool, or a ValueError with its name, its
                      value and the remedy. Numpy scalars and 0-d arrays count as their values
* whole_column        a column of integers as int64
* parse_json          text as JSON, or a ValueError: no deep nesting, no key twice, no NaN, a limit
                      on its size
* read_bytes          a file that may be a pipe, a folder or huge
* to_plain            the way out: numpy values inside lists and dicts as JSON can write them
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

MOST_JSON_CHARS = 2**29  # a plan for 10,000 ranks has a few million
_SHOWN_CHARS = 60


def shown(value: object) -> str:
    """repr of a value for an error message, short whatever it is."""
    if isinstance(value, int) and value.bit_length() > 160:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."


def item(value: Any) -> Any:
    """The Python value of a numeric numpy scalar or 0-d array; anything else as it is."""
    if (
        isinstance(value, (np.generic, np.ndarray))
        and not value.ndim
        and value.dtype.kind in "biuf"
    ):
        return value.item()
    return value


def whole(name: str, value: Any, *, low: int = 1, most: int | None = None) -> int:
    """`value` as an int in [low, most]. Raises ValueError for anything else, also for floats."""
    number = item(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < low:
        remedy = ""
        if isinstance(number, float) and number.is_integer() and number >= low:
            remedy = f"; give {int(number)}"
        raise ValueError(f"{name}={shown(number)} must be an integer >= {low}{remedy}")
    if most is not None and number > most:
        raise ValueError(
            f"{name}={shown(number)} must be at most {most}; did you pass another quantity?"
        )
    return number


def real(name: str, value: Any) -> float:
    """`value` as a float, which may be infinite. Raises ValueError for NaN and for no number."""
    number = item(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number != number:
        raise ValueError(f"{name}={shown(number)} must be a number")
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name}={shown(number)} must be finite and fit in a float64") from None


def flag(name: str, value: Any) -> bool:
    """`value` as a bool. Raises ValueError for anything else: bool("no") is True."""
    number = item(value)
    if not isinstance(number, bool):
        raise ValueError(f"{name}={shown(number)} must be True or False")
    return number


def whole_column(name: str, values: Any) -> np.ndarray:
    """(n,) int64. Raises ValueError for other shapes, and naming the first value at fault."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} must be one-dimensional, a list of integers: {error}") from None
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if not len(array):
        return array.astype(np.int64)
    limits = np.iinfo(np.int64)
    if array.dtype == object or (array.dtype.kind == "f" and not isinstance(values, np.ndarray)):
        for i, value in enumerate(map(item, values)):  # mixed: find the one at fault
            if isinstance(value, int) and not limits.min <= value <= limits.max:
                raise ValueError(f"{name}[{i}] is {shown(value)}, which does not fit in int64")
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(
                    f"{name} must be integers, got {array.dtype} such as {shown(value)} at {i}"
                )
    if array.dtype.kind not in "iuO":
        raise ValueError(f"{name} must be integers, got {array.dtype} such as {shown(array[0])}")
    if not isinstance(values, np.ndarray):
        for i, value in enumerate(values):
            if isinstance(value, (bool, np.bool_)):
                raise ValueError(f"{name}[{i}] is {shown(value)}; {name} must be integers")
    if array.dtype.kind == "u" and int(array.max()) > limits.max:
        raise ValueError(f"{name} contains {int(array.max())}, which does not fit in int64")
    return array.astype(np.int64)


def parse_json(text: str | bytes, what: str) -> Any:
    """The value of a JSON text, made of plain Python values.

    Raises ValueError starting with "not {what} in JSON" for text that is none, is not UTF-8, has
    more than MOST_JSON_CHARS characters, is nested too deeply to read, has a key twice or holds
    NaN or Infinity, which JSON does not have.
    """

    def refuse(problem: object) -> ValueError:
        return ValueError(f"not {what} in JSON: {problem}")

    if not isinstance(text, (str, bytes)):
        raise refuse(f"{shown(text)} is no text")
    if len(text) > MOST_JSON_CHARS:
        raise refuse(f"{len(text)} characters, more than {MOST_JSON_CHARS}")

    def no_constant(name: str) -> Any:
        raise refuse(f"{name} is no JSON number; write null")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise refuse(f"key {shown(twice)} appears twice")
        return result

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=once, parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise refuse(f"no UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise refuse(error) from None
    except RecursionError:
        raise refuse("it is nested too deeply") from None
    except ValueError as error:
        if "string conversion" in str(error):
            raise refuse("a number has thousands of digits") from None
        raise


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file. Raises ValueError for a device or a pipe, which might never end, for a
    file of over MOST_JSON_CHARS bytes, and OSError with the path for one that cannot be read."""
    path = Path(path)
    with_size = path.stat()
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a pipe or a device: copy it to a file first")
    if path.is_file() and with_size.st_size > MOST_JSON_CHARS:
        raise ValueError(
            f"{path} has {with_size.st_size} bytes, more than {MOST_JSON_CHARS}: is it this file?"
        )
    return path.read_bytes()


def to_plain(value: Any, name: str = "value") -> Any:
    """A copy that JSON can write: numpy values as Python's, NaN and infinity as None.

    Raises ValueError naming the entry that is neither text, number, list nor dict.
    """
    if isinstance(value, np.ndarray):
        return to_plain(value.tolist(), name)
    value = item(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(item(key)): to_plain(one, f"{name}[{key!r}]") for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(one, f"{name}[{i}]") for i, one in enumerate(value)]
    raise ValueError(
        f"{name} is of type {type(value).__name__}, which JSON cannot hold: give text, numbers, "
        "lists or dicts"
    )
