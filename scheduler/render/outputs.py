"""Output files: whether they can be written, asked before the work that fills them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .figure import check_format, figure_class


def check_outputs(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a path under "plot", "trace" or "output" that cannot be written.

    Also for a plot of an unknown type, and where matplotlib is missing.
    """
    for option in ("plot", "trace", "output"):
        name = options.get(option)
        if name is None:
            continue
        path, remedy = Path(name), f"name another file for --{option}"
        if not name or path.is_dir():
            raise ValueError(f"--{option} {name!r} is a folder, not a file; {remedy}")
        if not path.parent.is_dir():
            raise ValueError(
                f"--{option} {path}: there is no folder {path.parent}; create it, or {remedy}"
            )
        target = path if path.exists() else path.parent
        if not os.access(target, os.W_OK):
            raise ValueError(f"--{option} {path}: {target} is not writable; {remedy}")
    if options.get("plot"):
        check_format(Path(options["plot"]))
        figure_class()
