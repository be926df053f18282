"""House rules, read off the sources: sizes, docstrings, habits. One test a rule.

Where a rule makes a file worse, break it: add the file to `EXCEPTIONS` with the reason.
"""

from __future__ import annotations

import ast

from tests.source_tree import EVERYTHING, ROOT, imports, name_of, parse

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# "path" or "path::function" -> why it may be longer than the limits.
EXCEPTIONS: dict[str, str] = {}


def test_sizes() -> None:
    problems = []
    for path in EVERYTHING:
        sizes = {name_of(path): (len(path.read_text().splitlines()), MAX_FILE_LINES)}
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                num_lines = (node.end_lineno or 0) - node.lineno + 1
                sizes[f"{name_of(path)}::{node.name}"] = (num_lines, MAX_FUNCTION_LINES)
        problems += [
            f"{name} has {size} lines, at most {limit}: split it"
            for name, (size, limit) in sizes.items()
            if size > limit and name not in EXCEPTIONS
        ]
    assert not problems, "\n".join(problems)


def test_exceptions_are_needed_and_justified() -> None:
    for name, reason in EXCEPTIONS.items():
        path, _, function = name.partition("::")
        assert len(reason) > 20, f"{name}: say why"
        assert (
            f"def {function}(" in (ROOT / path).read_text() if function else (ROOT / path).exists()
        )


def test_files_are_ascii() -> None:
    problems = [
        f"{name_of(path)}:{number} is not ASCII"
        for path in EVERYTHING
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if not line.isascii()
    ]
    assert not problems, "\n".join(problems)


def test_modules_have_docstrings() -> None:
    bare = [
        name_of(path)
        for path in EVERYTHING
        if path.read_text(encoding="utf-8").strip() and not ast.get_docstring(parse(path))
    ]
    assert not bare, f"the module docstring is missing in {', '.join(bare)}"


def test_no_ambient_state() -> None:
    """No `global`, and no context variables."""
    problems = [
        f"{name_of(path)}:{node.lineno}: global"
        for path in EVERYTHING
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Global)
    ]
    problems += [
        f"{name_of(path)}: contextvars"
        for path in EVERYTHING
        for module, _ in imports(path)
        if module.split(".")[0] == "contextvars"
    ]
    assert not problems, "\n".join(problems)


def test_no_drawers_for_everything() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert not [name_of(path) for path in EVERYTHING if path.name in vague]
