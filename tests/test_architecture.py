"""Who may import whom, between rooms and between files; what loading a module loads."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from tests.patience import patience
from tests.source_tree import MODULES, PACKAGE, ROOT, imports, name_of, room_of

# The whole graph: room (a folder or a file of hdp, or of hdp/scheduler) -> the rooms that it may
# import. An edge that is not used is removed; a cycle fails.
ROOMS: dict[str, set[str]] = {
    # lengths in, a plan out; numpy at most
    "scheduler.zigzag": set(),
    "scheduler.plain": set(),
    "scheduler.plan_json": {"scheduler.plain"},
    "scheduler.rendezvous": set(),
    "scheduler.validate": {"scheduler.plain", "scheduler.rendezvous"},
    "scheduler.step_plan": {
        *("scheduler.plain", "scheduler.plan_json", "scheduler.validate", "scheduler.zigzag"),
    },
    "scheduler.costs": {"scheduler.plain"},
    "scheduler.simulation": {
        *("scheduler.costs", "scheduler.plain", "scheduler.rendezvous", "scheduler.step_plan"),
        "scheduler.validate",
    },
    "scheduler.policies": {
        *("scheduler.costs", "scheduler.plain", "scheduler.simulation", "scheduler.step_plan"),
        "scheduler.validate",
    },
    "scheduler.planner": {
        *("scheduler.costs", "scheduler.plain", "scheduler.policies", "scheduler.simulation"),
        "scheduler.step_plan",
    },
    "scheduler": {
        *("scheduler.costs", "scheduler.planner", "scheduler.simulation", "scheduler.step_plan"),
        "scheduler.validate",
    },
    "scheduler.export": {"scheduler.costs", "scheduler.planner", "scheduler.step_plan"},
    "scheduler.render": {"scheduler.costs", "scheduler.simulation", "scheduler.step_plan"},
    "scheduler.workloads": {"scheduler.plain"},
    "scheduler.cli": {
        *("scheduler.costs", "scheduler.planner", "scheduler.render", "scheduler.simulation"),
        *("scheduler.plain", "scheduler.step_plan", "scheduler.workloads"),
    },
    # the exceptions of all rooms
    "errors": set(),
    # sources of native ops; how this copy was installed, for messages that say what to type
    "csrc": set(),
    "installation": set(),
    # attention over the ranks of a ring, and a model around it
    "ops": {"csrc", "installation"},
    "attention": {"ops", "scheduler.zigzag"},
    "models": {"attention", "installation", "ops"},
    # what backward needs leaves the device meanwhile
    "offloading": {"attention", "errors", "scheduler", "scheduler.costs"},
    # tokens
    "console": set(),
    "data": {"attention", "console", "errors", "installation", "models", "scheduler"},
    # many ranks
    "distributed": {"errors"},
    "checkpoint": {"distributed", "errors"},
    # a finished step or run as a file to look at, without torch
    "report": {
        *("config", "console", "scheduler", "scheduler.render", "scheduler.simulation"),
    },
    # a run: its parts connected, watched, walked
    "config_checks": set(),
    "config": {"config_checks"},
    "config_fields": set(),
    "config_file": {"config_fields"},
    "flags": {"config_fields", "config_file", "installation"},
    "objectives": set(),
    "training": {
        *("attention", "checkpoint", "config", "config_file", "console", "data", "distributed"),
        *("errors", "models", "objectives", "offloading", "ops", "report", "scheduler"),
        *("scheduler.costs", "scheduler.policies"),
        *("scheduler.render", "scheduler.simulation"),
    },
    # inside another trainer; imported only by who asks for it
    "megatron": {"attention", "data", "distributed", "scheduler"},
    # the command line
    "doctor": {"attention", "csrc", "installation", "ops"},
    "profile": {
        *("attention", "config", "console", "data", "distributed", "doctor", "installation"),
        *("models", "objectives", "offloading", "ops", "scheduler", "scheduler.cli"),
        *("scheduler.costs", "scheduler.render", "training"),
    },
    "cli": {
        *("checkpoint", "config", "data", "doctor", "flags", "profile", "report"),
        *("scheduler.cli", "training"),
    },
}

# Each foreign library is imported in one file, inside functions: the rest works without it.
FOREIGN = {
    "transformers": "hdp/models/huggingface.py",
    "huggingface_hub": "hdp/models/hub.py",
    "safetensors": "hdp/models/weight_files.py",
    "datasets": "hdp/data/prepare/sources.py",
    "tokenizers": "hdp/data/prepare/tokenizer.py",
    "pyarrow": "hdp/data/prepare/tables.py",
    "zstandard": "hdp/data/prepare/files.py",
    "compression": "hdp/data/prepare/files.py",  # of Python 3.14
    "matplotlib": "hdp/scheduler/render/figure.py",
    "tyro": "hdp/flags.py",
    "yaml": "hdp/config_file.py",
    "rich": "hdp/console.py",
    "tqdm": "hdp/console.py",
    "tensorboard": "hdp/training/boards.py",
    "PIL": "hdp/training/boards.py",
    "wandb": "hdp/training/wandb_board.py",
    "apex": "hdp/training/optim.py",
    "amp_C": "hdp/training/optim.py",
    "flash_attn": "hdp/attention/kernels/flash_attn.py",
    "flash_attn_interface": "hdp/attention/kernels/flash_attn.py",
    "transformer_engine": "hdp/attention/kernels/transformer_engine.py",
    "liger_kernel": "hdp/models/liger.py",
    "peft": "hdp/models/lora.py",
    "megatron": "hdp/megatron/contract.py",
}
# Parts of libraries with the same rule: everything else goes through that file.
FOREIGN_PARTS = {
    "torch.utils.tensorboard": "hdp/training/boards.py",
    "torch.distributed.checkpoint": "hdp/checkpoint/files.py",
    "torch.distributed.fsdp": "hdp/distributed/fsdp.py",
}


def file_graph() -> dict[str, set[str]]:
    """module of hdp -> the modules that it imports, at load or later, but for types."""

    def owner(name: str) -> str:
        """hdp.data.pack.Sample -> hdp.data.pack"""
        while name not in MODULES:
            name = name.rpartition(".")[0]
        return name

    return {
        module: {owner(name) for name, _ in imports(path) if name.split(".")[0] == "hdp"} - {module}
        for module, path in MODULES.items()
    }


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """The first cycle of a graph, [] if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if cycle := visit(other, [*path, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def test_cycles_are_found() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_circles_between_rooms() -> None:
    assert not cycle_in(ROOMS), " -> ".join(cycle_in(ROOMS))


def test_no_circles_between_files() -> None:
    cycle = cycle_in(file_graph())
    assert not cycle, " -> ".join(cycle)


def test_imports_point_one_way() -> None:
    used: dict[str, set[str]] = {}
    for module, others in file_graph().items():
        room = room_of(module)
        if room in ("hdp", "__main__", "scheduler.__main__"):
            continue
        used.setdefault(room, set()).update(map(room_of, others - {"hdp"}))
    problems = []
    for room, others in used.items():
        allowed = ROOMS.get(room)
        if allowed is None:
            problems.append(f"{room} is not in ROOMS: give it a place")
            continue
        if wrong := sorted(others - {room} - allowed):
            problems.append(f"{room} must not import {wrong}")
        if unused := sorted(allowed - others):
            problems.append(f"ROOMS allows {room} to import {unused}, and it does not")
    problems += [f"ROOMS names {room}, which does not exist" for room in set(ROOMS) - set(used)]
    assert not problems, "\n".join(problems)


def test_scheduler_is_numpy_only() -> None:
    allowed = {"numpy", "matplotlib", *sys.stdlib_module_names}
    problems = []
    for module, path in MODULES.items():
        if not module.startswith("hdp.scheduler"):
            continue
        for name, _ in imports(path):
            if not (name.startswith("hdp.scheduler") or name.split(".")[0] in allowed):
                problems.append(f"{name_of(path)} imports {name}")
    assert not problems, "\n".join(problems)


def test_foreign_library_in_one_file() -> None:
    everywhere = {"hdp", "numpy", "torch", *sys.stdlib_module_names}
    problems = []
    for path in PACKAGE:
        for module, at_load in imports(path):
            library = module.split(".")[0]
            if library not in everywhere:
                owner = FOREIGN.get(library, "a file of its own, named in FOREIGN")
                if name_of(path) != owner:
                    problems.append(f"{name_of(path)}: {library} belongs to {owner}")
                if at_load:
                    problems.append(f"{name_of(path)}: import {library} inside a function")
            for part, owner in FOREIGN_PARTS.items():
                if (module == part or module.startswith(part + ".")) and name_of(path) != owner:
                    problems.append(f"{name_of(path)}: {part} belongs to {owner}")
    assert not problems, "\n".join(problems)


def test_modules_and_functions_have_names_of_their_own() -> None:
    """`import hdp.scheduler.plan` must not be a function: a package exports no name of a module."""
    problems = [
        f"{name} is a module, and {package} exports another object of that name"
        for package in ("hdp", "hdp.data", "hdp.scheduler")
        for name in (f"{package}.{name}" for name in importlib.import_module(package).__all__)
        if name in MODULES
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "code",
    [
        "import hdp",
        "import hdp.scheduler",
        "import hdp.config",
        "import hdp; hdp.StepPlan; hdp.CostModel; hdp.plan",
        "import hdp; hdp.TrainConfig; hdp.HDPError; hdp.RankFailure",
        "from hdp.cli import main; main(['--help'])",
        "from hdp.cli import main; main(['--version'])",
        "from hdp.cli import main; main(['doctor', '--help'])",
        "from hdp.cli import main; main(['plan', '--help'])",
        "from hdp.cli import main; main(['report', '--help'])",
        "import hdp.report.page",
        "from hdp.cli import main; main(['profile', '--help'])",
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
        [sys.executable, "-c", check],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience(60),
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
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience(120),
    )
    assert done.returncode == 0, done.stderr
