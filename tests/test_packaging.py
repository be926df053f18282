"""Wheel, sdist and editable install contain the whole package and can plan without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(*command: str | Path, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env | OFFLINE, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, since building writes files next to them."""
    copy = tmp_path_factory.mktemp("source") / "hdp"
    junk = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "runs")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=junk)
    return copy


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment without torch; numpy and setuptools are symlinked into it."""
    import numpy
    import setuptools

    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", venv, cwd=venv)
    python = venv / "bin" / "python"
    site = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=venv).strip()
    )
    lender = Path(numpy.__file__).parent.parent
    for name in ("numpy", "numpy.libs"):
        if (lender / name).exists():
            (site / name).symlink_to(lender / name)
    shutil.rmtree(site / "setuptools", ignore_errors=True)
    for old in site.glob("setuptools-*"):
        shutil.rmtree(old)
    lender = Path(setuptools.__file__).parent.parent
    for path in [lender / "setuptools", *lender.glob("setuptools-*.dist-info")]:
        (site / path.name).symlink_to(path)
    assert "no torch" in run(
        python,
        "-c",
        "import importlib.util as u; print('torch' if u.find_spec('torch') else 'no torch')",
        cwd=venv,
    )
    return python


def pip_install(python: Path, *what: str | Path) -> None:
    flags = ("-q", "--no-build-isolation", "--no-deps", "--force-reinstall")
    run(python, "-m", "pip", "install", *flags, *what, cwd=python.parent)


def check_works_without_torch(python: Path, elsewhere: Path) -> None:
    code = (
        "import hdp, hdp.scheduler, sys; assert 'torch' not in sys.modules; "
        "plan = hdp.scheduler.StepPlan.from_lists([5], [[0, 1]], [[[0]], [[0]]], "
        "max_tokens_per_rank=3); plan.validate(); print(hdp.__version__)"
    )
    assert run(python, "-c", code, cwd=elsewhere).strip() == expected_version()
    hdp = python.parent / "hdp"
    assert run(hdp, "--version", cwd=elsewhere).strip() == f"hdp {expected_version()}"
    assert "torch is not installed" in run(hdp, "doctor", cwd=elsewhere)
    assert "usage" in run(hdp, "plan", "--help", cwd=elsewhere)
    assert "usage" in run(python, "-m", "hdp.scheduler", "--help", cwd=elsewhere)
    preset = "from hdp.scheduler import CostModel; print(CostModel.preset('h200').num_layers)"
    assert run(python, "-c", preset, cwd=elsewhere).strip() == "32"
    assert "usage: hdp profile" in run(hdp, "profile", "--help", cwd=elsewhere)


def expected_version() -> str:
    import hdp

    return hdp.__version__


def modules(under: Path) -> set[str]:
    """Sources of the package as `hdp/...` paths, including scheduler's through the link."""
    return {
        str(Path(folder, name).relative_to(under))
        for folder, _, names in os.walk(under / "hdp", followlinks=True)
        for name in names
        if name.endswith(".py")
    }


def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_metadata() -> None:
    project = pyproject()
    assert project["project"]["name"] == "hdp-train"
    assert project["project"]["requires-python"] == ">=3.10"
    assert set(project["project"]["optional-dependencies"]) == {
        "hf", "gpu", "megatron", "rl", "dev"
    }  # fmt: skip
    assert not any("torch" in need for need in project["build-system"]["requires"])
    assert any(need.startswith("torch>=2.9") for need in project["project"]["dependencies"])
    assert expected_version().count(".") == 2


@pytest.mark.parametrize("checkout", [True, False])
def test_remedies_name_this_package(
    checkout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hdp` on the package index is another project; a checkout installs itself."""
    from hdp import installation

    monkeypatch.setattr(installation, "__file__", str(tmp_path / "hdp" / "installation.py"))
    if checkout:
        (tmp_path / "pyproject.toml").touch()
        assert installation.pip_install("hf") == f"pip install -e '{tmp_path}[hf]'"
        monkeypatch.chdir(tmp_path)
        assert installation.pip_install("hf") == "pip install -e '.[hf]'"
    else:
        assert installation.pip_install("hf") == "pip install 'hdp-train[hf]'"


def test_nothing_says_to_install_another_project() -> None:
    for folder in ("hdp", "scheduler", "csrc", "examples", "tools", "docs", ".github", ".ci"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".md", ".yml", "") and path.is_file():
                said = re.findall(r"pip install[^#`\n]*", path.read_text())
                wrong = [line for line in said if re.search(r"\bhdp(?!-train)(\[|\b)", line)]
                assert not wrong, f"{path}: {wrong}"


def test_command_works_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.venv/bin/torchrun` works in an environment that is not on PATH; its messages must, too."""
    from hdp import installation

    monkeypatch.setattr(installation.sys, "executable", str(tmp_path / "bin" / "python"))
    for folder in ("bin", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "hdp").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    told = installation.hdp_command("doctor --build")
    assert told == f"{tmp_path}/bin/python -m hdp doctor --build"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert installation.hdp_command("doctor --build") == "hdp doctor --build"


def test_constraints_pin_direct_dependencies() -> None:
    """Direct dependencies are pinned, so CI changes only when the pins do."""
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    wanted = {
        need.split(">=")[0] for need in [*project["dependencies"], *extras["hf"], *extras["dev"]]
    }
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    assert wanted - {"hdp-train[hf]"} <= pinned


def test_wheel(source: Path, python: Path, tmp_path: Path) -> None:
    flags = ("-q", "--no-build-isolation", "--no-deps", "-w", tmp_path)
    run(python, "-m", "pip", "wheel", *flags, source, cwd=tmp_path)
    [wheel] = tmp_path.glob("hdp_train-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.endswith(".py")} == modules(source)
    assert "hdp/scheduler/step_plan.py" in names
    assert {"hdp/py.typed", "hdp/scheduler/costs/presets/h200.json"} <= names
    assert "hdp/presets/demo-cpu.yaml" in names
    native = [path for path in (ROOT / "csrc").rglob("*.*") if path.parent.name != "__pycache__"]
    assert {f"hdp/{path.relative_to(ROOT)}" for path in native} <= names, "hdp doctor --build"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("scheduler", "tests", "tools")) for name in names)
    pip_install(python, wheel)
    check_works_without_torch(python, tmp_path)


def test_sdist_builds_the_same_package(source: Path, python: Path, tmp_path: Path) -> None:
    code = (
        "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    )
    run(python, "-c", code, tmp_path, cwd=source)
    [sdist] = tmp_path.glob("hdp_train-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert modules(unpacked) == modules(source)
    assert not (unpacked / "hdp" / "scheduler").is_symlink()
    for name in ("LICENSE", "README.md", "Makefile", "constraints/cpu.txt"):
        if (source / name).exists():
            assert (unpacked / name).exists(), name
    pip_install(python, unpacked)
    check_works_without_torch(python, tmp_path)


def test_editable_install(source: Path, python: Path, tmp_path: Path) -> None:
    """Runs from the sources; `scheduler`, `tools` and `tests` cannot be imported on their own."""
    pip_install(python, "-e", source)
    check_works_without_torch(python, tmp_path)
    code = "import hdp, importlib.util as u; print(hdp.__file__, *map(u.find_spec, NAMES))"
    names = "NAMES = ('scheduler', 'tools', 'tests');"
    where = run(python, "-c", names + code, cwd=tmp_path).split()
    assert where == [str(source / "hdp" / "__init__.py"), "None", "None", "None"]


def test_checkout_without_links_is_refused(source: Path, python: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "hdp"
    shutil.copytree(source, checkout, symlinks=True)
    (checkout / "hdp" / "scheduler").unlink()
    (checkout / "hdp" / "scheduler").write_text("../scheduler")
    with pytest.raises(AssertionError, match=r"core\.symlinks"):
        pip_install(python, checkout)
