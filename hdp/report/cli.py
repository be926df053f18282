"""`hdp report RUN [--out FILE]`: write the report of a run, also of one that is still going."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .files import RunFiles
from .page import page


def main(argv: Sequence[str]) -> int:
    """Run `hdp report` with `argv`. Returns the exit code: 2 if there is no run to report on."""
    parser = argparse.ArgumentParser(
        prog="hdp report",
        description="Write one HTML file that shows a run: curves, idle time, plans, options. It "
        "loads nothing from elsewhere, and the run may still be going.",
    )
    parser.add_argument("run", type=Path, help="the folder that --run-dir named")
    parser.add_argument("--out", type=Path, help="the file to write (default: RUN/report.html)")
    options = parser.parse_args(argv)
    out: Path = options.out or options.run / "report.html"
    try:
        run = RunFiles.read(options.run)
        text = page(run)
    except (OSError, ValueError) as error:
        print(f"hdp report: error: {error}", file=sys.stderr)
        return 2
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="ascii")
        partial.replace(out)  # a reader never sees half a report
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        print(f"hdp report: error: cannot write {out}: {reason}", file=sys.stderr)
        return 1
    for problem in run.problems:
        print(f"hdp report: {problem}", file=sys.stderr)
    print(out)
    return 0
