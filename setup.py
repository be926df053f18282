"""Guards the build; everything else about the package is in pyproject.toml.

`hdp/scheduler` is a link to `scheduler/`. A checkout without symbolic links (git on Windows, some
archives) holds a text file in its place, and setuptools would then build a package in which
`import hdp.scheduler` fails. Stop there.
"""

from pathlib import Path

from setuptools import setup

if not (Path(__file__).parent / "hdp" / "scheduler" / "__init__.py").is_file():
    raise SystemExit(
        "hdp/scheduler must be a link to ../scheduler, but this checkout has none; run\n"
        "  git config core.symlinks true && git checkout -f hdp/scheduler"
    )

setup()
