"""RunFiles: what is in a run folder, read with tolerance.

A report is wanted most when something went wrong, and while a run is still going. So nothing here
raises for what a file says: what cannot be read is left out and listed in `problems`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .trace import Trace

_MOST_TRACES = 12  # the newest; each is a picture of its own
_LARGEST_STEP = 2**53  # what a number in JavaScript counts exactly


@dataclass(slots=True, kw_only=True)
class RunFiles:
    """One run. `rows` are those of training steps, by step; `evals` those of evaluations."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    written_s: float | None = None  # when the metrics were last written, seconds since the epoch
    read_s: float = field(default_factory=time.time)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Read a run folder. Raises ValueError if it is none."""
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}: give the one that --run-dir named")
        found = cls(folder=folder)
        traces = [p for p in folder.glob("trace_*.json") if re.fullmatch(r"trace_\d+", p.stem)]
        known = [folder / "config.json", folder / "metrics.jsonl"]
        if not any(path.exists() for path in [*known, *traces]):
            raise ValueError(
                f"no run in {folder}: it has neither config.json nor metrics.jsonl; give the "
                "folder that --run-dir named"
            )
        found._read_config()
        found._read_metrics()
        found._read_traces(sorted(traces, key=lambda path: int(path.stem[6:])))
        saves = folder / "checkpoints"
        if saves.is_dir():
            found.checkpoints = sorted(
                path.name for path in saves.iterdir() if re.fullmatch(r"step-\d+", path.name)
            )
        return found

    @property
    def num_steps(self) -> int | None:
        """The number of steps that the run was asked for, if that is known."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) and not isinstance(steps, bool) else None

    def _text(self, path: Path) -> str | None:
        if not path.exists():
            self.problems.append(f"{path.name} is missing")
            return None
        try:
            if not path.is_file():
                raise OSError("it is not a file")
            return path.read_bytes().decode("utf-8", "replace")
        except OSError as error:
            self.problems.append(f"{path.name} cannot be read: {error.strerror or error}")
            return None

    def _read_config(self) -> None:
        text = self._text(self.folder / "config.json")
        if text is None:
            return
        try:
            config = json.loads(text)
            if not isinstance(config, dict):
                raise ValueError("it holds no object, {...}")
            self.config = config
        except (ValueError, RecursionError) as error:
            self.problems.append(f"config.json is damaged: {error}")

    def _read_metrics(self) -> None:
        path = self.folder / "metrics.jsonl"
        text = self._text(path)
        if text is None:
            return
        self.written_s = path.stat().st_mtime
        rows: dict[int, dict[str, Any]] = {}  # the last row of a step counts
        evals: dict[int, dict[str, Any]] = {}
        damaged = 0
        for row in _objects(text):
            step = row.get("step")
            if type(step) is not int or not 0 <= step < _LARGEST_STEP:
                damaged += 1
            elif "loss" in row:
                rows[step] = row
            elif row:
                evals[step] = {**evals.get(step, {}), **row}
        self.rows = [rows[step] for step in sorted(rows)]
        self.evals = [evals[step] for step in sorted(evals)]
        if damaged:
            lines = f"{damaged} damaged row" + ("s were" if damaged > 1 else " was")
            self.problems.append(f"metrics.jsonl: {lines} left out")
        if not rows:
            self.problems.append("metrics.jsonl has no step yet")

    def _read_traces(self, paths: list[Path]) -> None:
        if len(paths) > _MOST_TRACES:
            self.problems.append(f"of {len(paths)} traces, the newest {_MOST_TRACES} are shown")
        for path in paths[-_MOST_TRACES:]:
            text = self._text(path)
            try:
                if text is not None:
                    self.traces.append(Trace.from_json(text))
            except ValueError as error:
                self.problems.append(f"{path.name} is damaged: {error}")


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The object of each line; {} for a line that holds none, except a last one half written."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number < len(lines) - 1:  # the last one is being written right now
                yield {}
            continue
        yield row if isinstance(row, dict) else {}
