"""The `hdp` command: a dispatcher that imports only what each command needs.

    hdp data chats.jsonl --tokenizer Qwen/Qwen3-0.6B                   rows as they are trained on
    hdp plan lengths.txt --hdp-size 64 --max-tokens-per-rank 32768     no torch
    hdp doctor                                                         works without torch
    hdp report runs/default                                            no torch
    torchrun --nproc-per-node 8 -m hdp profile --out cost.json
    torchrun --nproc-per-node 8 -m hdp train --data ./docs --model Qwen/Qwen3-0.6B

`train` turns the fields of a frozen dataclass (`hdp/config.py`) into flags (`hdp/flags.py`); the
recipes in examples/ use `parse_config` for their own configurations. `plan`, `simulate` and
`compare` are also `python -m hdp.scheduler`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hdp.flags import parse_config as parse_config

if TYPE_CHECKING:
    from hdp.config import TrainConfig
    from hdp.training.callbacks import Callback
    from hdp.training.progress import Progress
    from hdp.training.setup import Run

USAGE = """\
usage: hdp COMMAND [options]

  train      train a model; on multiple ranks: torchrun --nproc-per-node 8 -m hdp train ...
  report     write one HTML file that shows a run: curves, idle time, plans, options
  doctor     report this machine's hardware and libraries, and the back ends in use
  profile    measure this machine and write a cost model for --cost
  data       show rows as they will be trained on, what is skipped, and the lengths
  plan       plan one batch of sequence lengths, or of a data file with --tokenizer
  simulate   run a plan in the simulator
  compare    compare policies on the same batches

`hdp COMMAND --help` lists a command's options; `hdp --version` prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hdp` with `argv` (None: sys.argv[1:]). Returns the exit code, 130 after Ctrl-C."""
    try:
        return _dispatch(argv)
    except KeyboardInterrupt:  # also while torch is being imported, which takes seconds
        if os.environ.get("RANK", "0") == "0":
            print("hdp: interrupted", file=sys.stderr, flush=True)
        return 130


def _dispatch(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        from hdp import __version__

        print(f"hdp {__version__}")
        return 0
    if command == "report":
        from hdp.report import cli as report

        return report.main(arguments[1:])
    if command == "doctor":
        from hdp.doctor import report as doctor

        return doctor.main(arguments[1:])
    if command == "profile":
        from hdp.profile import cli as profile

        return profile.main(arguments[1:])
    if command in ("plan", "simulate", "compare"):
        return _plan(arguments)
    if command == "data":
        from hdp.data import cli as data

        return data.main(arguments[1:])
    if command == "train":
        return _train(arguments[1:])
    print(f"hdp: unknown command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
    return 2


def _plan(arguments: list[str]) -> int:
    from hdp.scheduler import cli

    if any(word.partition("=")[0] == "--tokenizer" for word in arguments):
        from hdp.data.cli import with_lengths

        try:
            arguments = with_lengths(arguments)
        except (ValueError, OSError) as error:
            print(f"hdp: error: {error}", file=sys.stderr, flush=True)
            return 2
    return cli.main(arguments)


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
    try:
        stop_signal = _stop_signal(config, callbacks)
    except KeyboardInterrupt:
        from hdp.checkpoint.directory import committed

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
            if config.dry_run:
                raise OSError("a dry run writes nothing")
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
    return 128 + stop_signal if stop_signal else 0


def _stop_signal(config: TrainConfig, callbacks: Sequence[Callback]) -> int:
    """Train; returns the number of the signal that stopped the run, or 0."""
    from hdp.data.naming import parse_names

    parse_names(config.data)  # wrong weights are told before ranks meet and a model is built
    from hdp.training.callbacks import Callback
    from hdp.training.loop import train

    class Outcome(Callback):
        stop_signal = 0

        def on_train_end(self, run: Run, progress: Progress) -> None:
            self.stop_signal = progress.stop_signal

    outcome = Outcome()
    train(config, [*callbacks, outcome])
    return outcome.stop_signal
