"""Checks the checkout and builds the native library; all other metadata is in pyproject.toml.

`hdp/scheduler` and `hdp/csrc` are symbolic links. In a checkout without symbolic links (git on
Windows, some archives) they are text files, and setuptools would build a package in which `import
hdp.scheduler` fails; this file stops such a build.

`HDP_BUILD=auto|cuda|cpu|none` selects how csrc/ is built (csrc/build.py). With `auto`, the default,
any problem just leaves the library out of the package: hdp works without it, and `hdp doctor
--build` adds it later. pip's isolated builds have no torch to compile against, hence no library.
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

for name in ("scheduler", "csrc"):
    if not (ROOT / "hdp" / name / "__init__.py").is_file():
        raise SystemExit(
            f"hdp/{name} must be a symbolic link to ../{name}, but this checkout has none; run\n"
            f"  git config core.symlinks true && git checkout -f hdp/{name}"
        )

MODE = os.environ.get("HDP_BUILD", "auto")
native = runpy.run_path(str(ROOT / "csrc" / "build.py"))


class BuildLibrary(build_ext):
    """Builds hdp/libhdp.so. Its name has no Python tag: torch loads it, not the interpreter."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            native["build"](Path(self.get_ext_fullpath(ext.name)).resolve(), MODE)
        except native["BuildError"] as error:
            raise CompileError(f"csrc: {error}") from error


class Wheel(bdist_wheel):
    """Tags a wheel that has the library for any Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def extensions() -> list[Extension]:
    """The library, or an empty list for a pure Python package."""
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
