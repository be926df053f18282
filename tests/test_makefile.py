"""`make` runs the right commands, with the interpreter, index and pins it was given."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Only the files that the environment depends on, without an environment."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints/cpu.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(
    checkout: Path, *arguments: str, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run make without a GPU, and without variables inherited from a make that runs this test."""
    drop = ("MAKE", "MFLAGS", "TORCH_INDEX", "CONSTRAINTS", "VENV", "PYTHON", "STEPS", "NPROC")
    drop += ("TEST_ARGS", "ARGS")
    env = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    no_gpu = checkout / "no-gpu"
    no_gpu.mkdir(exist_ok=True)
    executable(no_gpu / "nvidia-smi", "exit 9")
    env["PATH"] = os.pathsep.join([str(path or no_gpu), env["PATH"]])
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=env, capture_output=True, text=True
    )


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_sft_command(checkout: Path) -> None:
    plan = make(checkout, "-n", "sft", "STEPS=4", "ARGS=--lr 1").stdout
    assert plan.splitlines()[-1] == (
        ".venv/bin/torchrun --standalone --nproc-per-node 4 examples/sft.py --steps 4 --lr 1"
    )
    assert "-c constraints/cpu.txt" in plan
    assert "extra-index-url" not in plan


def test_torch_is_there_before_csrc_is_compiled(checkout: Path) -> None:
    """setup.py compiles csrc/ against the installed torch; without one it builds nothing."""
    for target in ("sft", "test"):
        lines = make(checkout, "-n", target).stdout.splitlines()
        [torch] = [i for i, line in enumerate(lines) if line.endswith(" numpy torch")]
        [package] = [i for i, line in enumerate(lines) if line.endswith("-e '.[hf]'")]
        assert torch < package and "--no-build-isolation" in lines[package]


def test_slow_tests_are_left_out_of_one_target_only(checkout: Path) -> None:
    quick = make(checkout, "-n", "test", "TEST_ARGS=-x").stdout.splitlines()[-1]
    assert quick == '.venv/bin/python -m pytest -m "not slow" -x'
    whole = make(checkout, "-n", "test-all", "TEST_ARGS=-x").stdout.splitlines()[-1]
    assert whole == ".venv/bin/python -m pytest -x"
    steps = re.findall(r"^step make (\S+)", (ROOT / ".ci" / "run").read_text(), re.M)
    assert steps == ["test-all", "sft", "examples", "lint"]


def test_every_example_runs_and_one_that_fails_ends_it(checkout: Path) -> None:
    (checkout / "examples").mkdir()
    for name in ("sft", "bad", "good", "other"):
        (checkout / "examples" / f"{name}.py").touch()
    (checkout / ".venv" / "bin").mkdir(parents=True)
    for stamp in (".created", ".ready-hf"):
        (checkout / ".venv" / stamp).touch()
    script = 'for last; do :; done; echo "ran $last"; [ $last != examples/bad.py ]'
    executable(checkout / ".venv" / "bin" / "torchrun", script)
    done = make(checkout, "examples")
    assert done.returncode and "ran examples/bad.py" in done.stdout
    assert "ran examples/good.py" not in done.stdout
    (checkout / "examples" / "bad.py").unlink()
    done = make(checkout, "examples")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"ran (\S+)", done.stdout) == ["examples/good.py", "examples/other.py"]


def test_sft_fits_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make sft` starts one rank per GPU; the demo's longest text fits on any number of ranks."""
    config_class = runpy.run_path(str(ROOT / "examples" / "sft.py"))["SFTConfig"]
    for ranks, tokens in ((1, 8192), (2, 4096), (3, 2731), (4, 2048), (8, 2048)):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        config = config_class()
        assert config.max_tokens_per_rank == tokens
        assert ranks * tokens >= config.max_length == 8192


def test_torch_may_come_from_an_index_and_pins_be_taken_off(checkout: Path) -> None:
    plan = make(checkout, "-n", "sft", "CONSTRAINTS=", "TORCH_INDEX=https://some.where/cpu").stdout
    assert " -c constraints" not in plan
    assert "--extra-index-url https://some.where/cpu torch" in plan


def test_gpus_are_counted(checkout: Path) -> None:
    executable(checkout / "nvidia-smi", "echo 'GPU 0: H200'; echo 'GPU 1: H200'")
    plan = make(checkout, "-n", "sft", path=checkout).stdout
    assert "--nproc-per-node 2 " in plan


@pytest.mark.parametrize("version", ["2.7", "3.9", None])
def test_old_python_is_refused(checkout: Path, version: str | None) -> None:
    python = checkout / "python"
    if version:
        executable(python, f'[ "$1" = --version ] && echo Python {version} || exit 1')
    done = make(checkout, "test", f"PYTHON={python}")
    assert done.returncode
    assert "hdp needs Python 3.10 or later" in done.stderr
    assert (version or "not found") in done.stderr
    assert not (checkout / ".venv").exists()


def test_set_up_again_when_and_only_when_needed(checkout: Path) -> None:
    venv = checkout / ".venv"
    venv.mkdir()
    for stamp in (".created", ".ready-hf", ".ready-dev"):
        (venv / stamp).touch()
    assert make(checkout, "-n", "test").stdout.split()[1:3] == ["-m", "pytest"]  # and nothing else
    later = (venv / ".ready-dev").stat().st_mtime + 10
    os.utime(checkout / "constraints" / "cpu.txt", (later, later))
    plan = make(checkout, "-n", "test").stdout
    assert ".[hf]" in plan
    assert ".[dev]" in plan
    assert "-m venv" not in plan


def test_clean_spares_what_is_no_environment(checkout: Path) -> None:
    (checkout / "precious").mkdir()
    assert make(checkout, "clean", "VENV=precious").returncode == 0
    assert (checkout / "precious").exists()
    (checkout / "precious" / "pyvenv.cfg").touch()
    assert make(checkout, "clean", "VENV=precious").returncode == 0
    assert not (checkout / "precious").exists()
