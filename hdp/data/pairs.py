"""PairDataset: chosen and rejected answers, one after the other, as a sample source.

The two sides of a preference data set are two token caches of the same rows. Sequence 2k is the
chosen and 2k + 1 the rejected answer of pair k, and a pair is in the data only as a whole: a row
whose one side was refused or dropped loses the other, and the report counts it.

    pairs = open_pairs("pairs.jsonl", tokenizer="bytes")
    sampler = PairSampler(pairs.pair_lengths, batch_tokens=8192)
    ids, _ = sampler.batch_at((0, 0))              # [2k, 2k + 1, 2j, 2j + 1, ...]
    plan(pairs.seqlens[ids], units=pair_units(len(ids)), ...)

Invariants (tests of the same names in tests/data/test_pairs.py): pairs_are_whole, batches_are_pairs
within the budget, every_row_is_accounted_for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .dataset import TokenDataset, check_fits
from .prepare.cache import open_dataset
from .prepare.locate import open_source
from .prepare.preference import SIDES
from .sample import Sample
from .sampler import Position, Sampler
from .selection import Selection


def open_pairs(
    data: Any, *, tokenizer: Any = "bytes", strict: bool = False, **options: Any
) -> PairDataset:
    """The pairs of `data`; options as of `open_dataset`.

    strict: pairs without an answer, with equal answers or over the limit are errors; otherwise they
    are skipped and counted. Raises ValueError as `open_dataset`, for overlong="split", and if no
    pair is left.
    """
    if options.get("overlong") == "split":
        raise ValueError(
            "--overlong split would compare parts of answers: choose error, drop or truncate for "
            "pairs"
        )
    sides = []
    for side in SIDES:
        options["format"] = side
        sides.append(open_dataset(data, tokenizer=tokenizer, strict=strict, **options))
        tokenizer = sides[-1].tokenizer  # a tokenizer that is trained is trained once
    return PairDataset(*sides, strict=strict)


def open_labeled(data: Any, *, tokenizer: Any = "bytes", **options: Any) -> LabeledDataset:
    """Answers that are good or bad, one by one: rows of prompt, completion and label, or pairs.

    Options as of `open_dataset`. The two answers of a pair are a good and a bad one. Raises
    ValueError as `open_dataset`, and if all answers are of one kind.
    """
    where = {k: options[k] for k in ("pattern", "subset", "split") if options.get(k) is not None}
    columns = getattr(open_source(data, format="good", **where), "columns", [])
    formats = SIDES if {*SIDES} <= {*columns} else ("good", "bad")
    sides = []
    for options["format"] in formats:
        sides.append(open_dataset(data, tokenizer=tokenizer, **options))
        tokenizer = sides[-1].tokenizer
    return LabeledDataset(sides)


class LabeledDataset(Selection):
    """Good answers and then bad ones, each with the column is_good, 1 or 0 at every token."""

    def __getitem__(self, index: int, /) -> Sample:
        """Sequence `index` as views. Raises IndexError outside [-len, len)."""
        dataset, local = self._locate(index)
        sample = dataset[local]
        is_good = float(dataset is self.datasets[0])
        column = np.broadcast_to(np.float32(is_good), sample.input_ids.shape)
        return replace(sample, columns={"is_good": column})


class PairDataset:
    """Pairs from two data sets of the same rows. Attributes are those of `TokenDataset`.

    pair_lengths: (num_pairs,) int64, tokens of both answers with their prompts. Raises ValueError
    if no pair is whole, and under `strict` if one is not.
    """

    def __init__(
        self, chosen: TokenDataset, rejected: TokenDataset, *, strict: bool = False
    ) -> None:
        self._sides = (chosen, rejected)
        _, mine, theirs = np.intersect1d(
            chosen.rows, rejected.rows, assume_unique=True, return_indices=True
        )
        ids = np.stack([mine, theirs], axis=1).astype(np.int64)
        rows = np.union1d(chosen.document_rows, rejected.document_rows)
        self.num_broken = len(rows) - len(ids)
        if strict and self.num_broken:
            row = int(np.setdiff1d(rows, chosen.rows[mine])[0])
            raise ValueError(
                f"{chosen.row_name(row)}: an answer of the pair is over the limit, or has no "
                "tokens within it; raise --max-length, or turn off strict to skip it"
            )
        equal = np.array([self._are_equal(i, j) for i, j in ids.tolist()], dtype=bool)
        self.num_equal = int(np.count_nonzero(equal))
        if strict and self.num_equal:
            raise ValueError(
                f"{chosen.name(int(ids[equal][0, 0]))}: both answers have the same tokens (within "
                "the limit); raise --max-length, or turn off strict to skip it"
            )
        self._ids = ids[~equal]
        if not len(self._ids):
            raise ValueError(
                f"no pair is left: {self.num_broken:,} have an answer over the limit, and "
                f"{self.num_equal:,} the same tokens twice; raise --max-length or check the data"
            )
        self.tokenizer, self.vocab_size = chosen.tokenizer, chosen.vocab_size
        self.seqlens = self._interleaved("seqlens")
        self.num_loss_tokens = self._interleaved("num_loss_tokens")
        self.pair_lengths = self.seqlens.reshape(-1, 2).sum(axis=1)
        key = "+".join(side.fingerprint for side in self._sides)
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]

    def _are_equal(self, i: int, j: int) -> bool:
        chosen, rejected = self._sides
        if chosen.seqlens[i] != rejected.seqlens[j]:
            return False
        return np.array_equal(chosen[i].input_ids, rejected[j].input_ids)

    def _interleaved(self, name: str) -> np.ndarray:
        columns = [getattr(side, name)[self._ids[:, k]] for k, side in enumerate(self._sides)]
        return np.stack(columns, axis=1).reshape(-1)

    def __len__(self) -> int:
        return len(self.seqlens)

    def __getitem__(self, index: int, /) -> Sample:
        """Sequence `index` as views. Raises IndexError outside [-len, len)."""
        side, local = self._locate(index)
        return side[local]

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def name(self, index: int) -> str:
        """The origin of sequence `index`, as `TokenDataset.name`."""
        side, local = self._locate(index)
        return side.name(local)

    def _locate(self, index: int) -> tuple[TokenDataset, int]:
        index = range(len(self))[index]
        return self._sides[index % 2], int(self._ids[index // 2, index % 2])

    def check_fits(self, *, hdp_size: int, max_tokens_per_rank: int | np.ndarray) -> None:
        """`TokenDataset.check_fits` for whole pairs, whose answers share their ranks."""
        held = np.broadcast_to(max_tokens_per_rank, self.seqlens.shape)
        check_fits(
            _Wholes(self), hdp_size=hdp_size, max_tokens_per_rank=held.reshape(-1, 2).min(axis=1)
        )

    @property
    def report(self) -> PairReport:
        """What became of the rows."""
        return PairReport(self)


class PairReport:
    """`str()` is a readable summary."""

    def __init__(self, pairs: PairDataset) -> None:
        self._pairs = pairs

    def __str__(self) -> str:
        pairs = self._pairs
        chosen, rejected = (side.report for side in pairs._sides)
        lines = [
            f"{chosen.label}: {len(pairs.pair_lengths):,} pairs of {chosen.num_rows:,} rows, "
            f"{int(pairs.pair_lengths.sum()):,} tokens ({chosen.tokenizer}), "
            f"{int(pairs.num_loss_tokens.sum()):,} in answers, longest pair "
            f"{int(pairs.pair_lengths.max()):,}",
            *chosen.notes,
        ]
        for report in (chosen, rejected):
            for reason, count in report.num_rejected.items():
                if report is rejected and count <= chosen.num_rejected.get(reason, 0):
                    continue
                name, detail = report.examples[reason][0]
                detail = f" ({detail})" if detail else ""
                lines.append(f"rows skipped ({reason}): {count:,}, first {name}{detail}")
        if pairs.num_broken:
            lines.append(
                f"pairs skipped (an answer over the limit, or without tokens within it; "
                f"--max-length {chosen.max_length}): {pairs.num_broken:,}"
            )
        if pairs.num_equal:
            lines.append(f"pairs skipped (the same tokens within the limit): {pairs.num_equal:,}")
        return "\n".join(lines)


class Mismatched:
    """Each sequence's prompt with the answer of the next one, as a `SampleSource`.

    What KTO measures its baseline on: answers that the policy has no reason to prefer. The prompt
    is what comes before the first token with a loss. Longer ones lose their end at max_length.
    """

    def __init__(self, samples: Sequence[Sample], *, max_length: int) -> None:
        self._samples, self._max_length = list(samples), max_length
        masks = [np.asarray(sample.loss_mask) for sample in self._samples]
        self._starts = [int(mask.argmax()) for mask in masks]
        made = [self[i] for i in range(len(self._samples))]
        self.seqlens = np.array([len(sample.input_ids) for sample in made], dtype=np.int64)
        self.num_loss_tokens = np.array([sample.num_loss_tokens for sample in made], dtype=np.int64)

    def __getitem__(self, index: int, /) -> Sample:
        other = (index + 1) % len(self._samples)
        start, after = self._starts[index], self._starts[other]
        prompt, answer = self._samples[index], self._samples[other]
        assert answer.loss_mask is not None
        ids = np.concatenate([prompt.input_ids[:start], answer.input_ids[after:]])
        mask = np.concatenate([np.zeros(start, dtype=bool), answer.loss_mask[after:]])
        return Sample(input_ids=ids[: self._max_length], loss_mask=mask[: self._max_length])


class PairSampler(Sampler):
    """A `Sampler` of pairs, (num_pairs,) lengths, whose batches are their two sequences each."""

    def batch_at(self, position: Position) -> tuple[np.ndarray, Position]:
        """((2 * num_pairs,) int64 sequence ids 2k, 2k + 1, ..., next position)."""
        pairs, following = super().batch_at(position)
        return np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1), following


class _Wholes:
    """Pairs as if each were one sequence, for `check_fits`."""

    def __init__(self, pairs: PairDataset) -> None:
        self._pairs, self.seqlens = pairs, pairs.pair_lengths

    def name(self, index: int, /) -> str:
        return f"the pair of {self._pairs.name(2 * index)}"
