"""StepPlan: which ranks run which sequences in which order, for one training step.

A plan is plain data, computed from sequence lengths alone. A sequence is a *piece* of one or more
microbatches: it lives on the ranks of its ring, in ring order (one rank: a local piece). Each rank
runs its own list of microbatches; lists differ in length and content. A microbatch with a piece on
several ranks starts when all of them reach it. A ring passes keys around or is gathered: the plan
says which, because ranks that ran different algorithms would wait for each other forever.

Invariants, checked by `StepPlan.validate()` (each has a test of its name in
tests/scheduler/test_validate.py):

* every_token_once      each sequence sits once on each rank of its ring and nowhere else
* capacity_kept         the tokens of a (rank, microbatch), with the real uneven chunks and minus
                        what its offload ratio moves to the host, are <= max_tokens_per_rank
* one_ring_each         the multi-rank pieces of a (rank, microbatch) come first and share one ring,
                        and all ranks of that ring hold the same ones in the same order (hdp plans
                        have at most one such piece, or one unit; packed zigzag has several)
* gathered_alone        a gathered sequence is on several ranks, and alone on its ring
* acyclic_order         the order in which ranks meet in rings has no cycle: no deadlock
* same_index_under_pp   with pp_size > 1 a shared microbatch has the same local index on all ranks
* aligned_as_promised   with `aligned` that holds too, and all ranks have equally many microbatches
* no_rank_without_work  every rank has at least one microbatch (it may be empty)

Storage is columnar (numpy, CSR offsets) so that 100,000 sequences on 10,000 ranks stay cheap;
`microbatches(rank)` makes objects for one rank on demand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .plain import item, whole
from .plan_json import fields_of, offsets_of, text_of
from .zigzag import rank_tokens

_DIGEST_VERSION = 2  # of the columns; the JSON text has a version of its own (plan_json.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One sequence and the ranks that hold it, in ring order."""

    seq: int  # index into StepPlan.seqlens
    seqlen: int  # tokens of the whole sequence
    ranks: tuple[int, ...]

    @property
    def degree(self) -> int:
        """Ranks that hold the sequence."""
        return len(self.ranks)

    def num_tokens(self, rank: int) -> int:
        """Tokens of this piece on `rank`."""
        return int(rank_tokens(self.seqlen, self.degree, self.ranks.index(rank)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """What one rank runs at once: pieces of at most one ring, then local ones. May be empty."""

    pieces: tuple[Piece, ...] = ()
    gathered: bool = (
        False  # whether the ring fetches all keys at once instead of passing them around
    )
    offload_ratio: float = 0.0  # share of the tokens whose activations go to the host, [0, 1]

    @property
    def ring(self) -> tuple[int, ...]:
        """Ranks of the multi-rank pieces, in ring order; () when all pieces are local."""
        return self.pieces[0].ranks if self.pieces and self.pieces[0].degree > 1 else ()

    def num_tokens(self, rank: int) -> int:
        """Tokens of all pieces on `rank`."""
        return sum(piece.num_tokens(rank) for piece in self.pieces)


def _frozen(name: str, values: Any, dtype: type) -> np.ndarray:
    """A read-only column. Raises ValueError for values that the dtype cannot hold exactly."""
    try:
        given = np.asarray(values)
    except (ValueError, OverflowError) as error:  # lists of unequal lengths
        raise ValueError(f"{name} must be a list of numbers: {error}") from None
    if given.dtype == dtype and given.flags.c_contiguous and not given.flags.writeable:
        return given
    if given.size and given.dtype.kind not in ("iufb" if dtype is np.bool_ else "iuf"):
        raise ValueError(f"{name} must be numbers, got {given.dtype}")
    column: np.ndarray = np.array(given, dtype=dtype, order="C", ndmin=1)
    if given.dtype != dtype and not np.array_equal(column, given.reshape(column.shape)):
        bad = int(np.flatnonzero(column != given.ravel())[0])
        raise ValueError(
            f"{name}[{bad}] is {given.ravel()[bad]}, which does not fit in {column.dtype}"
        )
    column.setflags(write=False)
    return column


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """Which ranks hold which sequences, in which microbatches, in one step; built by `plan`.

    Columns, with CSR offsets:

    sequence s is on ranks   ring_ranks[ring_offsets[s]:ring_offsets[s + 1]], in ring order
    rank r runs microbatches microbatch_offsets[r] .. microbatch_offsets[r + 1] - 1, in this order
    microbatch m holds       piece_seqs[piece_offsets[m]:piece_offsets[m + 1]], ring pieces first
    """

    policy: str
    hdp_size: int
    max_tokens_per_rank: int
    pp_size: int = 1
    aligned: bool = False  # promises equal counts and rings at one local index on all their ranks
    seqlens: np.ndarray  # (num_seqs,) int64, tokens
    ring_offsets: np.ndarray  # (num_seqs + 1,) int64
    ring_ranks: np.ndarray  # (sum of degrees,) int32
    microbatch_offsets: np.ndarray  # (hdp_size + 1,) int64
    piece_offsets: np.ndarray  # (num_microbatches + 1,) int64
    piece_seqs: np.ndarray  # (num_pieces,) int32
    gathered: np.ndarray  # (num_seqs,) bool, whether the sequence's ring is gathered
    offload_ratio: np.ndarray  # (num_microbatches,) float64
    offloadable: float = 0.0  # offloadable share of a token's activation bytes, [0, 1)
    predicted_s: float = float("nan")  # planner's finishing time of the step, seconds
    lower_bound_s: float = float("nan")  # no plan can finish earlier, seconds
    ranks_per_node: int | None = None  # topology of the plan; None: all links are alike
    notes: dict[str, Any] = field(default_factory=dict)  # planner's remarks

    def __post_init__(self) -> None:
        for name in _SCALARS:  # a numpy scalar would change the digest, and JSON cannot hold it
            object.__setattr__(self, name, item(getattr(self, name)))
        for name, dtype in _COLUMNS.items():
            object.__setattr__(self, name, _frozen(name, getattr(self, name), dtype))

    # ---- reading ----

    @property
    def num_seqs(self) -> int:
        """Sequences of the step."""
        return len(self.seqlens)

    @property
    def num_microbatches(self) -> np.ndarray:
        """(hdp_size,) int64: microbatches of each rank."""
        return np.diff(self.microbatch_offsets)

    @property
    def degrees(self) -> np.ndarray:
        """(num_seqs,) int64: ranks per sequence."""
        return np.diff(self.ring_offsets)

    @property
    def gap(self) -> float:
        """Predicted time above the lower bound: 0.02 is 2%. NaN for plans without predictions."""
        return self.predicted_s / self.lower_bound_s - 1.0

    def ring(self, seq: int) -> tuple[int, ...]:
        """The ranks that hold sequence `seq`, in ring order."""
        return tuple(self.ring_ranks[self.ring_offsets[seq] : self.ring_offsets[seq + 1]].tolist())

    def microbatches(self, rank: int) -> list[Microbatch]:
        """The microbatches of one rank, in execution order."""
        rank = whole("rank", rank, low=0)
        if rank >= self.hdp_size:
            raise ValueError(f"rank {rank} is not in a plan for hdp_size={self.hdp_size}")
        result = []
        for m in range(self.microbatch_offsets[rank], self.microbatch_offsets[rank + 1]):
            seqs = self.piece_seqs[self.piece_offsets[m] : self.piece_offsets[m + 1]].tolist()
            pieces = tuple(
                Piece(seq=s, seqlen=int(self.seqlens[s]), ranks=self.ring(s)) for s in seqs
            )
            microbatch = Microbatch(
                pieces=pieces,
                gathered=bool(seqs) and bool(self.gathered[seqs[0]]),
                offload_ratio=float(self.offload_ratio[m]),
            )
            result.append(microbatch)
        return result

    @cached_property
    def microbatch_ranks(self) -> np.ndarray:
        """(num_microbatches,) int64: the rank that runs each microbatch."""
        return np.repeat(np.arange(self.hdp_size), self.num_microbatches)

    @cached_property
    def piece_tokens(self) -> np.ndarray:
        """(num_pieces,) int64: tokens of each piece on the rank of its microbatch."""
        piece_ranks = np.repeat(self.microbatch_ranks, np.diff(self.piece_offsets))
        position = self._positions(self.piece_seqs, piece_ranks)
        return rank_tokens(self.seqlens[self.piece_seqs], self.degrees[self.piece_seqs], position)

    @cached_property
    def microbatch_tokens(self) -> np.ndarray:
        """(num_microbatches,) int64: tokens of each microbatch."""
        sums = np.concatenate([[0], np.cumsum(self.piece_tokens)])
        return sums[self.piece_offsets[1:]] - sums[self.piece_offsets[:-1]]

    @cached_property
    def ends_together(self) -> bool:
        """Whether every ring's microbatch is the last one on all of its ranks or on none.

        If so, no rank waits for a partner that is in its last microbatch unless it is in its own,
        so gradients may be reduced during the backward of the last microbatches.
        """
        is_last = np.zeros(len(self.offload_ratio), dtype=bool)
        is_last[self.microbatch_offsets[1:] - 1] = True
        ends = np.repeat(is_last, np.diff(self.piece_offsets))
        num_ends = np.bincount(self.piece_seqs[ends], minlength=self.num_seqs)
        return bool(((num_ends == 0) | (num_ends == self.degrees)).all())

    def _positions(self, seqs: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Ring position of `ranks[i]` in the ring of sequence `seqs[i]`; -1 if not in it."""
        owner = np.repeat(np.arange(self.num_seqs), self.degrees)
        key = owner * self.hdp_size + self.ring_ranks
        order = np.argsort(key, kind="stable")
        want = seqs.astype(np.int64) * self.hdp_size + ranks
        if not len(key):
            return np.full(len(want), -1)
        at = np.minimum(np.searchsorted(key[order], want), len(key) - 1)
        found = order[at]
        position = found - self.ring_offsets[seqs]
        return np.where(key[found] == want, position, -1)

    # ---- identity ----

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what ranks must agree on (no predictions or notes): same digest, same step."""
        scalars = (self.hdp_size, self.max_tokens_per_rank, self.pp_size, self.offloadable)
        sha = hashlib.sha256(f"{_DIGEST_VERSION}|{scalars}".encode())
        for name in _COLUMNS:
            column = getattr(self, name)
            sha.update(f"|{name}:{len(column)}|".encode())
            sha.update(column.tobytes())
        return sha.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepPlan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    # ---- construction, JSON ----

    @classmethod
    def from_lists(
        cls,
        seqlens: Sequence[int],
        rings: Sequence[Sequence[int]],
        microbatches: Sequence[Sequence[Sequence[int]]],
        *,
        gathered: Sequence[bool] | None = None,
        offload_ratio: Sequence[Sequence[float]] | None = None,
        **fields: Any,
    ) -> StepPlan:
        """Build a plan from plain lists.

        `rings[s]` are the ranks of sequence s in ring order and `gathered[s]` whether its ring is
        gathered, `microbatches[r][i]` the sequences of rank r's i-th microbatch, ring pieces first,
        and `offload_ratio[r][i]` its ratio. By default no ring is gathered and ratios are 0.
        `hdp_size` is `len(microbatches)`; `max_tokens_per_rank` and the other fields by keyword.
        """
        flat = [seqs for rank in microbatches for seqs in rank]
        ratio = [0.0] * len(flat)
        if offload_ratio is not None:
            ratio = [x for rank in offload_ratio for x in rank]
        fields.setdefault("policy", "custom")
        return cls(
            hdp_size=len(microbatches),
            seqlens=np.asarray(seqlens),
            ring_offsets=offsets_of(rings),
            ring_ranks=np.asarray([r for ring in rings for r in ring]),
            microbatch_offsets=offsets_of(microbatches),
            piece_offsets=offsets_of(flat),
            piece_seqs=np.asarray([s for seqs in flat for s in seqs]),
            gathered=np.asarray([False] * len(seqlens) if gathered is None else gathered),
            offload_ratio=np.asarray(ratio),
            **fields,
        )

    def to_json(self) -> str:
        """JSON text with plain numbers; its size grows with the pieces of the plan (plan_json.py).

        {"version": 3, "policy": "hdp", "hdp_size": 2, "pp_size": 1, "max_tokens_per_rank": 8,
         "aligned": false, "offloadable": 0.0, "ranks_per_node": null, "predicted_s": 0.1,
         "lower_bound_s": 0.1, "notes": {}, "seqlens": [10, 3], "rings": [[[0, 2]], [[0, 1]]],
         "gathered": [], "ranks": [[[0, 1]], [[0]]], "offload_ratio": null}

        `rings` has runs [first rank, number of ranks] for each sequence, `ranks` the microbatches
        of each rank, as lists of sequences. Raises ValueError for notes that JSON cannot hold.
        """
        return text_of(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> StepPlan:
        """Inverse of `to_json`. Raises ValueError for text that is not a plan of this or an earlier
        version; whether the plan can run, `validate` says."""
        return cls(**fields_of(text))

    def validate(self) -> StepPlan:
        """Check every invariant of the module docstring and return self.

        Raises ValueError that names the first one that fails, and where.
        """
        from .validate import validate_plan

        validate_plan(self)
        return self


_COLUMNS: dict[str, type] = {
    "seqlens": np.int64,
    "ring_offsets": np.int64,
    "ring_ranks": np.int32,
    "microbatch_offsets": np.int64,
    "piece_offsets": np.int64,
    "piece_seqs": np.int32,
    "gathered": np.bool_,
    "offload_ratio": np.float64,
}
_SCALARS = (
    *("hdp_size", "max_tokens_per_rank", "pp_size", "aligned", "offloadable", "predicted_s"),
    *("lower_bound_s", "ranks_per_node"),
)
