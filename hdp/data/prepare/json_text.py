"""JSON as rows hold it: a key that an object gives twice is an error.

Python's json takes the last of two values, so a row that gives `content` twice would lose the text
of the first without a word.
"""

from __future__ import annotations

import json
from typing import Any


class DuplicateKey(ValueError):
    """An object gives a key twice."""


def loads(text: str | bytes) -> Any:
    """The value. Raises DuplicateKey, other ValueErrors for what is not JSON, RecursionError."""
    return json.loads(text, object_pairs_hook=unique_keys)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these entries, as `object_pairs_hook`. Raises DuplicateKey."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DuplicateKey(f"the key {twice!r} is given twice")
    return entries
