"""The project's sources as data: files, modules and their imports."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def sources(*folders: str) -> list[Path]:
    """Python files, each once; what links in hdp/ lead to counts as part of hdp."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    if "hdp" in folders:
        links = [path for path in (ROOT / "hdp").iterdir() if path.is_symlink() and path.is_dir()]
        found += [path for link in links for path in link.rglob("*.py")]
    return sorted(set(found))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """hdp.data.pack -> data; hdp.scheduler.costs.fit -> scheduler.costs; hdp -> hdp."""
    parts = module.split(".")
    if parts[1:2] == ["scheduler"]:
        return ".".join(parts[1:3])
    return parts[1] if len(parts) > 1 else parts[0]


PACKAGE = sources("hdp")
EVERYTHING = [
    *PACKAGE,
    *sources("examples", "tests", "tools"),
    *(path for path in [ROOT / "setup.py"] if path.exists()),
]
MODULES = {module_of(path): path for path in PACKAGE}


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """(absolute module, whether at import time) of every import except those for type checking."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    tree = parse(path)
    package = [*path.relative_to(ROOT).parent.parts]
    in_function = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        at_load = id(node) not in in_function
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_load
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from . import cli` imports a module
                yield f"{module}.{alias.name}", at_load
