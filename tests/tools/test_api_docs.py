"""docs/api.md matches the code, and docstrings cover what it leaves to `help()`."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import pytest

from tools.api_docs import DOCUMENT, PACKAGES, api_docs, describe

pytest.importorskip("torch")

COMMAND = "python tools/api_docs.py"


def public(kind: Any) -> dict[str, Any]:
    """Every public function or class, by its full name."""
    modules = [import_module(package) for package in PACKAGES]
    things = {f"{m.__name__}.{name}": getattr(m, name) for m in modules for name in m.__all__}
    return {name: thing for name, thing in things.items() if kind(thing)}


def test_document_matches_the_code() -> None:
    generated, written = api_docs().splitlines(), DOCUMENT.read_text().splitlines()
    wrong = [
        f"line {number}: {DOCUMENT.name} has {old!r}, the code says {new!r}"
        for number, (old, new) in enumerate(zip(written, generated, strict=False), 1)
        if old != new
    ]
    assert generated == written, "\n".join([f"docs/api.md is outdated: run {COMMAND}", *wrong[:3]])


def test_every_public_name_has_a_heading() -> None:
    headings = re.findall(r"^### (\S+)$", DOCUMENT.read_text(), re.M)
    names = [
        f"{package}.{name}"
        for package in PACKAGES
        for name in import_module(package).__all__
        if not name.startswith("__")
    ]
    assert headings == names
    assert COMMAND in DOCUMENT.read_text()


def test_docstrings_name_every_argument() -> None:
    missing = []
    for name, function in public(inspect.isfunction).items():
        text = inspect.getdoc(function) or ""
        if "arguments as in" in text:
            continue
        missing += [
            f"{name}: {parameter}"
            for parameter in inspect.signature(function).parameters
            if not re.search(rf"\b{parameter}\b", text)
        ]
    assert not missing, f"these arguments are not in their docstrings: {missing}"


def test_what_can_be_called_is_documented() -> None:
    """Public methods and properties have a docstring, so each has a description in the document."""
    bare = [
        line.strip("* `")
        for name, thing in public(inspect.isclass).items()
        for line in "".join(describe(name, thing)).splitlines()
        if line.startswith("* ") and line.endswith("`")
    ]
    assert not bare, f"without a docstring: {bare}"


def test_signatures_are_those_of_the_source() -> None:
    def example(
        rows: int,
        *,
        scale: float | None = None,
        big: int = 1 << 20,
    ) -> list[int]:
        """One line.

        Another paragraph.
        """
        return [rows]

    text = "".join(list(describe("example", example))[:2])
    assert "def example(\n    rows: int,\n    *,\n    scale: float | None = None," in text
    assert "big: int = 1 << 20,\n) -> list[int]\n```" in text
    assert text.endswith("One line.\n")


def test_a_public_name_without_a_docstring_is_an_error() -> None:
    def bare() -> None:
        pass

    with pytest.raises(ValueError, match="bare is public and has no docstring: write one"):
        list(describe("bare", bare))
