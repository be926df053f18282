"""Read the lengths of a batch from a file or a named workload, optionally limited to a maximum.

    from hdp.scheduler.workloads.read import read_lengths
    seqlens = read_lengths("lengths.txt")
    seqlens = read_lengths("workload:github-like", num_tokens=32 * 2**20, max_length=2**20)

No document is truncated silently: `overlong` says what to do with one longer than `max_length`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hdp.scheduler.plain import parse_json, read_bytes, shown

from .generate import WORKLOADS, draw
from .limit import counted, limit_lengths

_DATA = (".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".gz", ".bz2", ".xz", ".zst")


def read_lengths(
    source: str | Path,
    *,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    overlong: str = "truncate",
) -> np.ndarray:
    """(n,) int64 lengths from `workload:NAME` or from a file; of a file, the first `num_sequences`
    (default: all).

    Files: text with one length per line (`#` starts a comment), `.npy` with a one-dimensional
    integer array, `.json` with a list of integers or an object that has one under "seqlens" or
    "lengths" (a StepPlan in JSON works), or a token cache folder (its `seqlens.npy`). `seed`
    does not shuffle a file: its order is kept. Raises ValueError for a source that is none of
    these, with the line or the value at fault.
    """
    text = str(source)
    if text.startswith("workload:"):
        if num_sequences is None and num_tokens is None:
            num_sequences = 1024
        return draw(
            text.removeprefix("workload:"),
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            seed=seed,
            max_length=max_length,
            overlong=overlong,
        )
    seqlens = limit_lengths(_read_file(Path(text)), max_length, overlong)
    if num_sequences is not None:
        num_sequences = counted("num_sequences", num_sequences)
        if num_sequences > len(seqlens):
            raise ValueError(
                f"{text} has {len(seqlens)} lengths, fewer than num_sequences={num_sequences}"
            )
        seqlens = seqlens[:num_sequences]
    if num_tokens is not None:
        num_tokens = counted("num_tokens", num_tokens)
        seqlens = seqlens[: int(np.searchsorted(np.cumsum(seqlens), num_tokens)) + 1]
    return seqlens


def _read_file(path: Path) -> np.ndarray:
    if path.is_dir():
        for name in ("seqlens.npy", "lengths.npy"):
            if (path / name).is_file():
                return _read_file(path / name)
        raise ValueError(f"{path} is a folder without a length index (seqlens.npy)")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe or a device: copy the lengths to a file first")
    if not path.is_file():
        names = ", ".join(WORKLOADS)
        raise ValueError(f"no file {path}; named workloads are workload:NAME with NAME in {names}")
    if path.name.endswith(_DATA):
        raise ValueError(
            f"{path} holds rows of data, whose lengths depend on a tokenizer: name one, as in "
            f"`hdp plan {path} --tokenizer bytes ...`"
        )
    try:
        if path.suffix == ".npy":
            values = _from_npy(path)
        elif path.suffix == ".json":
            values = _from_json(path)
        else:
            values = _from_text(path)
    except (UnicodeDecodeError, OSError, EOFError, OverflowError) as error:
        raise ValueError(f"cannot read lengths from {path}: {error}") from error
    return _checked(values, str(path))


def _from_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, MemoryError) as error:  # a header may promise terabytes
        raise ValueError(f"cannot read lengths from {path}: not an array file ({error})") from error


def _from_json(path: Path) -> np.ndarray:
    try:
        data = parse_json(read_bytes(path), "lengths")
    except ValueError as error:
        raise ValueError(f"cannot read lengths from {path}: {error}") from error
    if isinstance(data, dict):
        data = data.get("seqlens", data.get("lengths"))
    if not isinstance(data, list):
        raise ValueError(f'{path} holds no list of lengths (a list, or "seqlens" in an object)')
    for i, value in enumerate(data):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{path}: length {i} is {shown(value)}, not an integer")
    return np.array(data, dtype=np.int64)


def _from_text(path: Path) -> np.ndarray:
    values = []
    for number, line in enumerate(read_bytes(path).decode("utf-8-sig").splitlines(), 1):
        line = line.partition("#")[0].strip()
        if line:
            try:
                values.append(int(line))
            except ValueError:
                raise ValueError(f"{path}:{number}: {shown(line)} is not an integer") from None
    return np.array(values, dtype=np.int64)


def _checked(values: np.ndarray, where: str) -> np.ndarray:
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: expected a one-dimensional integer array, "
            f"not {values.dtype} of shape {values.shape}"
        )
    if not len(values):
        raise ValueError(f"{where} holds no lengths")
    if values.min() < 1:
        at = int(np.argmin(values))
        raise ValueError(f"{where}: length {at} is {values[at]}; lengths must be at least 1 token")
    if int(values.max()) > np.iinfo(np.int64).max:
        raise ValueError(
            f"{where}: length {int(np.argmax(values))} is {values.max()}, too large for int64"
        )
    return values.astype(np.int64)
