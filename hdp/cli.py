"""The `hdp` command: a dispatcher that loads only what the command needs.

    hdp plan lengths.txt --hdp-size 64 --max-tokens-per-rank 32768     no torch
    hdp doctor                                                         no torch needed
    torchrun --nproc-per-node 8 -m hdp train --data ./docs --model Qwen/Qwen3-0.6B

`train` turns the run's configuration (frozen dataclasses of `hdp/config.py`) into flags by tyro,
which is imported here and nowhere else; recipes in examples/ use `parse_config` for their own.
`plan`, `simulate` and `compare` are `python -m hdp.scheduler`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from hdp.config import TrainConfig

Config = TypeVar("Config")

USAGE = """\
usage: hdp COMMAND [options]

  train      train a model; on many ranks: torchrun --nproc-per-node 8 -m hdp train ...
  doctor     what this machine offers and which back ends would be used
  plan       plan one batch of sequence lengths
  simulate   run a plan in the simulator
  compare    policies side by side on the same batches

`hdp COMMAND --help` lists a command's options; `hdp --version` prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hdp` with `argv` (None: the process's own, without its name). Returns the exit code."""
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
        from hdp import doctor

        return doctor.main(arguments[1:])
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
    """One flag per field of the dataclass `config_class`; help comes from its docstrings.

    A misspelt flag, or a value that the class refuses with ValueError, ends the program with the
    message and exit code 2.
    """
    try:
        import tyro
    except ImportError:
        raise SystemExit("flags need tyro: pip install 'hdp[hf]'") from None
    return tyro.cli(
        config_class,
        args=argv,
        prog=prog,
        description=description,
        config=(tyro.conf.HelptextFromCommentsOff,),  # "# -- step --" is a heading, not help
    )


def _train(argv: Sequence[str]) -> int:
    from hdp.config import TrainConfig

    # Flags first: a misspelt one is found before seconds of importing torch.
    return run_training(parse_config(TrainConfig, argv, prog="hdp train"))


def run_training(config: TrainConfig) -> int:
    """train(config) for a command line; returns the exit code.

    An error is a message, said once; its traceback is kept in the run folder. All ranks raise what
    concerns all; what only one rank raises reaches rank 0 through the watchdog.
    """
    from hdp.train import train

    try:
        train(config)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(
                "hdp: interrupted; the same command goes on from the last checkpoint in "
                f"{config.run_dir}",
                file=sys.stderr,
                flush=True,
            )
        return 130
    except (ValueError, ArithmeticError, RuntimeError, OSError) as error:
        rank = os.environ.get("RANK", "0")
        trace = Path(config.run_dir) / f"traceback-{rank}.txt"
        where = f"\n(traceback: {trace})"
        try:
            trace.parent.mkdir(parents=True, exist_ok=True)
            trace.write_text(traceback.format_exc())
        except OSError:  # a full disk may be the very error
            where = ""
            if not isinstance(error, ValueError):  # that one says all
                traceback.print_exc()
        if rank == "0":
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            print(f"hdp: error: {kind}{error}{where}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1
    return 0
