"""build(): tokenizes documents into the files of a token cache.

  1. cut the source into shards of about equal size in bytes, a few per worker
  2. tokenize each shard into its own files, in parallel
  3. append them in order, so the result does not depend on the number of workers

For n documents, a cache directory holds:

    tokens.bin            all tokens, in the smallest unsigned dtype that holds the vocabulary
    loss_mask.bin         one byte per token, for chats only
    seqlens.npy           (n,) int64, tokens per document
    offsets.npy           (n + 1,) int64, where documents start in tokens.bin
    num_loss_tokens.npy   (n,) int64, labels per document: tokens after the first in the mask
    rows.npy              (n,) int64, the source row that each document came from
    names.json            how to name a row: the files and their first rows

The arrays are plain .npy: `numpy.load(..., mmap_mode="r")` is all a reader needs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from hdp import console

from .documents import DAMAGE, EMPTY, Document, Rejected
from .encode import encode_batch
from .source import Shard, Source
from .tokenizer import Tokenizer
from .workers import num_cpus, ordered_map

TOKENS, LOSS_MASK, NAMES = "tokens.bin", "loss_mask.bin", "names.json"
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 256
_MIN_SHARD_BYTES, _MAX_SHARD_BYTES = 1 << 20, 32 << 20
_MIN_PARALLEL_BYTES = 8 << 20  # below this, starting processes takes longer than the work
_MAX_EXAMPLES = 5


class Tally:
    """Counts of rows, and of those that did not become documents, by reason."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[tuple[int, str]]] = {}  # (row, detail)

    def reject(self, row: int, rejected: Rejected) -> None:
        self.counts[rejected.reason] = self.counts.get(rejected.reason, 0) + 1
        known = self.examples.setdefault(rejected.reason, [])
        if len(known) < _MAX_EXAMPLES:
            known.append((row, console.printable(rejected.detail)))

    def merge(self, other: Tally, first_row: int) -> None:
        """Add `other`, whose row 0 is row `first_row` here."""
        self.num_rows += other.num_rows
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            known = self.examples.setdefault(reason, [])
            for row, detail in other.examples[reason][: _MAX_EXAMPLES - len(known)]:
                known.append((first_row + row, detail))

    def first_damage(self) -> tuple[int, str, str] | None:
        """(row, reason, detail) of the first row that is an error under `strict`, or None."""
        first = {reason: self.examples[reason][0] for reason in DAMAGE if reason in self.examples}
        damage = [(row, reason, detail) for reason, (row, detail) in first.items()]
        return min(damage) if damage else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What each worker needs to know."""

    source: Source
    tokenizer: Tokenizer
    append_eos: bool
    directory: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenizedShard:
    """The index of one shard's documents; their tokens are in the shard's files."""

    num_positions: int  # rows and blank lines: the offset of the next shard's rows
    rows: np.ndarray  # (n,) int64, row numbers within the shard
    seqlens: np.ndarray  # (n,) int64
    num_loss_tokens: np.ndarray  # (n,) int64
    tally: Tally


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer dtype that holds ids below `vocab_size`."""
    return np.min_scalar_type(max(0, vocab_size - 1))


def build(
    directory: Path,
    source: Source,
    tokenizer: Tokenizer,
    *,
    append_eos: bool,
    strict: bool,
    num_workers: int | None,
    show_progress: bool | None,
) -> dict[str, Any]:
    """Fill `directory` and return the metadata for its seal.

    Raises ValueError if no document is left, if a row is damaged under `strict`, or if the source
    changes during the build.
    """
    before = source.fingerprint()
    is_chat = source.is_chat  # before any process starts, as it raises if the column is missing
    num_bytes = source.num_bytes()
    if num_workers is None:
        num_workers = num_cpus() if num_bytes >= _MIN_PARALLEL_BYTES else 1
    if "__main__" in (type(source).__module__, type(tokenizer).__module__):
        num_workers = 1  # child processes could not import it
    target = min(max(num_bytes // (8 * max(1, num_workers)), _MIN_SHARD_BYTES), _MAX_SHARD_BYTES)
    shards = source.shards(target)
    num_workers = min(num_workers, len(shards))
    job = _Job(source=source, tokenizer=tokenizer, append_eos=append_eos, directory=directory)
    with console.progress(
        f"tokenizing {source.label}", num_bytes, unit="bytes", enabled=show_progress
    ) as advance:
        results = ordered_map(
            _tokenize_shard,
            job,
            list(enumerate(shards)),
            num_workers=num_workers,
            on_done=lambda task: advance(task[1].num_bytes),
        )
        with closing(results):  # an error here stops the workers immediately
            merged = _merge(job, shards, results, is_chat=is_chat, strict=strict)
    if source.fingerprint() != before:
        raise ValueError(
            f"{source.label} changed while it was being read: try again once nothing writes to it"
        )
    return {
        **merged,
        "label": console.printable(source.label),
        "is_chat": is_chat,
        "notes": [console.printable(note) for note in source.describe()],
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size).name,
    }


def check_index(directory: Path, meta: dict[str, Any]) -> None:
    """Check that a cache's index describes its tokens. Raises ValueError if not."""
    seqlens, offsets = (
        np.load(directory / f"{n}.npy", mmap_mode="r") for n in ("seqlens", "offsets")
    )
    num_tokens = (directory / TOKENS).stat().st_size // np.dtype(meta["dtype"]).itemsize
    is_sound = (
        len(seqlens) == meta["num_documents"]
        and len(offsets) == len(seqlens) + 1
        and offsets[0] == 0
        and np.array_equal(np.diff(offsets), seqlens)
        and int(offsets[-1]) == num_tokens == meta["num_tokens"]
        and (not meta["is_chat"] or (directory / LOSS_MASK).stat().st_size == num_tokens)
    )
    if not is_sound:
        raise ValueError(f"{directory}: the index does not fit the tokens")


def row_name(names: dict[str, Any], row: int) -> str:
    """The readable name of a source row: a path, path:line, or a row number."""
    if names["row_kind"] == "file":
        return names["files"][row]
    file = int(np.searchsorted(names["first_rows"], row, side="right")) - 1
    number = row - names["first_rows"][file]
    name = names["files"][file]
    return f"{name}:{number + 1}" if names["row_kind"] == "line" else f"{name} row {number}"


def _merge(
    job: _Job,
    shards: Sequence[Shard],
    results: Iterator[_TokenizedShard],
    *,
    is_chat: bool,
    strict: bool,
) -> dict[str, Any]:
    """Step 3: append the shards' files and write the index."""
    source, directory = job.source, job.directory
    first_rows: list[int] = []
    files = [console.printable(name) for name in source.files]
    names = {"row_kind": source.row_kind, "files": files, "first_rows": first_rows}
    columns: dict[str, list[np.ndarray]] = {"rows": [], "seqlens": [], "num_loss_tokens": []}
    tally = Tally()
    num_positions = 0
    with ExitStack() as stack:
        outputs = _open_outputs(stack, directory, is_chat)
        for index, (shard, result) in enumerate(zip(shards, results, strict=True)):
            while len(first_rows) <= shard.file:  # `while`, because files may be empty
                first_rows.append(num_positions)
            tally.merge(result.tally, num_positions)
            damage = tally.first_damage() if strict else None
            if damage:
                row, reason, detail = damage
                raise ValueError(damage_message(row_name(names, row), reason, detail))
            for name, output in outputs.items():
                _append(directory / f"shard-{index}-{name}", output)
            columns["rows"].append(result.rows + num_positions)
            columns["seqlens"].append(result.seqlens)
            columns["num_loss_tokens"].append(result.num_loss_tokens)
            num_positions += result.num_positions
    arrays = {name: np.concatenate(parts or [_int64([])]) for name, parts in columns.items()}
    if not len(arrays["rows"]):
        raise ValueError(
            f"no documents in {console.printable(source.label)}: {_summary(tally, names)}"
        )
    assert tally.num_rows == len(arrays["rows"]) + sum(tally.counts.values()), vars(tally)
    arrays["offsets"] = np.concatenate([_int64([0]), np.cumsum(arrays["seqlens"])])
    for name, array in arrays.items():
        np.save(directory / f"{name}.npy", array)
    (directory / NAMES).write_text(json.dumps(names), encoding="utf-8")
    return {
        "num_rows": tally.num_rows,
        "num_documents": len(arrays["rows"]),
        "num_tokens": int(arrays["offsets"][-1]),
        "rejected": tally.counts,
        "examples": {
            reason: [[row_name(names, row), detail] for row, detail in examples]
            for reason, examples in tally.examples.items()
        },
    }


def damage_message(name: str, reason: str, detail: str) -> str:
    """The error message, under `strict`, for a row that is damaged."""
    detail = f" ({detail})" if detail else ""
    return f"{name} is {reason}{detail}; fix it, or turn off strict to skip it"


def _summary(tally: Tally, names: dict[str, Any]) -> str:
    if not tally.counts:
        return f"{tally.num_rows} rows"
    parts = []
    for reason, count in tally.counts.items():
        row, detail = tally.examples[reason][0]
        detail = f" ({detail})" if detail else ""
        parts.append(f"{count} {reason}, first {row_name(names, row)}{detail}")
    return f"of {tally.num_rows} rows, " + "; ".join(parts)


def _tokenize_shard(job: _Job, task: tuple[int, Shard]) -> _TokenizedShard:
    """Step 2, in a worker: write one shard's tokens to its files."""
    index, shard = task
    rows: list[int] = []
    seqlens: list[int] = []
    num_loss_tokens: list[int] = []
    tally = Tally()
    dtype = token_dtype(job.tokenizer.vocab_size)
    num_positions = 0
    with ExitStack() as stack:
        outputs = _open_outputs(stack, job.directory, job.source.is_chat, f"shard-{index}-")
        for batch in _batches(job.source.read(shard), tally):
            num_positions = batch[-1][0] + 1
            documents = [(row, item) for row, item in batch if item]
            for row, encoded in encode_batch(documents, job.tokenizer, append_eos=job.append_eos):
                if isinstance(encoded, Rejected):
                    tally.reject(row, encoded)
                    continue
                ids, mask = encoded
                if not len(ids):  # a tokenizer may drop text that it has no tokens for
                    tally.reject(row, Rejected(reason=EMPTY, detail="no tokens"))
                    continue
                assert ids.max() < job.tokenizer.vocab_size, (row, ids.max(), job.tokenizer.name)
                outputs[TOKENS].write(np.ascontiguousarray(ids, dtype=dtype).data)
                if mask is not None:
                    outputs[LOSS_MASK].write(np.ascontiguousarray(mask, dtype=bool).data)
                rows.append(row)
                seqlens.append(len(ids))
                num_loss_tokens.append(
                    len(ids) - 1 if mask is None else int(np.count_nonzero(mask[1:]))
                )
    return _TokenizedShard(
        num_positions=num_positions,
        rows=_int64(rows),
        seqlens=_int64(seqlens),
        num_loss_tokens=_int64(num_loss_tokens),
        tally=tally,
    )


def _batches(
    items: Iterator[Document | Rejected | None], tally: Tally
) -> Iterator[list[tuple[int, Document | None]]]:
    """Lists of (row, document) large enough for a tokenizer call; none is empty.

    Together they hold every row, but a list may hold no document.
    """
    batch: list[tuple[int, Document | None]] = []
    num_characters = 0
    for row, item in enumerate(items):
        tally.num_rows += item is not None
        if isinstance(item, Rejected):
            tally.reject(row, item)
            item = None
        batch.append((row, item))
        if item is not None:
            num_characters += _num_characters(item)
        if num_characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _num_characters(document: Document) -> int:
    texts = (document.text, document.prompt, document.completion)
    contents = [message.get("content") for message in document.messages or ()]
    return sum(len(text) for text in (*texts, *contents) if isinstance(text, str))


def _open_outputs(
    stack: ExitStack, directory: Path, is_chat: bool, prefix: str = ""
) -> dict[str, IO[bytes]]:
    names = (TOKENS, LOSS_MASK) if is_chat else (TOKENS,)
    return {name: stack.enter_context(open(directory / (prefix + name), "wb")) for name in names}


def _append(path: Path, output: IO[bytes]) -> None:
    with open(path, "rb") as part:
        shutil.copyfileobj(part, output, 1 << 24)
    path.unlink()


def _int64(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)
