"""Boards: metrics, pictures and texts in TensorBoard and Weights & Biases, by one set of calls.

metrics.jsonl is the record of a run; a board is a view of it. So nothing that goes wrong with a
board stops training: a package that is not installed, a full disk, a lost network. The first
failure of a board is said, and that board gets nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Rows = Sequence[tuple[str, str]]  # (name, text)


class Board(Protocol):
    """One back end. Any method may raise; `Boards` deals with it."""

    name: str

    def config(self, values: Mapping[str, Any]) -> None: ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, path: Path) -> None: ...

    def texts(self, step: int, name: str, rows: Rows) -> None: ...

    def close(self, *, failed: bool) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardOptions:
    """Which boards a run wants, and what they show of its set-up."""

    tensorboard: bool = False
    wandb: str | None = None  # the project; None: off
    wandb_mode: str = "online"
    config: Mapping[str, Any] = field(default_factory=dict)


class Boards:
    """All boards of a run; falsy if there is none."""

    def __init__(self, say: Callable[[str], None] = lambda message: None) -> None:
        self._say = say
        self._boards: list[Board] = []

    @classmethod
    def open(
        cls,
        options: BoardOptions,
        run_dir: Path,
        *,
        first_step: int,
        say: Callable[[str], None],
    ) -> Boards:
        """Open the boards that `options` name. One that cannot be opened is said and left out."""
        boards = cls(say)
        if options.tensorboard:
            boards._add("TensorBoard", lambda: TensorBoard(run_dir, first_step=first_step))
        project = options.wandb
        if project:
            from .wandb_board import WandB

            boards._add(
                "W&B",
                lambda: WandB(
                    run_dir, project, mode=options.wandb_mode, first_step=first_step, say=say
                ),
            )
        if options.config:
            boards._each(lambda board: board.config(options.config))
        return boards

    def _add(self, name: str, build: Callable[[], Board]) -> None:
        try:
            self._boards.append(build())
        except ImportError as error:
            package = {"TensorBoard": "tensorboard", "W&B": "wandb"}[name]
            self._say(f"{name} is off: {error}; pip install {package}")
        except Exception as error:
            self._say(f"{name} is off for this run: {_short(error)}")

    def __bool__(self) -> bool:
        return bool(self._boards)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers among `values`, by name; other values are left out."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and name != "step"
        }
        self._each(lambda board: board.scalars(step, numbers))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Send a PNG file."""
        self._each(lambda board: board.picture(step, name, path))

    def texts(self, step: int, name: str, rows: Rows) -> None:
        """Send texts, each with its name."""
        self._each(lambda board: board.texts(step, name, rows))

    def close(self, *, failed: bool = False) -> None:
        """Finish all boards: they write or send what they still hold. failed: by an error."""
        self._each(lambda board: board.close(failed=failed))
        self._boards = []

    def _each(self, act: Callable[[Board], None]) -> None:
        for board in list(self._boards):
            try:
                act(board)
            except Exception as error:
                self._boards.remove(board)
                self._say(f"{board.name} logging stopped for the rest of this run: {_short(error)}")


class TensorBoard:
    """A board in RUN/tensorboard: `tensorboard --logdir RUN`."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def config(self, values: Mapping[str, Any]) -> None:
        rows = [(name, "" if value is None else str(value)) for name, value in values.items()]
        head = "| option | value |\n|---|---|\n"
        table = "".join(f"| {name} | {_cell(value)} |\n" for name, value in rows)
        self.writer.add_text("config", head + table)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def texts(self, step: int, name: str, rows: Rows) -> None:
        for number, (title, text) in enumerate(rows):
            lines = "\n".join("    " + line for line in text.splitlines())  # Markdown: as it is
            self.writer.add_text(f"{name}/{number}", f"{title}\n\n{lines}", step)

    def close(self, *, failed: bool) -> None:
        self.writer.close()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _short(error: Exception) -> str:
    """The first line of a message; wandb's have several."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
