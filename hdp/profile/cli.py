"""`hdp profile`: flags in, a cost model out. Imports torch only when measuring.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m hdp profile --plot cost.png
    hdp plan lengths.txt --cost cost.json ...
    hdp profile --redraw cost.json --plot cost.png     # draw an existing profile; no measuring

For what is measured, and how, see hdp/profile/measure.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from hdp.config import TrainConfig
from hdp.installation import pip_install
from hdp.scheduler import CostModel
from hdp.scheduler.cli import count

from .picture import check_drawable, draw_profile

_LEAST_TOKENS = 128
_DESCRIPTION = """\
Measure attention, links, memory and training steps on this machine, and fit a cost model for
`--cost`. Takes a minute or two. On multiple ranks:
torchrun --nproc-per-node 8 -m hdp profile ..."""


def main(argv: Sequence[str]) -> int:
    """Run `hdp profile` with `argv`. Returns the exit code; on bad input, prints why, returns 2."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.plot:  # fail before minutes of measuring
            check_drawable(arguments.plot)
            _check_folder("--plot", arguments.plot)
        if arguments.redraw:
            _redraw(arguments.redraw, arguments.plot)
        else:
            _check_folder("--out", arguments.out)
            _measure(arguments)
    except (ValueError, OSError) as error:  # bad model, data or lengths, raised on all ranks
        if os.environ.get("RANK", "0") == "0":
            print(f"hdp profile: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hdp profile",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        default="cost.json",
        metavar="FILE",
        help="where to write the cost model and its report (%(default)s)",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the report to a .png, .svg or .pdf")
    parser.add_argument(
        "--redraw", metavar="COST.json", help="draw this file's report to --plot; do not measure"
    )
    parser.add_argument(
        "--model", default="demo", help="as for `hdp train`, with random weights (%(default)s)"
    )
    parser.add_argument(
        "--data", default="stdlib", help="data for the demo model's tokenizer (%(default)s)"
    )
    parser.add_argument(
        "--tokenizer", default="auto", help="as for `hdp train`; bytes needs no package"
    )
    parser.add_argument(
        "--max-tokens-per-rank",
        type=count,
        default=4096,
        metavar="N",
        help="tokens in the largest microbatch, as in training (%(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=count,
        default=5,
        metavar="N",
        help="times to repeat each measurement; the median is used (%(default)s)",
    )
    parser.add_argument(
        "--link-bytes",
        type=count,
        metavar="N",
        help="bytes of the largest message (256M on CUDA, 16M on CPU)",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--activation-checkpointing", action="store_true", help="as in training")
    return parser


def _redraw(cost_file: str, picture: str | None) -> None:
    if not picture:
        raise ValueError(f"--redraw {cost_file} needs --plot: the picture to write")
    cost = CostModel.load(cost_file)
    report = json.loads(Path(cost_file).read_text(encoding="ascii")).get("report", {})
    draw_profile(cost, report, picture)
    print(f"wrote {picture}")


def _check_folder(flag: str, path: str) -> None:
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{flag} {path}: folder {folder} does not exist; create it first")


def _measure(arguments: argparse.Namespace) -> None:
    capacity = arguments.max_tokens_per_rank
    if capacity < _LEAST_TOKENS:
        raise ValueError(
            f"--max-tokens-per-rank {capacity} is too small, since sequences down to 1/66 of it "
            f"are measured; use {_LEAST_TOKENS} or more, ideally the value used in training"
        )
    if find_spec("torch") is None:
        raise ValueError(f"measuring requires torch: {pip_install('hf')}")
    config = TrainConfig(
        model=arguments.model,
        random_init=arguments.model != "demo",
        data=arguments.data,
        tokenizer=arguments.tokenizer,
        max_length=capacity,
        overlong="truncate",
        max_tokens_per_rank=capacity,
        device=arguments.device,
        activation_checkpointing=arguments.activation_checkpointing,
    )
    from .measure import profile

    profile(
        config,
        out=arguments.out,
        plot=arguments.plot,
        repeats=arguments.repeats,
        link_bytes=arguments.link_bytes,
    )
