"""Names of data sets with weights, as `--data` takes them: "a.jsonl:0.7", "b/:0.3".

A weight is what follows the last colon, if it is a number; what exists on disk under its whole name
is a name. So "C:\\data", "s3://bucket/x" and a file called "day:1" need no escapes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from glob import glob

Named = tuple[str, float | None]


def parse_names(data: str | Sequence[str]) -> list[Named]:
    """(name, weight or None) of each data set.

    Raises ValueError for a weight that is not a positive number, for a name that is given twice,
    and if only some of the data sets have a weight.
    """
    names = [_parse(text) for text in ([data] if isinstance(data, str) else data)]
    if not names:
        raise ValueError("--data needs at least one data set")
    seen: set[str] = set()
    for name, weight in names:
        if name in seen:
            raise ValueError(f"--data names {name} twice: give it once, with the sum of weights")
        seen.add(name)
        if weight is not None and not 0 < weight < math.inf:
            raise ValueError(
                f"--data {name}:{weight:g}: a weight must be above 0; leave the data set out to "
                "train without it"
            )
    without = [name for name, weight in names if weight is None]
    if without and len(without) < len(names):
        raise ValueError(
            f"--data gives {without[0]} no weight and others one: write {without[0]}:WEIGHT, or no "
            "weights at all, which takes every sequence once per epoch"
        )
    return names


def _parse(text: str) -> Named:
    name, colon, weight = text.rpartition(":")
    if not colon or not name or _exists(text):
        return text, None
    try:
        return name, float(weight)
    except ValueError:
        if _exists(name) and "/" not in weight and "\\" not in weight:
            raise ValueError(
                f"--data {text}: {weight!r} is not a weight; write a number, such as {name}:0.5"
            ) from None
        return text, None


def _exists(name: str) -> bool:
    name = os.path.expanduser(name)
    return os.path.lexists(name) or bool(glob(name, recursive=True))
