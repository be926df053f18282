"""MixtureSampler: global batches from several sources, in given proportions, short ones first.

Like `Sampler`, a pure function of a position: rank, world size and history play no part. Each
source has its own shuffled order and its own epochs, so a small one with a large weight starts over
while a large one is still in its first epoch.

The next sequence comes from the source that worst-case fair weighted fair queueing chooses (WF2Q,
Bennett and Zhang, INFOCOM 1996): of the sources that have received at most their share so far, the
one whose next sequence is due first. Costs and weights are integers, so nothing is rounded.

`limits` lengthen the context: from batch b on, sequences of at most so many tokens. Longer ones are
neither cut nor lost, but deferred: they follow once a limit admits them. If a source runs out of
admitted sequences before, it starts a new epoch with those.

Invariants, each with a test of the same name in tests/data/test_mixture.py:

* proportions_hold_at_every_prefix  each source is within one sequence of its share (one longest
                                    sequence, when shares are of tokens)
* each_source_repeats_on_its_own    within a source's epoch each admitted sequence comes once
* limits_are_kept                   no batch has a sequence over its limit; deferred ones come later
* position_determines_batch         batch_at(position) is the same in any process
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from .sampler import count_batches, different_data, lengths_crc32
from .stream import Stream, StreamState

# (batches before, state of each source, sequences or tokens taken from each source)
MixturePosition = tuple[int, tuple[StreamState, ...], tuple[int, ...]]


class MixtureSampler:
    """Global batches forever.

    Args:
        sources: the lengths of each source's sequences, (n,) integers each. Ids count through all
            sources in this order.
        weights: one positive number per source, of any sum; None: a single source.
        by: what the weights are shares of, "sequences" or "tokens".
        seed, batch_tokens: as for `Sampler`.
        short_first: the first epoch of each source goes from short to long sequences.
        limits: (batch, tokens) pairs, ascending, from batch 0 on; () for no limit.

    With one source no batch spans two epochs; in a mixture the sources' epochs end anywhere. Raises
    ValueError for an empty source, for weights that are not positive, for limits that are not
    ascending, and for a limit that admits no sequence of a source.
    """

    def __init__(
        self,
        sources: Sequence[np.ndarray],
        *,
        batch_tokens: int,
        weights: Sequence[float] | None = None,
        by: str = "sequences",
        seed: int = 0,
        short_first: bool = False,
        limits: Sequence[tuple[int, int]] = (),
    ) -> None:
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if by not in ("sequences", "tokens"):
            raise ValueError(f"by={by!r} must be 'sequences' or 'tokens'")
        if len(weights) != len(sources) or not sources:
            raise ValueError(f"{len(weights)} weights for {len(sources)} sources: give one each")
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights {weights} must be above 0: leave out a source of weight 0")
        if batch_tokens < 1 or seed < 0:
            raise ValueError(f"batch_tokens={batch_tokens} must be at least 1, seed={seed} 0")
        _check_limits(limits)
        self._budget, self._seed, self._by = batch_tokens, seed, by
        self._limits = [(int(start), int(limit)) for start, limit in limits]
        self._starts = [start for start, _ in limits] or [0]
        self._short_first = short_first
        self._streams = [
            Stream(
                seqlens,
                seed=seed,
                number=i,
                short_first=short_first,
                limits=[limit for _, limit in limits] or [None],
            )
            for i, seqlens in enumerate(sources)
        ]
        self._first_ids = [0, *np.cumsum([len(s) for s in sources]).tolist()]
        shares = [Fraction(repr(float(weight))) for weight in weights]
        scale = math.lcm(*(share.denominator for share in shares))
        self.weights = [int(share * scale) for share in shares]  # integers in the same proportions
        common = math.lcm(*self.weights)
        self._dues = [common // weight for weight in self.weights]
        self.position = self._start()

    def batch_at(self, position: Any) -> tuple[np.ndarray, MixturePosition]:
        """The batch at `position` and the position of the next one.

        Returns ((num_seqs,) int64 sequence ids, position). Does not move the sampler. Raises
        ValueError for a position outside of this data.
        """
        batch, states, taken = self._checked(position)
        phase = bisect_right(self._starts, batch) - 1
        cursors = [s.cursor(state, phase) for s, state in zip(self._streams, states, strict=True)]
        used, num_tokens = list(taken), 0
        ids: list[int] = []
        while True:
            source = self._next_source(used, [cursor.seqlen for cursor in cursors])
            cursor = cursors[source]
            if ids and num_tokens + cursor.seqlen > self._budget:
                break
            ids.append(self._first_ids[source] + cursor.id)
            num_tokens += cursor.seqlen
            used[source] += cursor.seqlen if self._by == "tokens" else 1
            if cursor.advance() and len(cursors) == 1:
                break
        after = (batch + 1, tuple(cursor.state for cursor in cursors), tuple(used))
        return np.array(ids, dtype=np.int64), after

    def __iter__(self) -> Iterator[np.ndarray]:
        """Batches from `position` on, without end; each one advances the position."""
        while True:
            ids, self.position = self.batch_at(self.position)
            yield ids

    def num_steps(self, epochs: float, position: Any = None) -> int:
        """Number of batches from `position` (None: the start) until `epochs` epochs are done.

        An epoch of one source has each admitted sequence once. An epoch of a mixture has as many
        sequences (tokens, if weights are shares of tokens) as its sources have together. Walks
        through all of these batches.
        """
        return count_batches(self, self._start() if position is None else position, epochs)

    def steps_left(self, epochs: float) -> int:
        """Number of batches from the current position until `epochs` epochs are done."""
        return self.num_steps(epochs, self.position)

    def epochs_done(self, position: Any) -> float:
        """How many epochs lie before `position`; see `num_steps`."""
        _, _, taken = self._checked(position)
        if len(self._streams) == 1:
            return self.epochs_by_source(position)[0]
        by_tokens = self._by == "tokens"
        return sum(taken) / sum(s.num_tokens if by_tokens else s.size for s in self._streams)

    def epochs_by_source(self, position: Any) -> list[float]:
        """How many times each source was seen before `position`."""
        _, states, _ = self._checked(position)
        return [s.epochs_done(state) for s, state in zip(self._streams, states, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The position, and what identifies the data it belongs to (JSON)."""
        return {"position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move to a saved position. The budget may differ from the saved run's.

        Raises ValueError if the sequences, weights, seed or order differ from the saved run's.
        """
        different_data(state, self._identity())
        position = self._checked(state["position"])
        self.batch_at(position)
        self.position = position

    def _start(self) -> MixturePosition:
        return 0, tuple((0, 0) for _ in self._streams), (0,) * len(self._streams)

    def _next_source(self, used: list[int], seqlens: list[int]) -> int:
        """WF2Q over the sources' next sequences: eligible ones, earliest due time first."""
        if len(used) == 1:
            return 0
        total, all_weights = sum(used), sum(self.weights)
        costs = seqlens if self._by == "tokens" else [1] * len(used)
        eligible = (i for i, w in enumerate(self.weights) if used[i] * all_weights <= w * total)
        return min(eligible, key=lambda i: (used[i] + costs[i]) * self._dues[i])

    def _checked(self, position: Any) -> MixturePosition:
        """A position, also one from JSON, with tuples of integers."""
        try:
            batch, states, taken = position
            states = tuple(tuple(int(x) for x in state) for state in states)
            taken, batch = tuple(int(x) for x in taken), int(batch)
            fits = len(states) == len(taken) == len(self._streams) and batch >= 0
        except (TypeError, ValueError):
            fits = False
        if not fits or not all(
            stream.contains(state) for stream, state in zip(self._streams, states, strict=True)
        ):
            raise ValueError(
                f"position {position} is out of range for {len(self._streams)} sources; it belongs "
                "to other data: resume with that"
            )
        return batch, states, taken

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "num_sequences": [stream.size for stream in self._streams],
            "seqlens_crc32": [lengths_crc32(stream.seqlens) for stream in self._streams],
            "weights": self.weights,
            "by": self._by,
            "short_first": self._short_first,
            "limits": [list(pair) for pair in self._limits],
        }


def _check_limits(limits: Sequence[tuple[int, int]]) -> None:
    starts, tokens = [start for start, _ in limits], [limit for _, limit in limits]
    if not limits:
        return
    if starts[0] != 0 or sorted(set(starts)) != starts or sorted(set(tokens)) != tokens:
        raise ValueError(
            f"limits {list(limits)} must start at batch 0, and batches and tokens must ascend"
        )
