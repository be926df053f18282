"""TokenDataset: sequences of tokens that cost nothing until they are read.

A dataset is an index (lengths) over memory maps (tokens). Indexing gives views: a rank that holds a
thirty-second of a sequence reads a thirty-second of it. Every rank opens the same files.

Invariants, each with a test of its name in tests/data/test_dataset.py:

* nothing_is_cut_unasked     a document over max_length is an error unless `overlong` says otherwise
* every_row_is_accounted     rows of the source = documents + rejections, and the report has all
* views_read_nothing         indexing gives views of the maps, not copies
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hdp.data.prepare.build import LOSS_MASK, NAMES, TOKENS, damage_message, row_name
from hdp.data.prepare.documents import DAMAGE
from hdp.data.prepare.sealed import read_seal
from hdp.data.prepare.tokenizer import Tokenizer

from .sample import Sample
from .views import Overlong, Sequences, choose


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of the rows of a source. `str()` is for people."""

    label: str
    tokenizer: str
    cache_path: str
    num_rows: int  # of the source
    num_rejected: dict[str, int]  # rows that are no documents, by reason
    examples: dict[str, list[tuple[str, str]]]  # (name, detail) of the first few of each reason
    num_documents: int
    num_sequences: int  # after max_length and overlong
    num_tokens: int  # in the sequences
    num_loss_tokens: int
    longest_tokens: int
    max_length: int | None
    overlong: str
    num_overlong: int  # documents longer than max_length
    lost_tokens: int  # that drop or truncate leave out
    num_without_loss: int  # sequences left out because they have no token to learn

    def __str__(self) -> str:
        lines = [
            f"{self.label}: {self.num_sequences:,} sequences, {self.num_tokens:,} tokens "
            f"({self.tokenizer}), {self.num_loss_tokens:,} with loss, "
            f"longest {self.longest_tokens:,}"
        ]
        for reason, count in self.num_rejected.items():
            name, detail = self.examples[reason][0]
            lines.append(f"skipped {count:,} {reason}, first {name}{detail and f' ({detail})'}")
        if self.num_overlong:
            done = {"drop": "dropped", "truncate": "truncated", "split": "split"}[self.overlong]
            lost = f", {self.lost_tokens:,} tokens left out" if self.lost_tokens else ""
            lines.append(
                f"{done} {self.num_overlong:,} documents over {self.max_length:,} tokens{lost}"
            )
        if self.num_without_loss:
            lines.append(f"skipped {self.num_without_loss:,} sequences without a token to learn")
        return "\n".join(lines)


class TokenDataset:
    """Token sequences over a cache folder. `open_dataset` and `open_cache` make it.

    Attributes:
        seqlens: (n,) int64, tokens per sequence.
        num_loss_tokens: (n,) int64, labels per sequence: positions from 1 on that have a loss.
        vocab_size: ids are in [0, vocab_size).
        is_chat: whether samples have a loss mask.
        tokenizer: what made the ids; None if the cache was opened by its path alone.
        fingerprint: names these very sequences: source, tokenizer, options, limit.
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
        """Sequence `index` as views: nothing is read until they are sliced.

        Raises IndexError outside of [-len, len).
        """
        start = int(self._sequences.starts[index])
        stop = start + int(self.seqlens[index])
        mask = None if self._loss_mask is None else self._loss_mask[start:stop]
        return Sample(input_ids=self._tokens[start:stop], loss_mask=mask)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a path: the copy maps the same files."""
        return _reopen, (self._path, *self._limit, self.tokenizer)

    def name(self, index: int) -> str:
        """Where sequence `index` comes from: a path, "chats.jsonl:17", or "dataset row 3"."""
        document = int(self._sequences.documents[index])
        name = self._document_name(document)
        offsets = _map_npy(self._path / "offsets.npy")
        start = int(self._sequences.starts[index] - offsets[document])
        stop = start + int(self.seqlens[index])
        is_whole = stop - start == offsets[document + 1] - offsets[document]
        return name if is_whole else f"{name} [tokens {start}:{stop}]"

    def check_fits(self, *, hdp_size: int, max_tokens_per_rank: int | np.ndarray) -> None:
        """Raises ValueError if a sequence is longer than all ranks together can hold.

        max_tokens_per_rank: of any sequence, or (num_seqs,) of each. The message names the longest
        sequence that does not fit and what would hold it.
        """
        held = np.broadcast_to(max_tokens_per_rank, self.seqlens.shape)
        over = self.seqlens > hdp_size * held
        if not over.any():
            return
        longest = int(np.argmax(np.where(over, self.seqlens, 0)))
        seqlen, per_rank = int(self.seqlens[longest]), int(held[longest])
        capacity, count = hdp_size * per_rank, int(np.count_nonzero(over))
        raise ValueError(
            f"{self.name(longest)} has {seqlen:,} tokens, but {hdp_size} ranks of "
            f"{per_rank:,} tokens hold {capacity:,} ({count:,} sequences are longer): "
            f"use {-(-seqlen // per_rank):,} ranks, or --max-tokens-per-rank "
            f"{-(-seqlen // hdp_size)}, or --max-length {capacity} --overlong drop|truncate|split"
        )

    def save_lengths(self, path: str | Path) -> None:
        """Writes `seqlens` as .npy, which `hdp plan --lengths` and numpy read."""
        with open(path, "wb") as file:
            np.save(file, np.asarray(self.seqlens, dtype=np.int64))

    @cached_property
    def _names(self) -> dict[str, Any]:
        return json.loads((self._path / NAMES).read_text(encoding="utf-8"))

    def _document_name(self, document: int) -> str:
        return row_name(self._names, int(_map_npy(self._path / "rows.npy")[document]))


def open_cache(
    path: str | Path,
    *,
    max_length: int | None = None,
    overlong: Overlong = "error",
    strict: bool = False,
    tokenizer: Tokenizer | None = None,
) -> TokenDataset:
    """Opens a folder that `open_dataset` built (its `report.cache_path`), without the source.

    path is the folder; max_length, overlong and strict are as in `open_dataset`; tokenizer: what
    made the ids, for decoding and export. Raises ValueError if the folder is missing or broken,
    under `strict` if rows were damaged, and if sequences break the limit.
    """
    path = Path(path)
    meta = read_seal(path)
    if meta is None or "num_documents" not in meta:
        raise ValueError(f"{path} is no token cache, or a broken one: open its data again")
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
    )


def _map(path: Path, dtype: str) -> np.ndarray:
    """A plain array over the mapped file: np.memmap's own slices are ten times as slow to make."""
    return np.asarray(np.memmap(path, dtype=np.dtype(dtype), mode="r"))


def _map_npy(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r"))
