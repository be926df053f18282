"""`hdp data FILE`: rows as they will be trained on, what is skipped and why, and their lengths.

    hdp data chats.jsonl --tokenizer Qwen/Qwen3-0.6B --rows 2
    hdp data data/ --format prompt --split test --tokenizer bytes --ids
    hdp data ~/.cache/hdp/tokens-0123 --verify              every byte of a cache

The options that say how data are read are those of `hdp train`, and so is the cache: what is shown
is what training will see. What has a loss is in color on a terminal, and in [[ ]] elsewhere.
`with_lengths` does the same for `hdp plan chats.jsonl --tokenizer M`: it hands the planner a file
of lengths.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hdp import console

from .dataset import TokenDataset, open_cache
from .prepare import json_text
from .prepare.cache import open_dataset
from .prepare.rows import FORMATS
from .prepare.sealed import SEAL, read_seal
from .views import OVERLONG

_LOSS, _PLAIN = "\x1b[32m", "\x1b[0m"
_BAR = 30  # columns of the histogram's longest bar


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hdp data` with `argv` (None: sys.argv[1:]). Returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        dataset = _open(arguments)
        if arguments.verify:
            _verify(dataset)
        if arguments.save_lengths:
            dataset.save_lengths(arguments.save_lengths)
        _show_to_reader(dataset, arguments)
    except (ValueError, OSError) as error:
        console.note(f"error: {error}")
        return 2
    return 0


def with_lengths(argv: Sequence[str]) -> list[str]:
    """The arguments of `hdp plan DATA --tokenizer M ...` with a file of lengths instead of DATA.

    Without --tokenizer, they are returned as they are. Raises ValueError if there is no DATA, and
    what `open_dataset` raises.
    """
    if not any(word == "--tokenizer" or word.startswith("--tokenizer=") for word in argv):
        return list(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--lengths")
    _add_source(parser)
    arguments, (command, *rest) = parser.parse_known_args(list(argv))
    if arguments.lengths is None:
        if not rest or rest[0].startswith("-"):
            raise ValueError(
                f"--tokenizer {arguments.tokenizer}: name the data first, as in "
                f"`hdp {command} chats.jsonl --tokenizer {arguments.tokenizer} ...`"
            )
        arguments.lengths, *rest = rest
    dataset = open_dataset(arguments.lengths, **_source_options(arguments))
    for line in str(dataset.report).split("\n"):
        console.note(line)
    path = Path(f"{dataset.report.cache_path}-lengths.npy")
    dataset.save_lengths(path)
    return [command, "--lengths", str(path), *rest]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hdp data",
        description="Show rows as they will be trained on, what is skipped, and the lengths.",
    )
    parser.add_argument("data", help="a file, folder, quoted glob, hub dataset, or token cache")
    _add_source(parser)
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--rows", type=int, default=3, metavar="N", help="sequences (default: 3)")
    shown.add_argument("--first", type=int, default=0, metavar="N", help="begin with sequence N")
    shown.add_argument("--tokens", type=_size, default=1024, metavar="N", help="of each sequence")
    shown.add_argument("--ids", action="store_true", help="one token a line, with its id")
    shown.add_argument("--verify", action="store_true", help="check every byte of the cache")
    shown.add_argument("--save-lengths", metavar="FILE", help="write the lengths as .npy")
    limits = parser.add_argument_group("lengths")
    limits.add_argument("--max-length", type=_size, metavar="N", help="longest sequence, tokens")
    limits.add_argument("--overlong", choices=OVERLONG, default="error")
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how data are read, as in `hdp train`")
    group.add_argument("--tokenizer", default="bpe:4096", metavar="M", help="default: bpe:4096")
    group.add_argument("--chat-template", metavar="FILE", help="a Jinja file, or a name")
    group.add_argument("--chat-template-kwargs", type=_variables, metavar="JSON", default={})
    group.add_argument("--format", choices=FORMATS, default="auto", help="what a row is")
    group.add_argument("--text-column", default="text", metavar="NAME")
    group.add_argument("--pattern", metavar="GLOBS", help="which files of a folder")
    group.add_argument("--subset", metavar="NAME", help="a configuration of a hub dataset")
    group.add_argument("--split", default="train", metavar="NAME")
    group.add_argument("--strict", action="store_true", help="damaged rows are an error")
    group.add_argument("--cache-dir", metavar="FOLDER", help="default: ~/.cache/hdp")


def _source_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names: tuple[str, ...] = (
        "tokenizer",
        "format",
        "text_column",
        "pattern",
        "subset",
        "split",
        "strict",
    )
    names += ("chat_template", "chat_template_kwargs", "cache_dir")
    return {name: getattr(arguments, name) for name in names}


def _open(arguments: argparse.Namespace) -> TokenDataset:
    limits = {"max_length": arguments.max_length, "overlong": arguments.overlong}
    if (Path(arguments.data) / SEAL).is_file():
        return open_cache(arguments.data, strict=arguments.strict, **limits)
    return open_dataset(arguments.data, **_source_options(arguments), **limits)


def _verify(dataset: TokenDataset) -> None:
    path = Path(dataset.report.cache_path)
    if read_seal(path, every_byte=True) is None:
        raise ValueError(f"{path} is damaged: delete it, and it will be built again")
    print(f"{path}: every byte is as it was written\n")


def _variables(text: str) -> dict[str, Any]:
    try:
        variables = json_text.loads(text)
    except ValueError:
        variables = None
    if not isinstance(variables, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return variables


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KM]?)", text, re.IGNORECASE)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer (or 32K, 2M)")
    return int(match[1]) * {"": 1, "K": 1024, "M": 1024**2}[match[2].upper()]


# -- what is shown --


def _show_to_reader(dataset: TokenDataset, arguments: argparse.Namespace) -> None:
    """`_show`, which ends quietly once nobody reads on, as in `hdp data X | head`."""
    try:
        _show(dataset, arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes what is left at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(dataset: TokenDataset, arguments: argparse.Namespace) -> None:
    report = dataset.report
    print(report)
    for reason, examples in report.examples.items():
        for name, detail in examples[1:]:  # the report has the first
            print(f"  also {name}: {reason}" + (f" ({detail})" if detail else ""))
    in_color = console.is_terminal(sys.stdout)
    legend = "in color" if in_color else "in [[ ]]"
    for index in range(
        max(0, arguments.first), min(len(dataset), arguments.first + arguments.rows)
    ):
        count, losses = int(dataset.seqlens[index]), int(dataset.num_loss_tokens[index])
        print(f"\n{dataset.name(index)}: {count:,} tokens, {losses:,} with a loss ({legend})")
        lines = _token_lines if arguments.ids else _text_lines
        for line in lines(dataset, index, arguments.tokens, in_color):
            print(f"  | {line}")
        if count > arguments.tokens:
            print(f"  ... {count - arguments.tokens:,} more tokens (--tokens)")
    print()
    _print_lengths(dataset.seqlens)


def _mask(dataset: TokenDataset, index: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ids of a sequence, and which of them are learned: the first has no context."""
    sample = dataset[index]
    ids = np.asarray(sample.input_ids[:num_tokens])
    mask = np.ones(len(ids), dtype=bool)
    if sample.loss_mask is not None:
        mask = np.array(sample.loss_mask[:num_tokens], dtype=bool)
    mask[:1] = False
    return ids, mask


def _text_lines(
    dataset: TokenDataset, index: int, num_tokens: int, in_color: bool
) -> Iterator[str]:
    ids, mask = _mask(dataset, index, num_tokens)
    start, end = (_LOSS, _PLAIN) if in_color else ("[[", "]]")
    text = ""
    bounds = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(ids)]
    for first, stop in pairwise(bounds):
        part = _decode(dataset, ids[first:stop])
        lines = [console.printable(line) for line in part.split("\n")]
        # A color ends with its line, so that it does not run into what follows.
        text += (
            "\n".join(f"{start}{line}{end}" for line in lines) if mask[first] else "\n".join(lines)
        )
    return iter(text.split("\n"))


def _token_lines(
    dataset: TokenDataset, index: int, num_tokens: int, in_color: bool
) -> Iterator[str]:
    ids, mask = _mask(dataset, index, num_tokens)
    start, end = (_LOSS, _PLAIN) if in_color else ("[[", "]]")
    for position, (token, has_loss) in enumerate(zip(ids, mask, strict=True)):
        text = repr(_decode(dataset, ids[position : position + 1]))
        yield f"{position:>6} {token:>7} " + (f"{start}{text}{end}" if has_loss else text)


def _decode(dataset: TokenDataset, ids: np.ndarray) -> str:
    if dataset.tokenizer is None:  # a cache does not know it
        return " ".join(map(str, ids)) + " "
    return dataset.tokenizer.decode(ids)


def _print_lengths(seqlens: np.ndarray) -> None:
    """A histogram by powers of two, with the share of all tokens that each holds."""
    exponents = np.ceil(np.log2(np.maximum(seqlens, 1))).astype(int)
    counts = np.bincount(exponents)
    tokens = np.bincount(exponents, weights=seqlens)
    rows = [
        [
            f"{2 ** (e - 1) + 1 if e else 1:,} - {2**e:,}",
            int(counts[e]),
            f"{tokens[e] / tokens.sum():.1%}",
            "#" * max(int(counts[e] > 0), round(_BAR * counts[e] / counts.max())),
        ]
        for e in range(int(exponents.min()), len(counts))
    ]
    middle, high = np.percentile(seqlens, [50, 90])
    title = f"lengths: median {middle:,.0f}, 90% up to {high:,.0f}, longest {seqlens.max():,}"
    console.print_table(["tokens", "sequences", "of all tokens", ""], rows, title=title)
