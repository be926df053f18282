"""Sampler: the sequences of each global batch, as a pure function of a position.

Sequences come in a shuffled order that depends only on (seed, epoch); a batch takes the next ones
up to a token budget. Rank, world size and history play no part, so every rank computes the same
batches on its own, the planner looks ahead for free, and a run resumes on any number of ranks from
two integers.

The order is never stored. A permutation of n ids is a small block cipher on [0, n): a Feistel
network maps a place in the order to an id, and is applied again while the id is out of range
("cycle walking"). Any part of the order can be computed without the rest, even in epochs of 100
million sequences, and the cipher is implemented here, so the order never changes with a library
version.

Invariants, each with a test of the same name in tests/data/test_sampler.py:

* once_per_epoch             each sequence is in one batch per epoch; no batch spans two epochs
* within_budget              a batch has at most batch_tokens tokens, or is one longer sequence
* batches_are_full           the next sequence of the epoch would not have fit
* position_determines_batch  batch_at(position) is the same in any process, in any order of calls
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

Position = tuple[int, int]  # (epoch, number of the epoch's sequences in earlier batches)

_NUM_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


class Sampler:
    """Global batches forever, epoch after epoch.

    Args:
        seqlens: (n,) integers, tokens per sequence.
        seed: any integer >= 0.
        batch_tokens: maximum tokens per batch; a longer sequence is a batch of its own.
        batch_sequences: sequences per batch; give either this or batch_tokens.
        shuffle: False keeps the sequences in the order of their ids in every epoch.

    Iteration continues from `position`, which is the only state. Raises ValueError for an empty
    dataset, and unless exactly one budget is given.
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
                f"batch_tokens={batch_tokens} and batch_sequences={batch_sequences}: "
                "give exactly one of them"
            )
        if budget < 1 or seed < 0:
            raise ValueError(f"batch size {budget} must be at least 1, seed {seed} at least 0")
        self._seqlens, self._seed, self._shuffle = seqlens, seed, shuffle
        self._budget, self._counts_tokens = budget, batch_tokens is not None
        self.position: Position = (0, 0)
        # How many places to look up at first: a few more than a batch takes. Only affects speed.
        probe = self._ids(0, np.linspace(0, len(seqlens) - 1, num=min(len(seqlens), 1024)))
        mean = float(np.mean(seqlens[probe])) if self._counts_tokens else 1.0
        self._window = int(min(len(seqlens), 16 + 1.25 * budget / max(mean, 1.0)))

    def batch_at(self, position: Position) -> tuple[np.ndarray, Position]:
        """The batch at `position` and the position of the next one.

        Returns ((num_seqs,) int64 sequence ids, (epoch, index)). Does not move the sampler. Raises
        ValueError for a position outside of this dataset.
        """
        epoch, start = position
        num_sequences = len(self._seqlens)
        if epoch < 0 or not 0 <= start < num_sequences:
            raise ValueError(
                f"position (epoch {epoch}, sequence {start}) is out of range for {num_sequences} "
                "sequences; it belongs to another dataset: resume with that one"
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
        """Batches from `position` on, without end; each one advances the position."""
        while True:
            ids, self.position = self.batch_at(self.position)
            yield ids

    def num_batches(self, epoch: int) -> int:
        """Number of batches in an epoch. Takes a pass over the lengths."""
        position, count = (epoch, 0), 0
        while position[0] == epoch:
            _, position = self.batch_at(position)
            count += 1
        return count

    def num_steps(self, epochs: float, position: Position = (0, 0)) -> int:
        """Number of batches from `position` until `epochs` epochs are done.

        Part of an epoch is a share of its sequences. Walks through all of these batches.
        """
        return count_batches(self, position, epochs)

    def steps_left(self, epochs: float) -> int:
        """Number of batches from the current position until `epochs` epochs are done."""
        return self.num_steps(epochs, self.position)

    def epochs_done(self, position: Position) -> float:
        """How many epochs lie before `position`."""
        return position[0] + position[1] / len(self._seqlens)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what identifies the data it belongs to (JSON)."""
        return {"epoch": self.position[0], "index": self.position[1], **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move to a saved position. The budget may differ from the saved run's.

        Raises ValueError if the sequences, the seed or the order differ from the saved run's.
        """
        different_data(state, self._identity())
        position = (int(state["epoch"]), int(state["index"]))
        self.batch_at(position)  # raises if the position is out of range
        self.position = position

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "num_sequences": len(self._seqlens),
            "seqlens_crc32": lengths_crc32(self._seqlens),
        }

    def _num_fitting(self, ids: np.ndarray) -> int:
        """How many of the next sequences fit into the batch: at least one."""
        if not self._counts_tokens:
            return min(len(ids), self._budget)
        totals = np.cumsum(self._seqlens[ids], dtype=np.int64)
        return max(1, int(np.searchsorted(totals, self._budget, side="right")))

    def _ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """(num,) int64 ids at `places` in the epoch's order."""
        places = np.asarray(places, dtype=np.int64)
        if not self._shuffle:
            return places
        return permute(places, len(self._seqlens), key=_mix(_mix(self._seed) + epoch))


def different_data(state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise ValueError if a saved position belongs to other data than `identity` describes."""
    different = {
        name: (state.get(name), value)
        for name, value in identity.items()
        if state.get(name) != value
    }
    if different:
        changes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in different.items())
        raise ValueError(
            f"the saved position belongs to other data ({changes}): resume with the data, length "
            "limit, held-out share, weights and seed of the saved run, or start a new run"
        )


def lengths_crc32(seqlens: np.ndarray) -> int:
    """CRC-32 of the lengths, the same for any integer dtype."""
    crc, step = 0, 1 << 20
    for start in range(0, len(seqlens), step):
        part = np.asarray(seqlens[start : start + step], dtype="<i8")
        crc = zlib.crc32(part.tobytes(), crc)
    return crc


def count_batches(sampler: Any, position: Any, epochs: float) -> int:
    """Batches of a sampler, or a mixture, from `position` until `epochs` epochs are done."""
    count = 0
    while sampler.epochs_done(position) < epochs - 1e-9:
        _, position = sampler.batch_at(position)
        count += 1
    return count


def permute(places: np.ndarray, size: int, *, key: int) -> np.ndarray:
    """(num,) int64 images of `places` under the permutation of [0, size) selected by `key`.

    An alternating Feistel network over the fewest bits that hold size - 1: each round changes one
    half of the bits by a hash of the other half, which is invertible for any hash. An image outside
    [0, size) is permuted again until it is inside; this ends because its cycle began inside.
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


def stable_hash(*values: int) -> int:
    """A 64-bit key from integers, the same in every process and version."""
    key = 0
    for value in values:
        key = _mix(key ^ _mix(value))
    return key


def _mix(value: int) -> int:
    """splitmix64's finalizer: every bit of the result depends on every bit of the value."""
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
