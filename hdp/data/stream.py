"""Stream: one source's sequences, epoch after epoch, under a limit that grows in phases.

The state is (epoch, taken in phase 0, ..., taken in phase k) and nothing else. In phase k the epoch
has the sequences that the limit of phase k admits, in the epoch's order, without those that earlier
phases of the same epoch took. When they run out, a new epoch begins: (epoch + 1, 0, ..., 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .sampler import permute, stable_hash

StreamState = tuple[int, ...]
_WINDOW = 64  # ids computed at a time; doubles while a batch goes on


class Stream:
    """The orders of one source.

    seqlens: (n,) integers. number: the source's, which makes its order differ from that of another
    source of the same size. limits: maximum tokens of a sequence in each phase; None: no limit.
    Raises ValueError if there is no sequence, or none that the first limit admits.
    """

    def __init__(
        self,
        seqlens: np.ndarray,
        *,
        seed: int,
        number: int,
        short_first: bool,
        limits: Sequence[int | None],
    ) -> None:
        if not len(seqlens):
            raise ValueError("no sequences to sample from: the dataset is empty")
        self.seqlens, self.size = seqlens, len(seqlens)
        self.num_tokens = int(np.sum(seqlens, dtype=np.int64))
        self._seed, self._number, self._short_first = seed, number, short_first
        shortest, longest = int(np.min(seqlens)), int(np.max(seqlens))
        if limits[0] is not None and shortest > limits[0]:
            raise ValueError(
                f"no sequence has at most {limits[0]:,} tokens, the first limit: the shortest has "
                f"{shortest:,}; raise the limit"
            )
        self._limits = [None if x is None or x >= longest else x for x in limits]
        self._num_admitted = [
            self.size if limit is None else int(np.count_nonzero(seqlens <= limit))
            for limit in self._limits
        ]
        self._remaining = lru_cache(maxsize=4)(self._select)

    def cursor(self, state: StreamState, phase: int) -> Cursor:
        """A cursor at `state` in `phase`, which may be later than the phase that made the state."""
        epoch, *taken = state
        return Cursor(self, epoch, [*taken, *[0] * (phase + 1 - len(taken))])

    def epochs_done(self, state: StreamState) -> float:
        """Whole epochs, and the share of this one's admitted sequences that has been taken."""
        epoch, *taken = state
        return epoch + sum(taken) / self._num_admitted[len(taken) - 1]

    def contains(self, state: StreamState) -> bool:
        """Whether `state` is one of this stream's."""
        if len(state) < 2 or min(state) < 0 or len(state) - 1 > len(self._limits):
            return False
        return sum(state[1:]) <= self._num_admitted[len(state) - 2]

    def ids(self, epoch: int, taken: Sequence[int], start: int, stop: int) -> np.ndarray:
        """Places start..stop-1 of what the last phase of `taken` has of this epoch; clipped."""
        earlier = tuple(taken[:-1])
        if not any(earlier) and self._limits[len(earlier)] is None and not self._sorts(epoch):
            places = np.arange(min(start, self.size), min(stop, self.size))
            return self._permuted(epoch, places)
        return self._remaining(epoch, earlier)[start:stop]

    def _select(self, epoch: int, earlier: tuple[int, ...]) -> np.ndarray:
        """What phase len(earlier) has of this epoch, in order."""
        order = self._permuted(epoch, np.arange(self.size))
        if self._sorts(epoch):
            order = order[np.argsort(self.seqlens[order], kind="stable")]
        for phase, count in enumerate(earlier):
            admitted = np.flatnonzero(self._admits(phase, order))
            order = np.delete(order, admitted[:count])
        return order[self._admits(len(earlier), order)]

    def _admits(self, phase: int, ids: np.ndarray) -> np.ndarray:
        limit = self._limits[phase]
        return np.ones(len(ids), bool) if limit is None else self.seqlens[ids] <= limit

    def _sorts(self, epoch: int) -> bool:
        return self._short_first and epoch == 0

    def _permuted(self, epoch: int, places: np.ndarray) -> np.ndarray:
        return permute(places, self.size, key=stable_hash(self._seed, self._number, epoch))


class Cursor:
    """Walks a stream one sequence at a time: `id` and `seqlen` are those of the next one."""

    def __init__(self, stream: Stream, epoch: int, taken: list[int]) -> None:
        self._stream, self._epoch, self._taken = stream, epoch, taken
        self._window = _WINDOW
        self._look_up()

    @property
    def state(self) -> StreamState:
        """The stream's state at this place."""
        return (self._epoch, *self._taken)

    def advance(self) -> bool:
        """Move on by one sequence; returns whether a new epoch has begun."""
        epoch = self._epoch
        self._taken[-1] += 1
        self._next += 1
        if self._next < len(self._ids):
            self._set()
        else:
            self._look_up()
        return self._epoch != epoch

    def _look_up(self) -> None:
        """Fetch the next ids; at the end of the epoch, those of the next one."""
        while True:
            start = self._taken[-1]
            ids = self._stream.ids(self._epoch, self._taken, start, start + self._window)
            if len(ids):
                break
            self._epoch, self._taken = self._epoch + 1, [0] * len(self._taken)
        self._window *= 2
        self._ids, self._seqlens = ids.tolist(), self._stream.seqlens[ids].tolist()
        self._next = 0
        self._set()

    def _set(self) -> None:
        self.id, self.seqlen = self._ids[self._next], self._seqlens[self._next]
