"""The rules that keep the project simple, read off the sources: imports, sizes, forbidden habits.

Where a rule makes a file worse, break it: add the file to `EXCEPTIONS` with the reason.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# "path" or "path::function" -> why it may be longer than the limits.
EXCEPTIONS: dict[str, str] = {}

# The whole graph: unit of hdp (a file or a folder) -> the units that it may import. `scheduler`
# knows nothing of hdp. An edge that is not used is removed, a cycle fails.
IMPORTS: dict[str, set[str]] = {
    # what a step is: lengths in, who holds which tokens out
    "scheduler": set(),
    "compiled": set(),
    "ops": {"compiled"},
    "layout": {"ops", "scheduler"},
    # attention over the ranks of a ring
    "clock": set(),
    "comm": {"clock"},
    "kernels": {"layout"},
    "gather": {"comm", "kernels", "layout", "ops", "scheduler"},
    "attention": {"comm", "gather", "kernels", "layout", "ops"},
    # what backward needs leaves the device meanwhile
    "offloading": {"layout", "ops", "scheduler"},
    # the model around it
    "losses": {"ops"},
    "hf_check": set(),
    "liger": set(),
    "export_dir": set(),
    "hf": {"attention", "export_dir", "hf_check", "kernels", "losses"},
    # tokens
    "console": set(),
    "data": {"console", "hf", "layout", "scheduler"},
    # one step on many ranks
    "mesh": set(),
    "parallel": set(),
    "recorder": {"clock", "comm", "scheduler"},
    "step": {"comm", "data", "layout", "losses", "mesh", "parallel", "recorder", "watchdog"},
    # what a run needs beside steps
    "config": set(),
    "monitor": set(),
    "agree": set(),
    "watchdog": {"agree", "clock", "mesh", "monitor"},
    "optim": {"kernels"},
    "rng": set(),
    "checkpoint_dir": set(),
    "checkpoint_io": {"checkpoint_dir"},
    "checkpoint": {"agree", "checkpoint_dir", "checkpoint_io", "mesh", "rng"},
    "metrics": {"scheduler"},
    # a run: its parts connected, watched, walked
    "run": {
        *("agree", "comm", "compiled", "config", "console", "data", "gather", "hf", "kernels"),
        *("layout", "liger", "mesh", "offloading", "ops", "optim", "parallel", "recorder", "rng"),
        *("scheduler", "step", "watchdog"),
    },
    "observe": {"data", "hf", "metrics", "run", "scheduler", "step"},
    "train": {
        *("agree", "checkpoint", "config", "data", "export_dir", "hf", "mesh", "metrics"),
        *("observe", "optim", "parallel", "run", "step", "watchdog"),
    },
    # the command line
    "machine": {"kernels", "ops"},
    "doctor": {"machine"},
    "cli": {"checkpoint_dir", "config", "doctor", "scheduler", "train"},
}

# Each foreign library is imported in one file, inside functions: the rest works without it.
FOREIGN = {
    "transformers": "hdp/hf.py",
    "datasets": "hdp/data/sources.py",
    "tokenizers": "hdp/data/tokenizer.py",
    "matplotlib": "hdp/scheduler/picture.py",
    "tyro": "hdp/cli.py",
    "rich": "hdp/console.py",
    "tqdm": "hdp/console.py",
    "tensorboard": "hdp/metrics.py",
    "apex": "hdp/optim.py",
    "amp_C": "hdp/optim.py",
    "flash_attn": "hdp/kernels/flash_attn.py",
    "flash_attn_interface": "hdp/kernels/flash_attn.py",
    "transformer_engine": "hdp/kernels/transformer_engine.py",
    "liger_kernel": "hdp/liger.py",
}
# Parts of libraries with the same rule: everything else goes through that file.
FOREIGN_PARTS = {
    "torch.utils.tensorboard": "hdp/metrics.py",
    "torch.distributed.checkpoint": "hdp/checkpoint_io.py",
    "torch.distributed.fsdp": "hdp/parallel.py",
}


def sources(*folders: str) -> list[Path]:
    """Python files, each once: `hdp/scheduler`, a link, counts as part of hdp."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    if "hdp" in folders and (ROOT / "hdp" / "scheduler").is_symlink():
        found += (ROOT / "hdp" / "scheduler").rglob("*.py")
    return sorted(set(found))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def unit_of(module: str) -> str:
    """hdp.data.pack -> data; hdp -> hdp."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


PACKAGE = sources("hdp")
EVERYTHING = [
    *PACKAGE,
    *sources("examples", "tests", "tools"),
    *(path for path in [ROOT / "setup.py"] if path.exists()),
]
by_name = pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
by_package_name = pytest.mark.parametrize("path", PACKAGE, ids=name_of)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute module, imported when the file is) of every import but those for types."""
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
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
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


def test_graph_is_acyclic() -> None:
    done: set[str] = set()

    def visit(unit: str, path: tuple[str, ...]) -> None:
        assert unit not in path, f"cycle: {' -> '.join([*path, unit])}"
        if unit not in done:
            for other in sorted(IMPORTS.get(unit, ())):
                visit(other, (*path, unit))
            done.add(unit)

    for unit in IMPORTS:
        visit(unit, ())


def test_imports_point_one_way() -> None:
    used: dict[str, set[str]] = {}
    for path in PACKAGE:
        unit = unit_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if unit in ("__init__", "__main__"):
            continue
        edges = used.setdefault(unit, set())
        for module, _ in imports(path):
            if module.split(".")[0] == "hdp" and unit_of(module) not in (unit, "__version__"):
                edges.add(unit_of(module))
    problems = [
        f"{unit} must not import {sorted(edges - IMPORTS.get(unit, set()))}"
        for unit, edges in used.items()
        if edges - IMPORTS.get(unit, set())
    ]
    problems += [
        f"{unit} is not in IMPORTS: give it a place" for unit in used if unit not in IMPORTS
    ]
    problems += [
        f"IMPORTS allows {unit} to import {sorted(allowed - used.get(unit, set()))}, it does not"
        for unit, allowed in IMPORTS.items()
        if allowed - used.get(unit, set())
    ]
    assert not problems, "\n".join(problems)


@by_package_name
def test_scheduler_is_numpy_only(path: Path) -> None:
    if "scheduler" not in path.parts:
        return
    allowed = {"numpy", "matplotlib", *sys.stdlib_module_names}
    for module, _ in imports(path):
        if module.startswith("hdp"):
            assert module.startswith("hdp.scheduler"), f"scheduler imports {module}"
        else:
            assert module.split(".")[0] in allowed, f"scheduler imports {module}"


@by_package_name
def test_foreign_library_in_one_file(path: Path) -> None:
    everywhere = {"hdp", "numpy", "torch", *sys.stdlib_module_names}
    for module, at_load in imports(path):
        library = module.split(".")[0]
        if library not in everywhere:
            assert library in FOREIGN, f"{library} is new: give it one file in FOREIGN"
            assert name_of(path) == FOREIGN[library], f"{library} belongs to {FOREIGN[library]}"
            assert not at_load, f"import {library} inside the function that needs it"
        for part, owner in FOREIGN_PARTS.items():
            if module == part or module.startswith(part + "."):
                assert name_of(path) == owner, f"{part} belongs to {owner}"


@by_name
def test_sizes(path: Path) -> None:
    if name_of(path) not in EXCEPTIONS:
        num_lines = len(path.read_text().splitlines())
        assert num_lines <= MAX_FILE_LINES, f"{num_lines} lines, at most {MAX_FILE_LINES}: split it"
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            num_lines = (node.end_lineno or 0) - node.lineno + 1
            if f"{name_of(path)}::{node.name}" not in EXCEPTIONS:
                assert num_lines <= MAX_FUNCTION_LINES, f"{node.name}: {num_lines} lines"


def test_exceptions_are_needed_and_justified() -> None:
    for name, reason in EXCEPTIONS.items():
        path, _, function = name.partition("::")
        assert len(reason) > 20, f"{name}: say why"
        assert (
            f"def {function}(" in (ROOT / path).read_text() if function else (ROOT / path).exists()
        )


@by_name
def test_habits(path: Path) -> None:
    """ASCII, a module docstring, no global, no utils.py, no context variables."""
    text = path.read_text(encoding="utf-8")
    line = next(
        (number for number, line in enumerate(text.splitlines(), 1) if not line.isascii()), 0
    )
    assert not line, f"line {line} is not ASCII"
    assert path.name not in ("utils.py", "util.py", "helpers.py", "common.py", "misc.py")
    tree = parse(path)
    assert not text.strip() or ast.get_docstring(tree), "the module docstring is missing"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: global"
    assert "contextvars" not in {module.split(".")[0] for module, _ in imports(path)}


@pytest.mark.parametrize(
    "code",
    [
        "import hdp",
        "import hdp.scheduler",
        "import hdp.config",
        "import hdp; hdp.StepPlan; hdp.CostModel; hdp.plan",
        "from hdp.cli import main; main(['--help'])",
        "from hdp.cli import main; main(['--version'])",
        "from hdp.cli import main; main(['doctor', '--help'])",
        "from hdp.cli import main; main(['plan', '--help'])",
    ],
)
def test_loads_no_torch(code: str) -> None:
    check = (
        f"import sys\ntry:\n    {code}\n"
        "except SystemExit as stop:\n    assert not stop.code, stop\n"
        "heavy = {'torch', 'transformers', 'datasets', 'tyro', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_package_loads_without_foreign_libraries() -> None:
    """Every module of hdp imports on a machine with numpy and torch alone."""
    pytest.importorskip("torch")
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE
        if path.name != "__main__.py"
    ]
    # torch itself uses some of them when they are there, so it is loaded before they are blocked.
    code = (
        "import sys, importlib, torch, torch.distributed.fsdp, torch.distributed.checkpoint\n"
        f"for name in {sorted(FOREIGN)}: sys.modules[name] = None\n"
        f"for name in {names}: importlib.import_module(name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_public_names_resolve() -> None:
    """Each lazy export of `hdp` is there, and is the same object however often it is asked for."""
    pytest.importorskip("torch")
    import hdp

    for name in hdp.__all__:
        assert getattr(hdp, name) is getattr(hdp, name), f"hdp.{name} changes once it is loaded"
