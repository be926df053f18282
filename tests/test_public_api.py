"""What `hdp` exports: real types for a checker, one base class of errors, nothing loaded early."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hdp
from tests.source_tree import PACKAGE, ROOT, name_of, parse

PACKAGES = ("hdp", "hdp.data", "hdp.scheduler")

# Calls as a user's type checker sees them. `# E: codes`: mypy must report these, and nothing else.
CALLS = """
import torch
import hdp
import hdp.data
import hdp.scheduler
from hdp import CostModel, HDPMesh, RingLayout, StepPlan, TrainConfig

cost = CostModel.from_coefficients(quadratic_s=1e-9, linear_s=1e-4)
step: StepPlan = hdp.plan([5, 3], hdp_size=2, max_tokens_per_rank=8, cost=cost)
hdp.plan(1, nonsense=2)  # E: arg-type call-arg
hdp.plan([5, 3], hdp_size="2", max_tokens_per_rank=8, cost=cost)  # E: arg-type
hdp.plan([5, 3], hdp_size=2, max_tokens_per_rank=8)  # E: call-arg
hdp.plam([5, 3])  # E: attr-defined
seconds: str = step.predicted_s  # E: assignment

batches = hdp.pack_rank(step, 0, [])
batches[0].layout.steps[0].source + 1
batches[0].layuot  # E: attr-defined
hdp.pack_rank(step, "0", [])  # E: arg-type

q = torch.zeros(8, 2, 16)
layout = RingLayout(local_seqlens=(8,))
out: torch.Tensor = hdp.ring_attn_varlen_func(q, q, q, layout)
hdp.ring_attn_varlen_func(q, q, q)  # E: call-arg
hdp.zigzag_ring_attn_varlen_func(q, q, q, [0, 8], group=None, softmax_scale=0.25)
hdp.zigzag_ring_attn_varlen_func(q, q, q, [0, 8], max_seqlen=8)  # E: call-arg
rows: int = hdp.zigzag_rows([0, 8], 0, 1)  # E: assignment

with HDPMesh.create(device="cpu") as mesh:
    model = hdp.load_model("folder", dtype=torch.float32)
    hdp.shard(model, mesh)  # E: arg-type
    hdp.shard(model, mesh.device_mesh)
with hdp.offload(ratio="0.5"):  # E: arg-type
    pass

try:
    hdp.train(TrainConfig(steps=3))
    hdp.train("config.json")  # E: arg-type
    TrainConfig(stepz=3)  # E: call-arg
except hdp.RankFailure as failure:
    failure.ranks[0] + 1
except hdp.HDPError as error:
    error.ranks  # E: attr-defined

data = hdp.data.open_dataset("text", tokenizer="bytes")
hdp.data.open_dataset("text", tokenize="bytes")  # E: call-arg
hdp.data.Sampler(data.seqlens, batch_tokens=8, seed=0).batch_at()  # E: call-arg
hdp.data.open_datasets  # E: attr-defined

timeline = hdp.scheduler.simulate(step, cost)
hdp.scheduler.simulate(step)  # E: call-arg
hdp.scheduler.nonsense  # E: attr-defined
"""


def exported(package: str) -> list[str]:
    return [name for name in importlib.import_module(package).__all__ if name != "__version__"]


@pytest.mark.slow
def test_type_checkers_see_real_signatures(tmp_path: Path) -> None:
    """As in another project: hdp is on the path, typed, and its own errors are not reported."""
    pytest.importorskip("mypy")
    assert (ROOT / "hdp" / "py.typed").exists()
    names = [f"{package}.{name}" for package in PACKAGES for name in exported(package)]
    lines = [*CALLS.splitlines(), *(f"reveal_type({name})" for name in names)]
    (tmp_path / "user.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent"]
    command += ["--no-implicit-reexport", f"--cache-dir={ROOT / '.mypy_cache' / 'public_api'}"]
    done = subprocess.run(
        [*command, "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = re.findall(r"^user\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.M)
    expected = {
        (number, code)
        for number, line in enumerate(lines, 1)
        for code in line.partition("# E: ")[2].split()
    }
    wrong = expected ^ {(int(number), code) for number, code in found}
    assert not wrong, "\n".join(
        f"{'missing' if (number, code) in expected else 'unexpected'} {code}: {lines[number - 1]}"
        for number, code in sorted(wrong)
    )
    revealed = re.findall(r'Revealed type is "(.*)"$', done.stdout, re.M)
    assert len(revealed) == len(names), done.stdout
    untyped = [name for name, kind in zip(names, revealed, strict=True) if kind == "Any"]
    assert not untyped, f"a type checker sees Any for {untyped}"


@pytest.mark.parametrize("package", ["hdp", "hdp.data"])
def test_type_checkers_and_python_find_the_same_names(package: str) -> None:
    """The block for type checkers, `_EXPORTS` and `dir()` name the same things."""
    module = importlib.import_module(package)
    blocks = [
        node
        for node in parse(Path(str(module.__file__))).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    [block] = blocks
    typed = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom), ast.unparse(statement)
        source = ("." * statement.level) + (statement.module or "")
        for alias in statement.names:
            assert alias.asname == alias.name, f"import {alias.name} as {alias.name}: a re-export"
            typed[alias.name] = importlib.util.resolve_name(source, package)
    at_run_time = {name: source for source, names in module._EXPORTS.items() for name in names}
    assert typed == at_run_time
    assert [*at_run_time] == exported(package)
    assert sorted(module.__all__) == dir(module)


def test_names_resolve_once_and_for_all() -> None:
    """Each export is there, and is the same object however often it is asked for."""
    pytest.importorskip("torch")
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in exported(package):
            assert getattr(module, name) is getattr(module, name), f"{package}.{name} changes"
        with pytest.raises(AttributeError, match=f"'{package}' has no attribute 'nonsense'"):
            module.nonsense  # noqa: B018


def test_exceptions_have_one_base_class() -> None:
    """Every exception class of the package is an HDPError, and what leaves a room is exported."""
    from hdp.offloading.types import PoolFull

    classes = [
        (name_of(path), node)
        for path in PACKAGE
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef)
        and any(
            re.search(r"(Error|Exception|Failure|Full)$", ast.unparse(base)) for base in node.bases
        )
    ]
    assert {node.name for path, node in classes if path == "hdp/errors.py"} == set(
        hdp._EXPORTS["hdp.errors"]
    )
    # Control flow between two files of one room stays there.
    private = {node.name: path for path, node in classes if path != "hdp/errors.py"}
    assert private == {
        "BuildError": "hdp/csrc/build.py",  # setup.py runs that file without hdp
        "DuplicateKey": "hdp/data/prepare/json_text.py",
        "PoolFull": "hdp/offloading/types.py",
        "RowTimeout": "hdp/data/prepare/deadline.py",  # must pass `except Exception` of templates
    }, "public ones live in hdp/errors.py"
    for kind in (PoolFull, *(getattr(hdp, name) for name in hdp._EXPORTS["hdp.errors"])):
        assert issubclass(kind, hdp.HDPError)


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("NonFiniteError", ArithmeticError),
        ("RankFailure", RuntimeError),
        ("CheckpointError", RuntimeError),
        ("OffloadMemoryError", MemoryError),
        ("OffloadFreedError", RuntimeError),
        ("OffloadModifiedError", RuntimeError),
        ("ChatTemplateError", ValueError),
    ],
)
def test_exceptions_are_also_the_builtin_that_fits(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(hdp, name), builtin)
    assert not issubclass(hdp.HDPError, ValueError)  # bad arguments are not HDPErrors
