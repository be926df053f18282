"""Compile csrc/ into hdp/libhdp.so: `hdp doctor --build`, `python csrc/build.py` or `pip install`.

    auto   cuda if there is nvcc and a torch with CUDA, else cpu if there is a compiler and torch,
           else none
    cuda   CPU and CUDA kernels; needs nvcc, but neither a GPU nor a torch with CUDA
    cpu    CPU kernels
    none   nothing: hdp runs on its Python references

For pip, the environment variable HDP_BUILD sets the mode. HDP_CUDA_ARCHS (default 80,90,100) lists
the GPU architectures. The library is not a Python extension: it registers its ops through torch's
stable ABI, so one build works with every Python and every torch from 2.10 on, and it loads with or
without CUDA. See docs/native.md. This file must not import torch, because setup.py runs it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
# In a checkout, csrc/ is beside hdp/; in an installed package it is inside.
PACKAGE = CSRC.parent / "hdp" if (CSRC.parent / "hdp" / "ops").is_dir() else CSRC.parent
LIBRARY = PACKAGE / "libhdp.so"
INPUTS = (".h", ".cuh", ".cpp", ".cu")
MODES = ("auto", "cuda", "cpu", "none")
TORCH_MINIMUM = (2, 10)
STABLE_ABI = "0x020a000000000000"  # of TORCH_MINIMUM

# No contraction to fused multiply-add: every instruction set gives the same bits.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]


class BuildError(RuntimeError):
    """The library cannot be built on this machine; the message says why."""


# ---- tools on this machine ----


def find_torch() -> tuple[Path, tuple[int, ...], bool]:
    """(folder, version, whether it has CUDA) of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed here (with pip, pass --no-build-isolation)")
    folder = Path(spec.submodule_search_locations[0])
    text = (folder / "version.py").read_text()
    match = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    version = tuple(map(int, match.groups())) if match else (0, 0)
    if version < TORCH_MINIMUM:
        raise BuildError("torch {}.{} is older than 2.10: upgrade torch".format(*version))
    return folder, version, re.search(r"^cuda\b.*= '\d", text, re.M) is not None


def find_compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise BuildError("no C++ compiler (g++ or clang++) on PATH")


def find_nvcc() -> str:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    for path in [
        *(f"{home}/bin/nvcc" for home in homes if home),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]:
        if found := shutil.which(path):
            return found
    raise BuildError("no nvcc on PATH or in CUDA_HOME")


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures in HDP_CUDA_ARCHS that nvcc supports, oldest first: ["80", "90", "100"]."""
    wanted = re.findall(r"\d+a?", os.environ.get("HDP_CUDA_ARCHS", "80,90,100"))
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = [arch for arch in wanted if f"compute_{arch}\n" in listed.stdout]
    if not known:
        raise BuildError(f"{nvcc} supports none of {wanted}; set HDP_CUDA_ARCHS")
    return sorted(known, key=lambda arch: int(arch.rstrip("a")))


def choose(mode: str) -> str:
    """Resolve `auto` to cuda, cpu or none. Raises BuildError if the given mode is impossible."""
    if mode not in MODES:
        raise BuildError(f"mode {mode!r} is unknown: choose one of {', '.join(MODES)}")
    if mode == "auto":
        try:
            find_compiler()
            _, _, with_cuda = find_torch()
            find_nvcc()
        except BuildError as error:
            return "cpu" if "nvcc" in str(error) else "none"
        return "cuda" if with_cuda else "cpu"
    if mode != "none":
        find_compiler()
        find_torch()
    if mode == "cuda":
        find_nvcc()
    return mode


# ---- commands ----


def cpp_command(source: Path, target: Path, mode: str, info: str) -> list[str]:
    torch, *_ = find_torch()
    defines = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", f'-DHDP_BUILD_INFO="{info}"']
    defines += ["-DHDP_CUDA"] if mode == "cuda" else []
    include = ["-isystem", str(torch / "include")]
    return [find_compiler(), *CXX_FLAGS, *defines, *include, "-c", str(source), "-o", str(target)]


def cuda_command(source: Path, target: Path, archs: list[str], *flags: str) -> list[str]:
    """Compile to machine code for each of `archs`, plus PTX of the newest for later GPUs."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return [find_nvcc(), *NVCC_FLAGS, *codes, *flags, "-c", str(source), "-o", str(target)]


def link_command(objects: list[Path], target: Path, mode: str) -> list[str]:
    torch, *_ = find_torch()
    names = ["torch", "torch_cpu", "c10"]
    if (torch / "lib" / "libtorch_cuda.so").exists():
        names.append("torch_cuda")
    libraries = [f"-L{torch / 'lib'}", *(f"-l{name}" for name in names)]
    # Keep libraries that look unused: at load time, the stream function comes from libtorch_cuda.
    keep = ["--no-as-needed", "--exclude-libs,ALL"] if sys.platform == "linux" else []
    if mode == "cuda":
        start = [find_nvcc(), "-shared", "-cudart=static", *(f"-Xlinker={flag}" for flag in keep)]
    else:
        start = [find_compiler(), "-shared", *(f"-Wl,{flag}" for flag in keep)]
    return [*start, *map(str, objects), *libraries, "-o", str(target)]


def build(target: Path, mode: str) -> str:
    """Build the library at `target`, or copy an up-to-date hdp/libhdp.so; returns its contents."""
    mode = choose(mode)
    if mode == "none":
        raise BuildError("mode is none, or found no C++ compiler or no torch 2.10")
    archs = cuda_archs(find_nvcc()) if mode == "cuda" else []
    devices = "cpu" + (f", cuda ({' '.join(f'sm_{arch}' for arch in archs)})" if archs else "")
    info = f"{devices}; csrc {fingerprint()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_current(LIBRARY, info):
        if target.resolve() != LIBRARY:
            shutil.copy2(LIBRARY, target)
        return devices
    with tempfile.TemporaryDirectory() as folder:
        commands, objects = [], []
        for source in sources(mode):
            objects.append(Path(folder, "_".join(source.relative_to(CSRC).parts) + ".o"))
            if source.suffix == ".cu":
                commands.append(cuda_command(source, objects[-1], archs))
            else:
                commands.append(cpp_command(source, objects[-1], mode, info))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
        linked = Path(folder, target.name)
        run(link_command(objects, linked, mode))
        # Replace the file atomically: processes that have loaded the old library keep it.
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(linked, partial)
        partial.replace(target)
    return devices


def sources(mode: str) -> list[Path]:
    patterns = ["*.cpp", "cpu/*.cpp"]
    patterns += ["cuda/*.cu"] if mode == "cuda" else []
    return [path for pattern in patterns for path in sorted(CSRC.glob(pattern))]


def fingerprint(folder: Path = CSRC) -> str:
    """Of all sources in csrc/: the library names those it was built from.

    Times of files would not do: installers and git set them as they like.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in INPUTS):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def is_current(library: Path, info: str) -> bool:
    """Whether `library` has these contents, the sources' fingerprint included."""
    return library.exists() and f"hdp build: {info}\0".encode() in library.read_bytes()


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def main(argv: Sequence[str] | None = None) -> int:
    """Build by the flags in `argv`; returns 0, or 1 after the reason on stderr."""
    parser = argparse.ArgumentParser(description="Compile csrc/ into hdp/libhdp.so.")
    parser.add_argument("--mode", choices=MODES, default=os.environ.get("HDP_BUILD", "auto"))
    parser.add_argument("--out", type=Path, default=LIBRARY, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        print(f"{args.out}: {build(args.out.resolve(), args.mode)}")
    except (BuildError, OSError) as error:  # OSError: a package folder that may not be written to
        print(f"not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
