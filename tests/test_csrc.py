"""csrc/ builds for the CPU, for CUDA without a GPU, and into a wheel; its CUDA kernels are correct.

tests/ops tests what the ops compute. Here the same tests also run against the CUDA sources,
compiled as C++ for the emulator in tests/cuda_emulator, in both thread orders.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests" / "cuda_emulator"
SOURCES = sorted(
    path
    for folder in (CSRC, EMULATOR)
    for path in folder.rglob("*")
    if path.suffix in (".h", ".cuh", ".cpp", ".cu")
)
LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<(.+?), (kThreads), 0, stream>>>\(", re.S)
EXP2 = re.compile(r'asm\("ex2.*?\);', re.S)


def _load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("csrc_build", CSRC / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build()
CONTENTS = f"csrc {build.fingerprint()}"  # without it, a library is not loaded


def _lacks(find) -> str:
    try:
        find()
    except build.BuildError as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(
    bool(_lacks(build.find_compiler) or _lacks(build.find_torch)),
    reason=_lacks(build.find_compiler) or _lacks(build.find_torch),
)
needs_nvcc = pytest.mark.skipif(bool(_lacks(build.find_nvcc)), reason=_lacks(build.find_nvcc))


def run(*command, env=None, cwd=None) -> str:
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def _package_with(library: Path, folder: Path) -> Path:
    """A copy of hdp and of the op tests, with `library` as its hdp/libhdp.so."""
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("hdp", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)  # hdp/scheduler as files
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(library, folder / "hdp" / "libhdp.so")
    return folder


def _test_ops(folder: Path, select: str, env=None) -> str:
    command = [sys.executable, "-m", "pytest", "tests/ops", "-p", "no:cacheprovider", "-v"]
    return run(*command, "-k", select, cwd=folder, env=env)


# ---- the sources ----


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_rules(path):
    text = path.read_text()
    assert text.isascii() and text.startswith("//"), "must be ASCII and start with a description"
    lines = text.splitlines()
    assert len(lines) <= 400 and max(map(len, lines)) <= 100
    if path.parent.name == "cuda":
        assert "torch" not in re.sub(r"//.*", "", text), "CUDA files may use the CUDA runtime only"


def test_sources_are_formatted():
    tool = shutil.which("clang-format", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("clang-format is not installed")
    run(tool, "--dry-run", "--Werror", *SOURCES)


def test_one_op_one_file_each():
    """Every op has kernels for both devices, a reference, a fake kernel and an opcheck."""
    text = (CSRC / "library.cpp").read_text()
    schemas = re.findall(r'm\.def\(\s*"(\w+)\(', text)
    assert schemas and set(schemas) == set(re.findall(r'm\.impl\("(\w+)"', text))
    cpu = {path.stem for path in (CSRC / "cpu").glob("*.cpp")}
    assert cpu == {path.stem for path in (CSRC / "cuda").glob("*.cu")}
    ops = "".join(
        (ROOT / "hdp" / "ops" / name).read_text() for name in ("native.py", "reference.py")
    )
    tests = (ROOT / "tests" / "ops" / "test_ops.py").read_text()
    for name in schemas:
        reference = f"{name.removesuffix('_')}_reference{'_' if name.endswith('_') else ''}"
        assert f"def {name}(" in ops and f"def {reference}(" in ops, name
        assert f'"hdp::{name}"' in ops or f'"{name}"' in ops, f"{name} has no fake kernel"
        assert f"names.{name}," in tests, f"{name} has no opcheck"


# ---- the build ----


def test_modes(monkeypatch, tmp_path):
    assert build.choose("none") == "none"
    with pytest.raises(build.BuildError, match="mode 'gpu' is unknown: choose one of auto, cuda"):
        build.choose("gpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.choose("auto") == "none"
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.choose("cpu")


@needs_compiler
@pytest.mark.parametrize(
    ("has_cuda", "has_nvcc", "expected"),
    [(True, True, "cuda"), (True, False, "cpu"), (False, True, "cpu"), (False, False, "cpu")],
)
def test_auto(monkeypatch, has_cuda, has_nvcc, expected):
    def find_nvcc():
        if not has_nvcc:
            raise build.BuildError("no nvcc on PATH or in CUDA_HOME")
        return "nvcc"

    folder, version, _ = build.find_torch()
    monkeypatch.setattr(build, "find_torch", lambda: (folder, version, has_cuda))
    monkeypatch.setattr(build, "find_nvcc", find_nvcc)
    assert build.choose("auto") == expected
    if not has_nvcc:
        with pytest.raises(build.BuildError, match="no nvcc"):
            build.choose("cuda")


def test_old_torch_is_named(monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1'\ncuda = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(build.BuildError, match=r"torch 2\.9 is older than 2\.10"):
        build.find_torch()


def test_current_library_is_kept(monkeypatch, tmp_path):
    library = tmp_path / "libhdp.so"
    assert not build.is_current(library, "cpu")
    library.write_bytes(b"...hdp build: cpu\0...")
    assert build.is_current(library, "cpu")
    assert not build.is_current(library, "cpu, cuda (sm_90)")


def test_fingerprint_depends_on_contents_alone(tmp_path):
    """Installers and git set times as they like: a library names the sources of its build."""
    copy = shutil.copytree(CSRC, tmp_path / "csrc", copy_function=shutil.copyfile)
    assert build.fingerprint(copy) == build.fingerprint()
    (copy / "build.py").write_text("# not compiled")
    assert build.fingerprint(copy) == build.fingerprint()
    (copy / "ops.h").write_text((copy / "ops.h").read_text() + "\n")
    assert build.fingerprint(copy) != build.fingerprint()


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_holds_the_library(tmp_path):
    """One wheel for every Python, with a working library; HDP_BUILD=none builds a pure one."""
    source = tmp_path / "source"
    junk = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.so", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=junk)
    names = {}
    for mode in ("cpu", "none"):
        target = tmp_path / mode
        flags = ("-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", target)
        run(sys.executable, "-m", "pip", "wheel", *flags, source, env={"HDP_BUILD": mode})
        [wheel] = target.glob("hdp_train-*.whl")
        names[mode] = wheel.name
        shutil.rmtree(source / "build", ignore_errors=True)
    assert "-py3-none-" in names["cpu"] and not names["cpu"].endswith("-any.whl")
    assert names["none"].endswith("-py3-none-any.whl")
    with zipfile.ZipFile(tmp_path / "cpu" / names["cpu"]) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import torch; from hdp.ops import native as ops; "
        "assert ops.describe('cpu') == ('csrc', 'cpu'), ops.LIBRARY; "
        "print(ops.gather_rows(torch.arange(5), [(1, 3)]).tolist())"
    )
    site = tmp_path / "site"
    here = {"cwd": site, "env": {"PYTHONPATH": str(site)}}
    assert run(sys.executable, "-c", code, **here).strip() == "[1, 2]"
    check_built_where_installed(tmp_path / "none" / names["none"], site, code)


def check_built_where_installed(wheel: Path, site: Path, code: str) -> None:
    """A pure wheel holds the sources, and its message names the command that builds them."""
    here = {"cwd": site, "env": {"PYTHONPATH": str(site)}}
    shutil.rmtree(site)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    describe = "from hdp.ops.native import describe; print(describe('cpu')[1])"
    told = run(sys.executable, "-c", describe, **here).strip()
    assert told.startswith("csrc is not built; to build it: ")
    command = shlex.split(told.partition("to build it: ")[2])
    assert command[-2:] == ["doctor", "--build"]
    assert f"{site / 'hdp' / 'libhdp.so'}: cpu" in run(*command, **here)
    assert run(sys.executable, "-c", code, **here).strip() == "[1, 2]"
    # A library of an earlier version, which an upgrade left behind, is not loaded.
    (site / "hdp" / "csrc" / "ops.h").write_text("// another version")
    assert "not built from this csrc/" in run(sys.executable, "-c", describe, **here)


@needs_compiler
@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cuda_compiles_without_a_gpu(tmp_path):
    """Compile for sm_80, sm_90 and sm_100; no kernel spills; a torch without CUDA loads it."""
    archs = build.cuda_archs(build.find_nvcc())
    objects = []
    for source in build.sources("cuda"):
        objects.append(tmp_path / f"{source.parent.name}_{source.name}.o")
        if source.suffix == ".cu":
            report = run(*build.cuda_command(source, objects[-1], archs, "-Xptxas=-v"))
            lines = re.findall(r"\d+ bytes stack frame.*", report)
            assert len(lines) >= len(archs) or "__global__" not in source.read_text(), report
            clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
            assert not set(lines) - {clean}, f"{source.name} uses local memory:\n{report}"
        else:
            run(
                *build.cpp_command(
                    source, objects[-1], "cuda", f"cpu, cuda (test); csrc {build.fingerprint()}"
                )
            )
    library = tmp_path / "libhdp.so"
    run(*build.link_command(objects, library, "cuda"))
    folder = _package_with(library, tmp_path / "package")
    # Where the library does not load, these are skipped.
    report = _test_ops(folder, "cpu and (equals or opcheck)")
    assert re.search(r"[3-9]\d\d passed", report), report


# ---- the CUDA kernels on a CPU ----


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cuda_kernels_on_the_emulator(tmp_path):
    """All tests of the ops, with the CUDA kernels in place of the CPU ones."""
    objects = []
    include = [f"-I{folder}" for folder in (EMULATOR, CSRC, CSRC / "cuda")]
    flags = ["-O1", "-w", *include]
    for source in [*(CSRC / "cuda").glob("*.cu"), *EMULATOR.glob("*.cpp"), CSRC / "library.cpp"]:
        text = source.read_text()
        if source.suffix == ".cu":
            text = LAUNCH.sub(r"emulator::launch(\1, \2, \3)(", text)
            text = EXP2.sub("y = exp2f(x * 1.4426950408889634f);", text)
            assert "emulator::launch" in text and "<<<" not in text and "asm" not in text
        translated = tmp_path / f"{source.stem}.cpp"
        translated.write_text(text)
        objects.append(translated.with_suffix(".o"))
        command = build.cpp_command(
            translated, objects[-1], "cpu", f"cpu; csrc {build.fingerprint()}"
        )
        run(*command, *flags)
    library = tmp_path / "libhdp.so"
    run(*build.link_command(objects, library, "cpu"))
    folder = _package_with(library, tmp_path / "package")
    # A wrong label gives NaN in CUDA kernels, while the CPU's test expects an error.
    report = _test_ops(folder, "cpu and not outside_of_the_vocabulary")
    assert re.search(r"[4-9]\d\d passed", report), report
    # Kernels with barriers again, starting with the last thread.
    barriers = "cpu and (backward_equals or cross_entropy_equals or merge_equals)"
    report = _test_ops(folder, barriers, {"HDP_EMULATOR_REVERSE": "1"})
    assert re.search(r"[3-9]\d\d passed", report), report
