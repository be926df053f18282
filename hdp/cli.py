"""The `hdp` command: a dispatcher that loads only what the command needs.

    hdp plan lengths.txt --hdp-size 64 --max-tokens-per-rank 32768     no torch
    hdp doctor                                                         no torch needed
    torchrun --nproc-per-node 8 -m hdp profile --out cost.json
    torchrun --nproc-per-node 8 -m hdp train --data ./docs --model Qwen/Qwen3-0.6B

`train` turns the run's configuration (frozen dataclasses of `hdp/config.py`) into flags by tyro,
which is imported here and nowhere else; recipes in examples/ use `parse_config` for their own.
`plan`, `simulate` and `compare` are `python -m hdp.scheduler`.
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

Config = TypeVar("Config")

USAGE = """\
usage: hdp COMMAND [options]

  train      train a model; on many ranks: torchrun --nproc-per-node 8 -m hdp train ...
  doctor     what this machine offers and which back ends would be used
  profile    measure this machine: the cost model that --cost takes
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
    """One flag per field of the dataclass `config_class`; help comes from its docstrings.

    Integers may be written 16K or 2M (times 1024), as `hdp plan` takes them.
    A misspelt flag, or a value that the class refuses with ValueError, ends the program with the
    message and exit code 2.
    """
    try:
        import tyro
    except ImportError:
        raise SystemExit("flags need tyro: pip install 'hdp[hf]'") from None
    return tyro.cli(
        config_class,
        args=_with_plain_integers(sys.argv[1:] if argv is None else argv, config_class),
        prog=prog,
        description=description,
        config=(tyro.conf.HelptextFromCommentsOff,),  # "# -- step --" is a heading, not help
    )


def _with_plain_integers(argv: Sequence[str], config_class: Any) -> list[str]:
    """--max-length 16K becomes --max-length 16384; values of other flags stay as they are."""
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

    # Flags first: a misspelt one is found before seconds of importing torch.
    return run_training(parse_config(TrainConfig, argv, prog="hdp train"))


def run_training(config: TrainConfig) -> int:
    """train(config) for a command line; returns the exit code.

    An error is a message, said once; its traceback is kept in the run folder. All ranks raise what
    concerns all; what only one rank raises reaches rank 0 through the watchdog.
    """
    from hdp.checkpoint.directory import committed
    from hdp.training.loop import train

    try:
        train(config)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            what = f"the same command goes on from the last checkpoint in {config.run_dir}"
            if not committed(Path(config.run_dir) / "checkpoints"):
                what = (
                    f"no checkpoint in {config.run_dir}, so the same command starts over "
                    "(--save-every N saves on the way)"
                )
            print(f"hdp: interrupted; {what}", file=sys.stderr, flush=True)
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
