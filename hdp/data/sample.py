"""Sample: one sequence of tokens with per-token data for the objective. No torch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

IGNORE_INDEX = -100  # the label of a position without loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sequence. Arrays may be memory maps: data is read only when it is sliced.

    columns: per-token inputs of the objective, by name: weights, advantages, log-probabilities of
        an earlier policy. Entry p belongs to token p, like `input_ids[p]`. (seqlen, ...) arrays of
        numbers or booleans; all samples of a step must have the same names.

    Raises ValueError if the length of an array differs from that of `input_ids`.
    """

    input_ids: np.ndarray  # (seqlen,) any integer dtype
    loss_mask: np.ndarray | None = None  # (seqlen,) bool: tokens that get a loss; None: all
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, array in [("loss_mask", self.loss_mask), *self.columns.items()]:
            if array is not None and len(array) != len(self.input_ids):
                raise ValueError(
                    f"{name} has {len(array)} entries for {len(self.input_ids)} tokens; "
                    "give one per token"
                )

    def labels(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64: labels of positions start..stop-1; IGNORE_INDEX means no loss.

        The label of position p is token p + 1; the last position has none.
        """
        labels = np.full(stop - start, IGNORE_INDEX, dtype=np.int64)
        targets = self.input_ids[start + 1 : stop + 1]
        labels[: len(targets)] = targets
        if self.loss_mask is not None:
            masked = ~np.asarray(self.loss_mask[start + 1 : stop + 1], dtype=bool)
            labels[: len(targets)][masked] = IGNORE_INDEX
        return labels

    def shifted(self, name: str, start: int, stop: int) -> np.ndarray:
        """(stop - start, ...): column `name`, shifted like `labels`.

        Position p gets the entry of token p + 1; the last position gets 0.
        """
        column = self.columns[name]
        entries = column[start + 1 : stop + 1]
        values = np.zeros((stop - start, *column.shape[1:]), dtype=column.dtype)
        values[: len(entries)] = entries
        return values

    @property
    def num_loss_tokens(self) -> int:
        """Number of labels in the whole sequence. Reads the loss mask."""
        if self.loss_mask is None:
            return max(len(self.input_ids) - 1, 0)
        return int(np.count_nonzero(self.loss_mask[1:]))


class SampleSource(Protocol):
    """Anything that has lengths: a `TokenDataset`, a `SampleList`, or your own class.

    Batches are planned from the lengths; a rank reads only the samples that it runs.
    """

    @property
    def seqlens(self) -> np.ndarray:
        """(num_samples,) int64, tokens per sample."""
        ...

    @property
    def num_loss_tokens(self) -> np.ndarray:
        """(num_samples,) int64, labels per sample."""
        ...

    def __getitem__(self, index: int, /) -> Sample: ...


def content_checksum(source: SampleSource) -> int:
    """CRC-32 of all lengths and label counts, and of the ends of up to 256 samples.

    Two copies of the same data have the same one; reading it takes milliseconds.
    """
    seqlens = np.asarray(source.seqlens, dtype="<i8")
    crc = zlib.crc32(seqlens.tobytes())
    crc = zlib.crc32(np.asarray(source.num_loss_tokens, dtype="<i8").tobytes(), crc)
    for index in np.unique(np.linspace(0, len(seqlens) - 1, 256).astype(np.int64)):
        ids = source[int(index)].input_ids
        for part in (ids[:64], ids[-64:]):
            crc = zlib.crc32(np.asarray(part, dtype="<i8").tobytes(), crc)
    return crc


class SampleList:
    """Samples in memory, such as the rollouts of one step, as a `SampleSource`."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)

    @cached_property
    def seqlens(self) -> np.ndarray:
        """(num_samples,) int64, tokens per sample."""
        return np.array([len(sample.input_ids) for sample in self.samples], dtype=np.int64)

    @cached_property
    def num_loss_tokens(self) -> np.ndarray:
        """(num_samples,) int64, labels per sample."""
        return np.array([sample.num_loss_tokens for sample in self.samples], dtype=np.int64)

    def __getitem__(self, index: int, /) -> Sample:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)
