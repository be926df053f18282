"""Which code produced a measurement: the commit of a checkout, or the version of an install."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hdp import __version__


def commit() -> str | None:
    """The checkout's commit, with "-dirty" if it has changes; None outside a checkout of hdp.

    An installed hdp may lie inside a user's own repository, whose commit means nothing here, so
    only a repository that tracks this file counts.
    """
    if _git("ls-files", Path(__file__).name) is None:
        return None
    return _git("describe", "--always", "--dirty", "--exclude", "*")


def code_version() -> str:
    """A label for table headers: "commit 1a2b3c4", or "hdp 0.1.0" outside a checkout."""
    known = commit()
    return f"commit {known}" if known else f"hdp {__version__}"


def _git(*arguments: str) -> str | None:
    """Output of git; None if it is empty, or git fails or is missing."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
