"""The fields of a configuration class: sections, help, types, and values from words.

A field's section is the comment `# -- section --` above it in the source, its help the docstring
below it. `parse_value` turns a word of the command line or of a file into a value of the field's
type, so that both mean the same.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import textwrap
import types
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
NONE = ("none", "null", "~", "")
_UNITS = {"": 1, "K": 1024, "M": 1024**2}


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldInfo:
    """What the source of a configuration class says of a field."""

    section: str  # of the heading `# -- section --` above it
    help: str  # its docstring
    type: Any


def describe_fields(config_class: type) -> dict[str, FieldInfo]:
    """The fields of a dataclass in their order, with sections, docstrings and resolved types."""
    sections: dict[str, str] = {}
    helps: dict[str, str] = {}
    for cls in reversed(config_class.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(cls))
        except (OSError, TypeError):  # a class typed at a prompt: no headings, no help
            continue
        headings = {
            number: match[1]
            for number, line in enumerate(source.splitlines(), 1)
            if (match := re.fullmatch(r" *# -- (.+) --", line))
        }
        [tree] = ast.parse(source).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            above = [number for number in headings if number < node.lineno]
            section = headings[max(above)] if above else "options"
            sections.setdefault(node.target.id, section)
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                helps[node.target.id] = inspect.cleandoc(str(after.value.value))
    hints = get_type_hints(config_class)
    return {
        f.name: FieldInfo(
            section=sections.get(f.name, "options"), help=helps.get(f.name, ""), type=hints[f.name]
        )
        for f in fields(config_class)
    }


def default_values(config_class: type) -> dict[str, Any]:
    """{field: default} of a dataclass."""
    values = {}
    for f in fields(config_class):
        if f.default is not MISSING:
            values[f.name] = f.default
        elif f.default_factory is not MISSING:
            values[f.name] = f.default_factory()
    return values


# ---- values ----


def parse_value(text: str, wanted: Any) -> Any:
    """The value of type `wanted` that `text` stands for.

    Integers may have a unit, 16K or 2M (powers of 1024). Raises ValueError, "a whole number, got
    'many'", to be completed with the name of the field.
    """
    options = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    if type(None) in options and text.strip().lower() in NONE:
        return None
    for option in options:
        found = _parse_one(text.strip(), text, option)
        if found is not MISSING:
            return found
    raise ValueError(f"{describe_type(wanted, text)}, got {text!r}")


def _parse_one(text: str, raw: str, wanted: Any) -> Any:
    """MISSING if `text` is no value of the type."""
    if get_origin(wanted) is Literal:
        return text if text in get_args(wanted) else MISSING
    if wanted is bool:
        word = text.lower()
        return True if word in TRUE else False if word in FALSE else MISSING
    if wanted is int:
        size = re.fullmatch(r"([+-]?\d[\d_]*)([KM]?)", text, re.IGNORECASE)
        return int(size[1]) * _UNITS[size[2].upper()] if size else MISSING
    if wanted is float:
        try:
            return float(text)
        except ValueError:
            return MISSING
    return raw if wanted is str else MISSING


def describe_type(wanted: Any, text: str) -> str:
    """The words for a type, with the nearest of its choices to `text`."""
    if get_origin(wanted) in (Union, types.UnionType):
        parts = [option for option in get_args(wanted) if option is not type(None)]
        words = [describe_type(part, text) for part in parts]
        return " or ".join([*words, *(["none"] if type(None) in get_args(wanted) else [])])
    if get_origin(wanted) is Literal:
        known = list(map(str, get_args(wanted)))
        return f"{'one of ' if len(known) > 1 else ''}{', '.join(known)}{did_you_mean(text, known)}"
    names = {int: "a whole number such as 16384 or 16K", float: "a number", bool: "true or false"}
    return names.get(wanted, "text")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)', or '' if no known word is near."""
    # Two short words share half of their letters by chance: fp8 and fp64.
    cutoff = 0.5 if len(word) > 4 else 0.7
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {near[0]}?)" if near else ""
