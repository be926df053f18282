"""How this copy of hdp was installed, for messages that tell a user what to type.

The package index knows the project as `hdp-train`; `hdp` there is somebody else's. A remedy must be
a command that works as printed, and it differs between a checkout and an installed wheel, and with
whether `hdp` is on PATH.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

DISTRIBUTION = "hdp-train"


def pip_install(extra: str) -> str:
    """The command that adds the extra "hf", "gpu", ...: `pip install 'hdp-train[hf]'`."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    folder = "." if root == Path.cwd() else str(root)
    return f"pip install -e '{folder}[{extra}]'"


def hdp_command(arguments: str) -> str:
    """`hdp ARGUMENTS`, or through the interpreter where PATH has no `hdp`, or another one."""
    found = shutil.which("hdp")
    if found and Path(found).parent.resolve() == Path(sys.executable).parent.resolve():
        return f"hdp {arguments}"
    return f"{sys.executable} -m hdp {arguments}"
