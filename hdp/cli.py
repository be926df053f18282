"""The `hdp` command: a dispatcher that imports only what each command needs.

    hdp plan lengths.txt --hdp-size 64 --max-tokens-per-rank 32768     no torch
    hdp doctor                                                         works without torch
    torchrun --nproc-per-node 8 -m hdp profile --out cost.json
    torchrun --nproc-per-node 8 -m hdp train --data ./docs --model Qwen/Qwen3-0.6B

`train` turns the fields of a frozen dataclass (`hdp/config.py`) into flags with tyro, which only
this file imports; the recipes in examples/ use `parse_config` for their own configurations. `plan`,
`simulate` and `compare` are also `python -m hdp.scheduler`.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from hdp.config import TrainConfig
    from hdp.training.callbacks import Callback
    from hdp.training.progress import Progress
    from hdp.training.setup import Run

Config = TypeVar("Config")

USAGE = """\
usage: hdp COMMAND [options]

  train      train a model; on multiple ranks: torchrun --nproc-per-node 8 -m hdp train ...
  doctor     report this machine's hardware and libraries, and the back ends in use
  profile    measure this machine and write a cost model for --cost
  plan       plan one batch of sequence lengths
  simulate   run a plan in the simulator
  compare    compare policies on the same batches

`hdp COMMAND --help` lists a command's options; `hdp --version` prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hdp` with `argv` (None: sys.argv[1:]). Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        from hdp import __version__

        print(f"hdp {__version__}")
        return 0
    if command == "doctor":
        from hdp.doctor import report as doctor

        return doctor.main(arguments[1:])
    if command == "profile":
        from hdp.profile import cli as profile

        return profile.main(arguments[1:])
    if command in ("plan", "simulate", "compare"):
        from hdp.scheduler import cli

        return cli.main(arguments)
    if command == "train":
        return _train(arguments[1:])
    print(f"hdp: unknown command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
    return 2


def parse_config(
    config_class: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> Config:
    """Parse one flag per field of the dataclass `config_class`; help comes from its docstrings.

    Integers may be written as 16K or 2M (powers of 1024), as in `hdp plan`. An unknown flag, or a
    value that the class rejects with ValueError, prints the message and exits with code 2.
    """
    try:
        import tyro
    except ImportError:
        raise SystemExit("parsing flags requires tyro: pip install 'hdp[hf]'") from None
    return tyro.cli(
        config_class,
        args=_with_plain_integers(
            _with_joined_lists(sys.argv[1:] if argv is None else argv, config_class), config_class
        ),
        prog=prog,
        description=description,
        config=(tyro.conf.HelptextFromCommentsOff,),  # "# -- step --" is a heading, not help
    )


def _with_joined_lists(argv: Sequence[str], config_class: Any) -> list[str]:
    """Rewrite --data a --data b as --data a b, for flags that take several values."""
    flags = {
        f"--{f.name.replace('_', '-')}"
        for f in fields(config_class)
        if "tuple[str, ...]" in str(f.type)
    }
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    flag = ""
    for word in argv:
        start, equals, value = word.partition("=")
        if word.startswith("--"):
            flag = start.replace("_", "-") if start.replace("_", "-") in flags else ""
            if flag:
                values.setdefault(flag, []).extend([value] if equals else [])
                continue
        if flag:
            values[flag].append(word)
        else:
            rest.append(word)
    return [*rest, *(part for flag, given in values.items() for part in (flag, *given))]


def _with_plain_integers(argv: Sequence[str], config_class: Any) -> list[str]:
    """Rewrite --max-length 16K as --max-length 16384; leave flags that are not integers alone."""
    integers = {f.name for f in fields(config_class) if re.search(r"\bint\b", str(f.type))}
    plain, flag = [], ""
    for word in argv:
        start, equals, value = word.partition("=") if word.startswith("--") else (flag, "", word)
        flag = start
        size = re.fullmatch(r"(\d+)([KM])", value, re.IGNORECASE)
        if size and flag.removeprefix("--").replace("-", "_") in integers:
            scale = {"K": 1024, "M": 1024**2}[size[2].upper()]
            value = str(int(size[1]) * scale)
        plain.append(f"{start}{equals}{value}" if word.startswith("--") else value)
    return plain


def _train(argv: Sequence[str]) -> int:
    from hdp.config import TrainConfig

    # Parse flags first: a typo is reported before torch takes seconds to import.
    return run_training(parse_config(TrainConfig, argv, prog="hdp train"))


def run_training(config: TrainConfig, callbacks: Sequence[Callback] = ()) -> int:
    """Run train(config, callbacks) for a command line; returns the exit code.

    A run that a signal stopped exits with 128 + the signal's number, as a shell reports it. Errors
    are printed once, as a message; the traceback goes to the run folder. Errors that concern all
    ranks are raised on all; those of a single rank reach rank 0 through the watchdog.
    """
    from hdp.checkpoint.directory import committed
    from hdp.training.callbacks import Callback
    from hdp.training.loop import train

    class Outcome(Callback):
        stop_signal = 0

        def on_train_end(self, run: Run, progress: Progress) -> None:
            self.stop_signal = progress.stop_signal

    outcome = Outcome()
    try:
        train(config, [*callbacks, outcome])
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            hint = f"run the same command to resume from the last checkpoint in {config.run_dir}"
            if not committed(Path(config.run_dir) / "checkpoints"):
                hint = (
                    f"no checkpoint in {config.run_dir}, so the same command will start over "
                    "(use --save-every N to save during training)"
                )
            print(f"hdp: interrupted; {hint}", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        rank = os.environ.get("RANK", "0")
        trace = Path(config.run_dir) / f"traceback-{rank}.txt"
        where = f"\n(traceback: {trace})"
        try:
            trace.parent.mkdir(parents=True, exist_ok=True)
            trace.write_text(traceback.format_exc())
        except OSError:  # the error being reported may itself be a full disk
            where = ""
            if not isinstance(error, ValueError):  # a ValueError's message is enough
                traceback.print_exc()
        if rank == "0":
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            print(f"hdp: error: {kind}{error}{where}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1
    return 128 + outcome.stop_signal if outcome.stop_signal else 0
