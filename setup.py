"""Guards the build and makes the native library; the rest of the package is in pyproject.toml.

`hdp/scheduler` is a link to `scheduler/`. A checkout without symbolic links (git on Windows, some
archives) holds a text file in its place, and setuptools would then build a package in which
`import hdp.scheduler` fails. Stop there.

`HDP_BUILD=auto|cuda|cpu|none` says what becomes of csrc/ (csrc/build.py). With `auto`, the default,
a package without the library is the answer to whatever is missing or goes wrong: hdp works without.
"""

import os
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

if not (ROOT / "hdp" / "scheduler" / "__init__.py").is_file():
    raise SystemExit(
        "hdp/scheduler must be a link to ../scheduler, but this checkout has none; run\n"
        "  git config core.symlinks true && git checkout -f hdp/scheduler"
    )

MODE = os.environ.get("HDP_BUILD", "auto")
native = runpy.run_path(str(ROOT / "csrc" / "build.py"))


class BuildLibrary(build_ext):
    """hdp/libhdp.so, one for every Python: torch loads it, not the interpreter."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            native["build"](Path(self.get_ext_fullpath(ext.name)).resolve(), MODE)
        except native["BuildError"] as error:
            raise CompileError(f"csrc: {error}") from error


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def extensions() -> list[Extension]:
    """The library, or nothing: then the package is pure Python."""
    try:
        mode = native["choose"](MODE)
    except native["BuildError"] as error:
        sys.exit(f"HDP_BUILD={MODE}: {error}")
    if mode == "none":
        return []
    sources = [os.path.relpath(path, ROOT) for path in native["sources"](mode)]
    return [Extension("hdp.libhdp", sources, optional=MODE == "auto")]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
