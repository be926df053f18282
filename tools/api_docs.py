"""Write docs/api.md: every public name with its signature and the first paragraph of its docstring.

    python tools/api_docs.py

The names are those of `__all__` in `hdp`, `hdp.data` and `hdp.scheduler`, in that order. Signatures
and the fields of dataclasses, with their comments, are copied from the source. Nothing is written
by hand, so a change of a signature or a docstring is followed by a run of this tool
(tests/tools/test_api_docs.py compares).
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any, get_origin

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "api.md"
PACKAGES = ("hdp", "hdp.data", "hdp.scheduler")
INTRO = """# API

What `hdp` exports: signatures and the first paragraph of each docstring. `help(hdp.plan)` shows the
rest: arguments, shapes, units, and what is raised. Written by `python tools/api_docs.py`; change
the code, not this file.
"""


def api_docs() -> str:
    """The text of docs/api.md."""
    parts = [INTRO]
    first_names: dict[int, str] = {}  # by identity: where each thing was described
    for package in PACKAGES:
        module = import_module(package)
        about = ast.parse(inspect.getsource(module))
        parts.append(f"## {package}\n\n{first_paragraph(about, package)}\n")
        for name in module.__all__:
            thing, full_name = getattr(module, name), f"{package}.{name}"
            if name.startswith("__"):
                continue
            parts.append(f"### {full_name}\n")
            if id(thing) in first_names:
                parts.append(f"The same as `{first_names[id(thing)]}`.\n")
                continue
            first_names[id(thing)] = full_name
            parts += describe(full_name, thing)
    return "\n".join(parts)


def describe(name: str, thing: Any) -> Iterator[str]:
    """The parts under the heading of one public name."""
    if get_origin(thing):  # an alias of a type, such as Share
        yield f"`{thing}`\n"
        return
    if isinstance(thing, dict):  # a table, such as POLICIES
        yield f"A table of {', '.join(f'`{key}`' for key in thing)}.\n"
        return
    source = dedent(inspect.getsource(thing))
    node = ast.parse(source).body[0]
    assert isinstance(node, (ast.ClassDef, ast.FunctionDef)), f"{name} is a {type(node).__name__}"
    lines = [re.sub(r"  # noqa.*", "", line) for line in source.splitlines()]
    shown = fields(node, lines) if isinstance(node, ast.ClassDef) else header(node, lines)
    yield f"```python\n{shown}\n```\n"
    yield first_paragraph(node, name) + "\n"
    if isinstance(node, ast.ClassDef):
        methods = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name[0] != "_"]
        if methods:
            yield "\n".join(member(node.name, method, lines) for method in methods) + "\n"
    yield f"Source: `{Path(inspect.getfile(inspect.unwrap(thing))).relative_to(ROOT)}`\n"


def header(node: ast.FunctionDef, lines: list[str]) -> str:
    """`def f(x: int) -> str` as it stands in the source."""
    return dedent("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])).rstrip(":")


def fields(node: ast.ClassDef, lines: list[str]) -> str:
    """The class with its fields as they stand in the source, or with what is called."""
    first_line = min([node.lineno, *(x.lineno for x in node.decorator_list)])
    head = "\n".join(lines[first_line - 1 : node.lineno])
    has_fields = [i for i, x in enumerate(node.body) if isinstance(x, ast.AnnAssign)]
    methods = [x for x in node.body if isinstance(x, ast.FunctionDef)]
    called = [x for x in methods if x.name in ("__init__", "__call__")]
    if has_fields:
        first, last = has_fields[0], has_fields[-1]
        after = node.body[last + 1 : last + 2]
        if after and isinstance(after[0], ast.Expr):  # a docstring of the last field
            last += 1
        begin = node.body[first - 1].end_lineno if first else node.lineno
        body = "\n".join(lines[begin : node.body[last].end_lineno])
    elif called:
        body = f"    {header(called[0], lines)}: ...".replace("\n", "\n    ")
    else:
        return head.rstrip(":")
    return f"{head}\n{body.lstrip(chr(10))}"


def member(owner: str, node: ast.FunctionDef, lines: list[str]) -> str:
    """A list item for a public method or property."""
    decorators = {ast.unparse(x) for x in node.decorator_list}
    text = " ".join(header(node, lines).split()).removeprefix("def ")
    text = re.sub(r"\((self|cls)(, )?", "(", text.replace("( ", "(").replace(", )", ")"))
    if decorators & {"property", "cached_property"}:
        text = text.replace("() -> ", ": ")
    elif decorators & {"classmethod", "staticmethod"}:
        text = f"{owner}.{text}"
    about = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
    return f"* `{text}`" + (f": {about}" if about else "")


def first_paragraph(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> str:
    """Of a docstring. Raises ValueError if there is none."""
    text = (ast.get_docstring(node) or "").partition("\n\n")[0]
    if not text:
        raise ValueError(f"{name} is public and has no docstring: write one")
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(api_docs(), encoding="ascii")
