"""TokenDataset: token sequences that are read from disk only when used.

A dataset is an index (lengths) over memory maps (tokens). Indexing returns views: a rank that holds
1/32 of a sequence reads 1/32 of it. Every rank opens the same files.

Invariants, each with a test of the same name in tests/data/test_dataset.py:

* nothing_is_cut_by_default    a document over max_length is an error unless `overlong` allows it
* every_row_is_accounted_for   source rows = documents + rejections, and the report shows all
* views_read_nothing           indexing returns views of the maps, not copies
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hdp.data.prepare.build import LOSS_MASK, NAMES, TOKENS, check_index, damage_message, row_name
from hdp.data.prepare.documents import DAMAGE
from hdp.data.prepare.sealed import read_seal
from hdp.data.prepare.tokenizer import Tokenizer

from .sample import Sample
from .views import Overlong, Sequences, choose


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of the rows of a source. `str()` gives a readable summary."""

    label: str
    tokenizer: str
    cache_path: str
    num_rows: int  # of the source
    num_rejected: dict[str, int]  # rows that did not become documents, by reason
    examples: dict[str, list[tuple[str, str]]]  # (name, detail) of the first few of each reason
    num_documents: int
    num_sequences: int  # after max_length and overlong
    num_tokens: int  # in all sequences
    num_loss_tokens: int
    longest_tokens: int
    max_length: int | None
    overlong: str
    num_overlong: int  # documents longer than max_length
    lost_tokens: int  # left out by drop or truncate
    num_without_loss: int  # sequences left out because they have no loss tokens
    notes: tuple[str, ...] = ()  # what else users should know about the rows and the tokenizer

    def __str__(self) -> str:
        lines = [
            f"{self.label}: {self.num_sequences:,} sequences, {self.num_tokens:,} tokens "
            f"({self.tokenizer}), {self.num_loss_tokens:,} with loss, "
            f"longest {self.longest_tokens:,}"
        ]
        lines += self.notes
        for reason, count in self.num_rejected.items():
            name, detail = self.examples[reason][0]
            detail = f" ({detail})" if detail else ""
            lines.append(f"rows skipped ({reason}): {count:,}, first {name}{detail}")
        if self.num_overlong:
            action = {"drop": "dropped", "truncate": "truncated", "split": "split"}[self.overlong]
            lost = f"; {self.lost_tokens:,} tokens left out" if self.lost_tokens else ""
            lines.append(
                f"documents over {self.max_length:,} tokens, {action}: {self.num_overlong:,}{lost}"
            )
        if self.num_without_loss:
            lines.append(f"sequences skipped (no loss tokens): {self.num_without_loss:,}")
        return "\n".join(lines)


class TokenDataset:
    """Token sequences in a cache folder. Created by `open_dataset` and `open_cache`.

    Attributes:
        seqlens: (n,) int64, tokens per sequence.
        num_loss_tokens: (n,) int64, labels per sequence: tokens after the first that have a loss.
        vocab_size: ids are in [0, vocab_size).
        is_chat: whether samples have a loss mask.
        tokenizer: the tokenizer of the ids; None if only the path of the cache was given.
        fingerprint: identifies exactly these sequences: source, tokenizer, options and limit.
        report: what became of the source's rows.
    """

    def __init__(
        self,
        path: Path,
        meta: dict[str, Any],
        *,
        max_length: int | None,
        overlong: Overlong,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._path, self._meta = path, meta
        self._limit = (max_length, overlong)
        self.tokenizer, self.vocab_size, self.is_chat = (
            tokenizer,
            meta["vocab_size"],
            meta["is_chat"],
        )
        self._tokens = _map(path / TOKENS, meta["dtype"])
        self._loss_mask = _map(path / LOSS_MASK, "bool") if self.is_chat else None
        self._sequences = choose(
            _map_npy(path / "offsets.npy"),
            _map_npy(path / "seqlens.npy"),
            _map_npy(path / "num_loss_tokens.npy"),
            self._loss_mask,
            max_length=max_length,
            overlong=overlong,
            name=self._document_name,
        )
        self.seqlens = self._sequences.seqlens
        self.num_loss_tokens = self._sequences.num_loss_tokens
        key = json.dumps([path.name, meta["fingerprint"], max_length, overlong])
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
        self.report = _report(path, meta, self._sequences, max_length, overlong)

    def __len__(self) -> int:
        return len(self.seqlens)

    def __getitem__(self, index: int) -> Sample:
        """Sequence `index` as views, which are read only when sliced.

        Raises IndexError outside [-len, len).
        """
        start = int(self._sequences.starts[index])
        stop = start + int(self.seqlens[index])
        mask = None if self._loss_mask is None else self._loss_mask[start:stop]
        return Sample(input_ids=self._tokens[start:stop], loss_mask=mask)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the path: the copy maps the same files."""
        return _reopen, (self._path, *self._limit, self.tokenizer)

    def name(self, index: int) -> str:
        """The origin of sequence `index`: a path, "chats.jsonl:17", or "dataset row 3"."""
        document = int(self._sequences.documents[index])
        name = self._document_name(document)
        offsets = _map_npy(self._path / "offsets.npy")
        start = int(self._sequences.starts[index] - offsets[document])
        stop = start + int(self.seqlens[index])
        is_whole = stop - start == offsets[document + 1] - offsets[document]
        return name if is_whole else f"{name} [tokens {start}:{stop}]"

    @property
    def documents(self) -> np.ndarray:
        """(n,) int64, the document that each sequence is, or is part of."""
        return self._sequences.documents

    def check_fits(self, *, hdp_size: int, max_tokens_per_rank: int | np.ndarray) -> None:
        """Raise ValueError if a sequence is longer than all ranks together can hold.

        max_tokens_per_rank: one limit for all sequences, or (num_seqs,) limits. The message names
        the longest sequence that does not fit and the settings with which it would.
        """
        check_fits(self, hdp_size=hdp_size, max_tokens_per_rank=max_tokens_per_rank)

    def save_lengths(self, path: str | Path) -> None:
        """Write `seqlens` as .npy, for `hdp plan --lengths` and numpy."""
        with open(path, "wb") as file:
            np.save(file, np.asarray(self.seqlens, dtype=np.int64))

    @cached_property
    def _names(self) -> dict[str, Any]:
        return json.loads((self._path / NAMES).read_text(encoding="utf-8"))

    def _document_name(self, document: int) -> str:
        return row_name(self._names, int(_map_npy(self._path / "rows.npy")[document]))


class NamedLengths(Protocol):
    """Sequences with lengths and names: a `TokenDataset` or a selection of some."""

    @property
    def seqlens(self) -> np.ndarray:
        """(num_samples,) int64, tokens per sequence."""
        ...

    def name(self, index: int, /) -> str: ...


def check_fits(
    data: NamedLengths, *, hdp_size: int, max_tokens_per_rank: int | np.ndarray
) -> None:
    """`TokenDataset.check_fits` for any sequences with names."""
    held = np.broadcast_to(max_tokens_per_rank, data.seqlens.shape)
    over = data.seqlens > hdp_size * held
    if not over.any():
        return
    longest = int(np.argmax(np.where(over, data.seqlens, 0)))
    seqlen, per_rank = int(data.seqlens[longest]), int(held[longest])
    capacity, count = hdp_size * per_rank, int(np.count_nonzero(over))
    raise ValueError(
        f"{data.name(longest)} has {seqlen:,} tokens, but {hdp_size} ranks of "
        f"{per_rank:,} tokens hold {capacity:,} ({count:,} sequences do not fit): "
        f"use {-(-seqlen // per_rank):,} ranks, or --max-tokens-per-rank "
        f"{-(-seqlen // hdp_size)}, or --max-length {capacity} --overlong drop|truncate|split"
    )


def open_cache(
    path: str | Path,
    *,
    max_length: int | None = None,
    overlong: Overlong = "error",
    strict: bool = False,
    tokenizer: Tokenizer | None = None,
) -> TokenDataset:
    """Open a folder that `open_dataset` built (`report.cache_path`), without its source.

    path is the folder; max_length, overlong and strict are as in `open_dataset`; tokenizer: the
    tokenizer of the ids, for decoding and export. Raises ValueError if the folder is missing or
    damaged, if documents exceed the limit, and under `strict` if rows were damaged.
    """
    path = Path(path)
    meta = read_seal(path, check=check_index)
    if meta is None or "num_documents" not in meta:
        raise ValueError(
            f"{path} is not a token cache, or is damaged: build it with hdp.data.open_dataset"
        )
    for reason in DAMAGE if strict else ():
        for name, detail in meta["examples"].get(reason, ()):
            raise ValueError(damage_message(name, reason, detail))
    return TokenDataset(path, meta, max_length=max_length, overlong=overlong, tokenizer=tokenizer)


def _reopen(
    path: Path, max_length: int | None, overlong: Overlong, tokenizer: Tokenizer | None
) -> TokenDataset:
    return open_cache(path, max_length=max_length, overlong=overlong, tokenizer=tokenizer)


def _report(
    path: Path, meta: dict[str, Any], sequences: Sequences, max_length: int | None, overlong: str
) -> DataReport:
    examples = meta["examples"].items()
    return DataReport(
        label=meta["label"],
        tokenizer=meta["tokenizer"],
        cache_path=str(path),
        num_rows=meta["num_rows"],
        num_rejected=meta["rejected"],
        examples={reason: [(name, detail) for name, detail in rows] for reason, rows in examples},
        num_documents=meta["num_documents"],
        num_sequences=len(sequences),
        num_tokens=int(sequences.seqlens.sum()),
        num_loss_tokens=int(sequences.num_loss_tokens.sum()),
        longest_tokens=int(sequences.seqlens.max()),
        max_length=max_length,
        overlong=overlong,
        num_overlong=sequences.num_overlong,
        lost_tokens=sequences.lost_tokens,
        num_without_loss=sequences.num_without_loss,
        notes=tuple(meta.get("notes", ())),
    )


def _map(path: Path, dtype: str) -> np.ndarray:
    """A plain array over the mapped file, as slicing an np.memmap is ten times slower."""
    return np.asarray(np.memmap(path, dtype=np.dtype(dtype), mode="r"))


def _map_npy(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r"))
