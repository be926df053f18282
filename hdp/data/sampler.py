"""Sampler: which sequences make global batch after batch, as a pure function of a position.

Sequences come in a shuffled order that depends on (seed, epoch) alone; a batch takes the next ones
up to a budget of tokens. Ranks, world size and history do not occur, so every rank computes the
same batches by itself, the planner looks ahead for free, and a run resumes on any number of ranks
from two integers.

The order is not a list. A permutation of n ids is a small block cipher on [0, n): a Feistel network
maps place to id, rounds of it again where the id falls outside ("cycle walking"). Any part of the
order costs only itself, in time and memory, also in epochs of 100 million sequences, and the cipher
is spelled out here, so an order never changes with a library's version.

Invariants, each with a test of its name in tests/data/test_sampler.py:

* once_per_epoch       each sequence is in one batch of each epoch; no batch spans two epochs
* budget_kept          a batch has at most batch_tokens tokens, or is one sequence that is longer
* batches_are_full     the next sequence of the epoch would not have fitted
* position_is_all      batch_at(position) is the same in any process, in any order of calls
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

Position = tuple[int, int]  # (epoch, sequences of the epoch that are in earlier batches)

_NUM_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


class Sampler:
    """Global batches for ever, epoch after epoch.

    Args:
        seqlens: (n,) integers, tokens per sequence.
        seed: any integer from 0 on.
        batch_tokens: most tokens of a batch; a longer sequence is a batch alone.
        batch_sequences: sequences of a batch instead; give one of the two.
        shuffle: False keeps the order of the ids in every epoch.

    Iterating goes on from `position`, which is the state. Raises ValueError for an empty dataset
    and for budgets that are not given once.
    """

    def __init__(
        self,
        seqlens: np.ndarray,
        *,
        seed: int = 0,
        batch_tokens: int | None = None,
        batch_sequences: int | None = None,
        shuffle: bool = True,
    ) -> None:
        if not len(seqlens):
            raise ValueError("no sequences to sample from: the dataset is empty")
        budget = batch_tokens if batch_sequences is None else batch_sequences
        if budget is None or (batch_tokens is not None and batch_sequences is not None):
            raise ValueError(
                f"batch_tokens {batch_tokens}, batch_sequences {batch_sequences}: give one of them"
            )
        if budget < 1 or seed < 0:
            raise ValueError(f"a batch of {budget} with seed {seed}: 1 or more, seed 0 or more")
        self._seqlens, self._seed, self._shuffle = seqlens, seed, shuffle
        self._budget, self._counts_tokens = budget, batch_tokens is not None
        self.position: Position = (0, 0)
        # Places to look at first: some more than a batch will take. Only speed depends on it.
        probe = self._ids(0, np.linspace(0, len(seqlens) - 1, num=min(len(seqlens), 1024)))
        mean = float(np.mean(seqlens[probe])) if self._counts_tokens else 1.0
        self._window = int(min(len(seqlens), 16 + 1.25 * budget / max(mean, 1.0)))

    def batch_at(self, position: Position) -> tuple[np.ndarray, Position]:
        """The batch at `position` and the position of the next one.

        Returns ((num_seqs,) int64 sequence ids, (epoch, index)). Does not move the sampler. Raises
        ValueError for a position that no batch of this dataset can have.
        """
        epoch, start = position
        num_sequences = len(self._seqlens)
        if epoch < 0 or not 0 <= start < num_sequences:
            raise ValueError(
                f"position (epoch {epoch}, sequence {start}) in a dataset of {num_sequences} "
                "sequences: it belongs to another dataset"
            )
        window = self._window
        while True:
            stop = min(num_sequences, start + window)
            ids = self._ids(epoch, np.arange(start, stop))
            count = self._num_fitting(ids)
            if count < len(ids) or stop == num_sequences:
                break
            window *= 2
        start += count
        return ids[:count], (epoch, start) if start < num_sequences else (epoch + 1, 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Batches from `position` on, without end; handing one out moves the position."""
        while True:
            ids, self.position = self.batch_at(self.position)
            yield ids

    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch. Takes a pass over the lengths."""
        position, count = (epoch, 0), 0
        while position[0] == epoch:
            _, position = self.batch_at(position)
            count += 1
        return count

    def state_dict(self) -> dict[str, Any]:
        """Position and what it is a position of (JSON)."""
        return {"epoch": self.position[0], "index": self.position[1], **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a saved position. The budget may differ from that of the saved run.

        Raises ValueError if the state is of other sequences, another seed or another order.
        """
        identity = self._identity()
        different = {
            name: (state.get(name), value)
            for name, value in identity.items()
            if state.get(name) != value
        }
        if different:
            changes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in different.items())
            raise ValueError(
                f"the saved position is of other batches ({changes}): resume with the data, limits "
                "and seed of that run, or start a new one"
            )
        position = (int(state["epoch"]), int(state["index"]))
        self.batch_at(position)  # raises if there is no such position
        self.position = position

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "num_sequences": len(self._seqlens),
            "seqlens_crc32": self._crc32(),
        }

    def _crc32(self) -> int:
        crc, step = 0, 1 << 20
        for start in range(0, len(self._seqlens), step):
            part = np.asarray(self._seqlens[start : start + step], dtype="<i8")
            crc = zlib.crc32(part.tobytes(), crc)
        return crc

    def _num_fitting(self, ids: np.ndarray) -> int:
        """How many of the next sequences the batch takes: at least one."""
        if not self._counts_tokens:
            return min(len(ids), self._budget)
        totals = np.cumsum(self._seqlens[ids], dtype=np.int64)
        return max(1, int(np.searchsorted(totals, self._budget, side="right")))

    def _ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """(num,) int64 ids at places of an epoch's order."""
        places = np.asarray(places, dtype=np.int64)
        if not self._shuffle:
            return places
        return permute(places, len(self._seqlens), key=_mix(_mix(self._seed) + epoch))


def permute(places: np.ndarray, size: int, *, key: int) -> np.ndarray:
    """(num,) int64 images of `places` under the permutation of [0, size) that `key` names.

    An alternating Feistel network over the fewest bits that hold size - 1: each round changes one
    part of the bits by a hash of the other, which is invertible whatever the hash. A place that
    leaves [0, size) goes round again until it is inside; it does, as its cycle began inside.
    """
    num_bits = max(2, (size - 1).bit_length())
    low_bits = np.uint64(num_bits // 2)
    low_mask = np.uint64((1 << (num_bits // 2)) - 1)
    high_mask = np.uint64((1 << (num_bits - num_bits // 2)) - 1)
    keys = [np.uint64(_mix(key + i * _GOLDEN)) for i in range(_NUM_ROUNDS)]
    images = np.array(places, dtype=np.uint64)
    outside = np.arange(len(images))
    while len(outside):
        values = images[outside]
        high, low = values >> low_bits, values & low_mask
        for i in range(0, _NUM_ROUNDS, 2):
            high ^= _mix_array(low + keys[i]) & high_mask
            low ^= _mix_array(high + keys[i + 1]) & low_mask
        images[outside] = values = (high << low_bits) | low
        outside = outside[values >= np.uint64(size)]
    return images.astype(np.int64)


def _mix(value: int) -> int:
    """splitmix64's finaliser: every bit of the result depends on every bit of the value."""
    value = (value + _GOLDEN) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def _mix_array(values: np.ndarray) -> np.ndarray:
    """`_mix` of each element of a uint64 array (arithmetic wraps)."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
