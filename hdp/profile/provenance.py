"""Which commit a figure was measured at: what the benchmarks print above their tables."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit(*git: str) -> str:
    """What such a git command says of the checkout that this file is in; "unknown" without one."""
    try:
        done = subprocess.run(
            ["git", *git], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
