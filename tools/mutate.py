"""A mutation run over scheduler/: do its tests notice when its code is wrong?

    python tools/mutate.py --count 40 --seed 0
    python tools/mutate.py --count 12 --files policies/hdp

Each mutant is one small change (a comparison flipped, a constant off by one, min for max, + for -,
a `not` dropped) in a copy of the repository; the scheduler's fast tests run against it and stop at
the first failure. A mutant is killed if a test fails or if the tests take too long. A survivor is
printed with its change: no test states what that line is for, or the change does nothing.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("hdp", "scheduler", "tests", "tools", "pyproject.toml")
# Command line, drawings, exports and workloads are left out: the planner is what must be right.
MUTATED = ("costs", "policies", "simulation", "planner.py", "step_plan.py", "validate.py")
TESTS = ["tests/scheduler", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]

_COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
_OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult}
_NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One change: source text between two offsets of a file, and what replaces it."""

    path: Path  # relative to the repository
    line: int
    before: str
    after: str
    source: str  # the whole mutated file


def mutants_of(path: Path, source: str) -> Iterator[Mutant]:
    """Every mutant of a file, one changed expression each."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.expr):
            continue
        before, after = ast.get_source_segment(source, node), _changed(node)
        if before is None or after is None or "\n" in before:
            continue
        lines = source.splitlines(keepends=True)
        line = lines[node.lineno - 1].encode()
        start, end = node.col_offset, node.end_col_offset
        assert end is not None
        lines[node.lineno - 1] = (line[:start] + f"({after})".encode() + line[end:]).decode()
        mutated = "".join(lines)
        try:
            ast.parse(mutated)
        except SyntaxError:  # inside an f-string, say
            continue
        yield Mutant(path=path, line=node.lineno, before=before, after=after, source=mutated)


def _changed(node: ast.expr) -> str | None:
    """The text of a changed expression; None where nothing is changed."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        ops = [_COMPARISONS[type(node.ops[0])](), *node.ops[1:]]
        return ast.unparse(ast.Compare(node.left, ops, node.comparators))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return ast.unparse(ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ast.unparse(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return str(node.value + 1)
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.Attribute) and node.attr in _NAMES:
        return ast.unparse(ast.Attribute(node.value, _NAMES[node.attr], ast.Load()))
    return None


def draw(count: int, seed: int, files: str) -> list[Mutant]:
    """`count` mutants of the files whose path contains `files`, a seeded sample."""
    paths = [path for part in MUTATED for path in _python_files(ROOT / "scheduler" / part)]
    found = [
        mutant
        for path in paths
        if files in str(path)
        for mutant in mutants_of(path.relative_to(ROOT), path.read_text(encoding="utf-8"))
    ]
    return random.Random(seed).sample(found, min(count, len(found)))


def _python_files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def is_killed(mutant: Mutant, copy: Path, command: list[str], limit_s: float) -> bool:
    """Whether `command`, run in the copy of the repository, fails or takes too long."""
    target = copy / mutant.path
    original = target.read_text(encoding="utf-8")
    target.write_text(mutant.source, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=limit_s
        )
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        target.write_text(original, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="mutation run over scheduler/")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", default="", help="part of a path, such as policies/hdp")
    parser.add_argument("--limit-s", type=float, default=300.0, help="for the tests of one mutant")
    args = parser.parse_args()
    mutants = draw(args.count, args.seed, args.files)
    killed = 0
    with tempfile.TemporaryDirectory(prefix="mutate_") as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, symlinks=True)
            else:
                shutil.copy(source, copy / name)
        for mutant in mutants:
            dead = is_killed(mutant, copy, [sys.executable, "-m", "pytest", *TESTS], args.limit_s)
            killed += dead
            verdict = "killed  " if dead else "SURVIVED"
            where = f"{mutant.path}:{mutant.line}"
            print(f"{verdict}  {where}  {mutant.before}  ->  {mutant.after}", flush=True)
    print(f"{killed} of {len(mutants)} mutants killed")


if __name__ == "__main__":
    main()
