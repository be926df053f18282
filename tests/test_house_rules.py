"""House rules, read off the sources: sizes, docstrings, habits. One test a rule.

Where a rule makes a file worse, break it: add the file to `EXCEPTIONS` with the reason.
"""

from __future__ import annotations

import ast

from tests.source_tree import EVERYTHING, imports, name_of, parse

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# "path" or "path::function" -> why it may be longer than the limits.
EXCEPTIONS: dict[str, str] = {}


def too_long(source: str, name: str) -> dict[str, str]:
    """{"path" or "path::function": what is wrong with its size}."""
    found = {}
    if (size := len(source.splitlines())) > MAX_FILE_LINES:
        found[name] = f"{name} has {size} lines, at most {MAX_FILE_LINES}: split it"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = (node.end_lineno or 0) - node.lineno + 1
            if size > MAX_FUNCTION_LINES:
                told = f"{name}:{node.lineno}: {node.name} has {size} lines, at most"
                found[f"{name}::{node.name}"] = f"{told} {MAX_FUNCTION_LINES}: split it"
    return found


def test_sizes() -> None:
    problems = {}
    for path in EVERYTHING:
        problems |= too_long(path.read_text(), name_of(path))
    assert not (told := [problems[name] for name in problems.keys() - EXCEPTIONS]), "\n".join(told)
    assert not (needless := EXCEPTIONS.keys() - problems), f"take out of EXCEPTIONS: {needless}"
    assert all(len(reason) > 20 for reason in EXCEPTIONS.values()), "say why"


def test_a_long_function_is_found_among_others_of_its_name() -> None:
    body = "\n".join(["        pass"] * MAX_FUNCTION_LINES)
    classes = ["class A:", "    def f(self):", body, "class B:", "    def f(self):", "        pass"]
    assert list(too_long("\n".join(classes), "x.py")) == ["x.py::f"]
    assert list(too_long("\n" * (MAX_FILE_LINES + 1), "x.py")) == ["x.py"]
    assert too_long("\n" * MAX_FILE_LINES, "x.py") == {}


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


def test_limits_have_patience() -> None:
    """A limit of 60 s fails on a busy machine: `patience(60)` (tests/patience.py)."""
    problems = [
        f"{name_of(path)}:{node.lineno}: timeout={keyword.value.value}, not patience(...)"
        for path in EVERYTHING
        if name_of(path).startswith("tests/")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "timeout" and isinstance(keyword.value, ast.Constant)
    ]
    assert not problems, "\n".join(problems)
