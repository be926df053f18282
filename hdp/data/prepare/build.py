"""Documents to token files: what is done once and then cached.

  1. cut the source into shards, a few per worker and about equal in bytes
  2. tokenise each shard into files of its own, in parallel
  3. append them in order, so that the result does not depend on the number of workers

A directory holds, for n documents:

    tokens.bin            all tokens, in the smallest unsigned dtype that holds the vocabulary
    loss_mask.bin         one byte per token, for chats only
    seqlens.npy           (n,) int64, tokens per document
    offsets.npy           (n + 1,) int64, where documents start in tokens.bin
    num_loss_tokens.npy   (n,) int64, labels per document: positions from 1 on that the mask keeps
    rows.npy              (n,) int64, which row of the source a document came from
    names.json            how to name a row: the files and their first rows

The arrays are plain .npy: `numpy.load(..., mmap_mode="r")` is all that a reader needs.
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
from .sources import Shard, Source
from .tokenizer import Tokenizer
from .workers import num_cpus, ordered_map

TOKENS, LOSS_MASK, NAMES = "tokens.bin", "loss_mask.bin", "names.json"
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 256
_MIN_SHARD_BYTES, _MAX_SHARD_BYTES = 1 << 20, 32 << 20
_MIN_PARALLEL_BYTES = 8 << 20  # below, starting processes takes longer than the work
_MAX_EXAMPLES = 5


class Tally:
    """What became of rows: how many there were, and which were no documents, by reason."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[tuple[int, str]]] = {}  # (row, detail)

    def reject(self, row: int, rejected: Rejected) -> None:
        self.counts[rejected.reason] = self.counts.get(rejected.reason, 0) + 1
        known = self.examples.setdefault(rejected.reason, [])
        if len(known) < _MAX_EXAMPLES:
            known.append((row, rejected.detail))

    def merge(self, other: Tally, first_row: int) -> None:
        """Adds `other`, whose rows count from `first_row`."""
        self.num_rows += other.num_rows
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            known = self.examples.setdefault(reason, [])
            for row, detail in other.examples[reason][: _MAX_EXAMPLES - len(known)]:
                known.append((first_row + row, detail))

    def first_damage(self) -> tuple[int, str, str] | None:
        """(row, reason, detail) of the first row that strict users want to hear about."""
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
class _Tokenised:
    """One shard's documents; their tokens are in its files."""

    num_positions: int  # rows and blank lines: how far the next shard's rows are
    rows: np.ndarray  # (n,) int64, in the shard
    seqlens: np.ndarray  # (n,) int64
    num_loss_tokens: np.ndarray  # (n,) int64
    tally: Tally


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer that holds ids below `vocab_size`."""
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
    """Fills `directory` and returns what its seal shall say.

    Raises ValueError if no document is left, if a row is damaged under `strict`, or if the source
    changes meanwhile.
    """
    before = source.fingerprint()
    is_chat = source.is_chat  # before any process starts: it raises if there is no such column
    num_bytes = source.num_bytes()
    if num_workers is None:
        num_workers = num_cpus() if num_bytes >= _MIN_PARALLEL_BYTES else 1
    if "__main__" in (type(source).__module__, type(tokenizer).__module__):
        num_workers = 1  # children could not import it
    target = min(max(num_bytes // (8 * max(1, num_workers)), _MIN_SHARD_BYTES), _MAX_SHARD_BYTES)
    shards = source.shards(target)
    num_workers = min(num_workers, len(shards))
    job = _Job(source=source, tokenizer=tokenizer, append_eos=append_eos, directory=directory)
    with console.progress(
        f"tokenising {source.label}", num_bytes, unit="bytes", enabled=show_progress
    ) as advance:
        results = ordered_map(
            _tokenise_shard,
            job,
            list(enumerate(shards)),
            num_workers=num_workers,
            on_done=lambda task: advance(task[1].num_bytes),
        )
        with closing(results):  # an error here ends the workers at once
            merged = _merge(job, shards, results, is_chat=is_chat, strict=strict)
    if source.fingerprint() != before:
        raise ValueError(f"{source.label} changed while it was read: try again when it is still")
    return {
        **merged,
        "label": _printable(source.label),
        "is_chat": is_chat,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size).name,
    }


def row_name(names: dict[str, Any], row: int) -> str:
    """A row of the source as people know it: a path, path:line, or a row number."""
    if names["row_kind"] == "file":
        return names["files"][row]
    file = int(np.searchsorted(names["first_rows"], row, side="right")) - 1
    number = row - names["first_rows"][file]
    name = names["files"][file]
    return f"{name}:{number + 1}" if names["row_kind"] == "line" else f"{name} row {number}"


def _merge(
    job: _Job,
    shards: Sequence[Shard],
    results: Iterator[_Tokenised],
    *,
    is_chat: bool,
    strict: bool,
) -> dict[str, Any]:
    """Step 3: appends the shards' files and writes the index."""
    source, directory = job.source, job.directory
    first_rows: list[int] = []
    files = [_printable(name) for name in source.files]
    names = {"row_kind": source.row_kind, "files": files, "first_rows": first_rows}
    columns: dict[str, list[np.ndarray]] = {"rows": [], "seqlens": [], "num_loss_tokens": []}
    tally = Tally()
    num_positions = 0
    with ExitStack() as stack:
        outputs = _open_outputs(stack, directory, is_chat)
        for index, (shard, result) in enumerate(zip(shards, results, strict=True)):
            while len(first_rows) <= shard.file:  # a file may be empty
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
        raise ValueError(f"no document in {source.label}: {_summary(tally, names)}")
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
    """What strict users read about a row that is no document."""
    return f"{name} is {reason}{f' ({detail})' if detail else ''}; without strict it is skipped"


def _summary(tally: Tally, names: dict[str, Any]) -> str:
    if not tally.counts:
        return f"{tally.num_rows} rows"
    parts = []
    for reason, count in tally.counts.items():
        row, detail = tally.examples[reason][0]
        parts.append(f"{count} {reason}, first {row_name(names, row)}{detail and f' ({detail})'}")
    return f"of {tally.num_rows} rows, " + "; ".join(parts)


def _tokenise_shard(job: _Job, task: tuple[int, Shard]) -> _Tokenised:
    """Step 2, in a worker: one shard's tokens to its files."""
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
            num_positions = batch[-1][0] + 1 if batch else num_positions
            for row, encoded in _encode(job, [item for item in batch if item[1]]):
                if isinstance(encoded, Rejected):
                    tally.reject(row, encoded)
                    continue
                ids, mask = encoded
                if not len(ids):  # a tokenizer may drop what it has no token for
                    tally.reject(row, Rejected(reason=EMPTY, detail="no token"))
                    continue
                assert ids.max() < job.tokenizer.vocab_size, (row, ids.max(), job.tokenizer.name)
                outputs[TOKENS].write(ids.astype(dtype).tobytes())
                if mask is not None:
                    outputs[LOSS_MASK].write(mask.tobytes())
                rows.append(row)
                seqlens.append(len(ids))
                num_loss_tokens.append(
                    len(ids) - 1 if mask is None else int(np.count_nonzero(mask[1:]))
                )
    return _Tokenised(
        num_positions=num_positions,
        rows=_int64(rows),
        seqlens=_int64(seqlens),
        num_loss_tokens=_int64(num_loss_tokens),
        tally=tally,
    )


def _batches(
    items: Iterator[Document | Rejected | None], tally: Tally
) -> Iterator[list[tuple[int, Document | None]]]:
    """(row, document) in lists that are worth a call of the tokenizer; the last row is in one."""
    batch: list[tuple[int, Document | None]] = []
    num_characters = 0
    for row, item in enumerate(items):
        tally.num_rows += item is not None
        if isinstance(item, Rejected):
            tally.reject(row, item)
            item = None
        batch.append((row, item))
        if item is not None:
            num_characters += len(item.text) if item.text is not None else 4096
        if num_characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_characters = [], 0
    yield batch


def _encode(job: _Job, batch: list[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """(row, (ids, mask or None) or Rejected) of each document, in order."""
    documents = [document for _, document in batch]
    if job.source.is_chat:
        encoded: list[Any] = list(job.tokenizer.encode_chats(documents))
    else:
        texts = job.tokenizer.encode_texts([document.text for document in documents])
        encoded = [(_with_eos(ids, job), None) for ids in texts]
    for (row, _), result in zip(batch, encoded, strict=True):
        yield row, result


def _with_eos(ids: np.ndarray, job: _Job) -> np.ndarray:
    eos = job.tokenizer.eos_id
    if not job.append_eos or eos is None or (len(ids) and ids[-1] == eos):
        return ids
    return np.append(ids, np.array(eos, dtype=ids.dtype))


def _open_outputs(
    stack: ExitStack, directory: Path, is_chat: bool, prefix: str = ""
) -> dict[str, IO[bytes]]:
    names = (TOKENS, LOSS_MASK) if is_chat else (TOKENS,)
    return {name: stack.enter_context(open(directory / (prefix + name), "wb")) for name in names}


def _append(path: Path, output: IO[bytes]) -> None:
    with open(path, "rb") as part:
        shutil.copyfileobj(part, output, 1 << 24)
    path.unlink()


def _printable(name: str) -> str:
    """A path as text: file names may hold bytes that no terminal can print."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _int64(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)
