"""Groups for other runtimes: powers of two, on contiguous ranks, all ranks in every microbatch.

Megatron's development branch and verl require more of a plan than our runtime does: every rank has
a sequence in every microbatch, the ranks of a context-parallel group hold the same sequences, and a
group is 2^k contiguous ranks (or all) whose first is a multiple of its size
(`test_groups_keep_the_contract`). That costs little: see `test_groups_are_near_the_ideal`.

The algorithm, where a *bin* is one group of ranks in one microbatch:

1. Choose the number of microbatches (the fewest that memory allows, then a few more) and a time per
   bin. A sequence's degree is the smallest that fits memory and that time.
2. Long sequences, longest first, open bins or join the emptiest bin of their degree.
3. The rest goes, longest first, to the earliest-ending bin that has room: either any bin, or only
   the narrowest ones, which need no communication.
4. Ranks of empty bins go to other bins of the microbatch, which become wider.
5. The bins of a microbatch are assigned to blocks of ranks, the longest to the least loaded block.
6. The choice of step 1 with the earliest finish wins; the search stops within 0.5 % of ideal.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from hdp.scheduler.costs.cost_model import CostModel

# Attention and the rest of a layer of a 7B model; only their ratio matters here.
DEFAULT_COST = CostModel.from_coefficients(quadratic_s=5.128e-9, linear_s=1.84e-4)
_SLACK = (1.0, 1.04, 1.1, 1.25, 1.5, 2.0)
_MORE_MICROBATCHES = (0, 1, 2, 4)
_GOOD_ENOUGH = 1.005  # of perfectly spread work: stop searching

Groups = list[list[list[int]]]  # [microbatch][rank][ids]


@dataclass(slots=True, kw_only=True)
class _Bin:
    """One group of ranks in one microbatch."""

    degree: int
    wave: int  # microbatch
    seconds: float = 0.0
    tokens: int = 0  # per rank
    members: list[int] = field(default_factory=list)
    first: int = 0  # first rank


_Queue = list  # [seconds, bin, bin, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    seqlens: np.ndarray  # (n,) int64
    degrees: tuple[int, ...]  # allowed group sizes, rising; all but perhaps the last powers of two
    seconds: np.ndarray  # (len(degrees), n): seconds on each rank of a group
    num_ranks: int
    capacity: int  # tokens per rank and microbatch
    fixed_s: float


def power_of_two_groups(
    sample_id_seqlens: Sequence[tuple[int, int]],
    *,
    num_ranks: int,
    max_tokens_per_rank: int,
    cost: CostModel = DEFAULT_COST,
    min_degree: int = 1,
    multiple: int = 1,
) -> Groups:
    """[microbatch][rank][ids]: aligned groups of 2^k contiguous ranks (or of all), none empty.

    sample_id_seqlens: (id, tokens) each; min_degree: smallest group; multiple: the number of
    microbatches is a multiple of it. Raises ValueError with the values if something cannot fit.
    """
    ids, lengths = ids_and_lengths(sample_id_seqlens)
    problem = _problem(lengths, num_ranks, max_tokens_per_rank, cost, min_degree)
    fewest = max(1, -(-int(lengths.sum()) // (num_ranks * max_tokens_per_rank)))
    best: tuple[float, Groups] | None = None
    ideal_s = float((problem.seconds[0] * problem.degrees[0]).sum()) / num_ranks
    count = fewest
    tried = 0
    while tried < len(_MORE_MICROBATCHES) or best is None:
        extra = _MORE_MICROBATCHES[min(tried, len(_MORE_MICROBATCHES) - 1)]
        count = max(count + (tried >= len(_MORE_MICROBATCHES)), fewest + extra)
        count = -(-count // multiple) * multiple
        for slack, share_wide in product(_SLACK, (False, True)):
            bins = _fill(problem, count, slack * ideal_s / count, share_wide)
            if bins is None:
                continue
            end_s, groups = _deal(problem, bins)
            if len(groups) % multiple == 0 and (best is None or end_s < best[0] * (1 - 1e-9)):
                best = (end_s, groups)
            if best is not None and best[0] <= _GOOD_ENOUGH * ideal_s:
                return _with_ids(best[1], ids)
        tried += 1
        if best is None and tried > 4 * len(lengths) + 64:
            raise ValueError(
                f"{len(lengths)} sequences cannot fill {num_ranks} ranks in a number of "
                f"microbatches that is a multiple of {multiple}; give more sequences"
            )
    return _with_ids(best[1], ids)


def _with_ids(groups: Groups, ids: Sequence[int]) -> Groups:
    return [[[ids[s] for s in rank] for rank in wave] for wave in groups]


def ids_and_lengths(samples: Sequence[tuple[int, int]]) -> tuple[list[int], np.ndarray]:
    if not len(samples):
        raise ValueError("no samples: give at least one (id, length)")
    for sample in samples:
        if len(sample) != 2 or int(sample[1]) != sample[1]:
            raise ValueError(f"{sample!r} is not an (id, number of tokens) pair")
    ids = [sample[0] for sample in samples]
    if len(set(ids)) < len(ids):
        twice = next(name for i, name in enumerate(ids) if name in ids[:i])
        raise ValueError(f"two samples have id {twice!r}; ids must be unique")
    lengths = np.array([int(sample[1]) for sample in samples], dtype=np.int64)
    if lengths.min() < 1:
        at = int(np.argmin(lengths))
        raise ValueError(f"sample {ids[at]} has {lengths[at]} tokens; drop empty samples")
    return ids, lengths


def _problem(
    lengths: np.ndarray, num_ranks: int, capacity: int, cost: CostModel, min_degree: int
) -> _Problem:
    for name, value in (("ranks", num_ranks), ("max_tokens_per_rank", capacity)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if min_degree < 1 or min_degree & (min_degree - 1) or num_ranks % min_degree:
        raise ValueError(
            f"min_cp_size={min_degree} must be a power of two that divides {num_ranks} ranks"
        )
    degrees = [min_degree]
    while degrees[-1] * 2 <= num_ranks:
        degrees.append(degrees[-1] * 2)
    if degrees[-1] != num_ranks:
        degrees.append(num_ranks)
    longest = int(lengths.max())
    if longest > num_ranks * capacity:
        raise ValueError(
            f"sequence of {longest} tokens needs {-(-longest // capacity)} ranks of {capacity}, "
            f"there are {num_ranks}; raise max_tokens_per_rank or the number of ranks"
        )
    return _Problem(
        seqlens=lengths,
        degrees=tuple(degrees),
        seconds=np.stack([cost.piece_s(lengths, d) for d in degrees]),
        num_ranks=num_ranks,
        capacity=capacity,
        fixed_s=cost.fixed_s,
    )


def _fill(problem: _Problem, count: int, target_s: float, share_wide: bool) -> list[_Bin] | None:
    """Steps 1 to 4 for `count` microbatches of `target_s`; None if not everything fits.

    share_wide: short sequences may also fill up wide groups, where they cost communication.
    """
    degrees, capacity = problem.degrees, problem.capacity
    # 1. The smallest degree that fits memory and time, else the fastest that fits memory.
    need = -(-problem.seqlens // np.array(degrees)[:, None])
    fits = need <= capacity
    good = fits & (problem.seconds <= target_s)
    fastest = np.argmin(np.where(fits, problem.seconds, np.inf), axis=0)
    level = np.where(good.any(axis=0), np.argmax(good, axis=0), fastest)
    order = np.lexsort((-problem.seqlens, -level)).tolist()
    free = [problem.num_ranks] * count  # ranks of each microbatch without a bin
    bins: list[_Bin] = []
    at_level: list[list[tuple[float, int]]] = [[] for _ in degrees]
    rest: list[int] = []
    seconds, levels, needs = problem.seconds, level.tolist(), need
    # 2. Long sequences.
    for seq in order:
        k = levels[seq]
        if k == 0:
            rest.append(seq)
            continue
        heap, own_s = at_level[k], float(seconds[k, seq])
        if heap:
            load_s, b = heap[0]
            room = bins[b].tokens + needs[k, seq] <= capacity
            if room and load_s + own_s <= target_s:
                heapq.heapreplace(heap, (_put(bins[b], seq, own_s, int(needs[k, seq])), b))
                continue
        wave = next((w for w, ranks in enumerate(free) if ranks >= degrees[k]), None)
        if wave is None:
            rest.append(seq)
            continue
        free[wave] -= degrees[k]
        bins.append(_Bin(degree=degrees[k], wave=wave))
        _put(bins[-1], seq, own_s, int(needs[k, seq]))
        heapq.heappush(heap, (own_s, len(bins) - 1))
    for wave, ranks in enumerate(free):
        bins += [_Bin(degree=degrees[0], wave=wave) for _ in range(ranks // degrees[0])]
    # 3. The rest, by work on the smallest group, longest first.
    rest.sort(key=lambda seq: -int(problem.seqlens[seq]))
    queues = [[bin.seconds, bin] for bin in bins] if share_wide else _by_block(problem, bins)
    if not _fill_rest(problem, queues, rest):
        return None
    # 4. No empty bins.
    return _widen(problem, bins)


def _put(bin: _Bin, seq: int, seconds: float, tokens: int) -> float:
    bin.members.append(seq)
    bin.seconds += seconds
    bin.tokens += tokens
    return bin.seconds


def _by_block(problem: _Problem, bins: list[_Bin]) -> list[_Queue]:
    """The narrowest bins, queued by the ranks that will run them: ranks that long sequences load
    least can then take more."""
    wide = [bin for bin in bins if bin.degree > problem.degrees[0]]
    narrow: dict[int, list[_Bin]] = {}
    for bin in bins:
        if bin.degree == problem.degrees[0]:
            narrow.setdefault(bin.wave, []).append(bin)
    load, free = _place(problem, wide, np.zeros(problem.num_ranks))
    queues: dict[int, _Queue] = {}
    for wave, mine in narrow.items():
        ranks = free.get(wave, np.ones(problem.num_ranks, dtype=bool))
        firsts = np.flatnonzero(ranks)[:: problem.degrees[0]].tolist()
        for first, bin in zip(firsts, mine, strict=True):
            queues.setdefault(first, [float(load[first])]).append(bin)
    return list(queues.values())


def _fill_rest(problem: _Problem, queues: list[_Queue], rest: Sequence[int]) -> bool:
    """Assign each sequence to the least loaded queue that has room for it.

    A queue is a load in seconds and the bins that one group runs one after another.
    """
    level_of = {degree: k for k, degree in enumerate(problem.degrees)}

    def room(bin: _Bin) -> int:
        return (problem.capacity - bin.tokens) * bin.degree

    lightest = [(queue[0], q) for q, queue in enumerate(queues)]
    heapq.heapify(lightest)
    full: list[tuple[int, int]] = []  # queues without room: (-room for a whole sequence, queue)
    for seq in rest:
        length = int(problem.seqlens[seq])
        while full and -full[0][0] >= length:
            q = heapq.heappop(full)[1]
            heapq.heappush(lightest, (queues[q][0], q))
        while lightest:
            load_s, q = lightest[0]
            bin = max(queues[q][1:], key=room)
            if room(bin) >= length:
                break
            heapq.heappop(lightest)
            heapq.heappush(full, (-room(bin), q))
        else:
            return False
        own_s = float(problem.seconds[level_of[bin.degree], seq])
        _put(bin, seq, own_s, -(-length // bin.degree))
        queues[q][0] = load_s + own_s
        heapq.heapreplace(lightest, (load_s + own_s, q))
    return True


def _widen(problem: _Problem, bins: list[_Bin]) -> list[_Bin] | None:
    """Give the ranks of empty bins to other bins of their microbatch."""
    by_wave: dict[int, list[_Bin]] = {}
    for bin in bins:
        if bin.members:
            by_wave.setdefault(bin.wave, []).append(bin)
    result = []
    for wave in by_wave.values():
        free = problem.num_ranks - sum(bin.degree for bin in wave)
        while free > 0:
            candidates = [
                (bin.seconds, i)
                for i, bin in enumerate(wave)
                if bin.degree <= free and _next_degree(problem, bin.degree) <= bin.degree + free
            ]
            if candidates:
                i = max(candidates)[1]
                wider = _next_degree(problem, wave[i].degree)
                free -= wider - wave[i].degree
                wave[i] = _rebuilt(problem, wave[i].members, wider, wave[i].wave)
            else:  # no group can take the free ranks: one group of all ranks takes everything
                members = [seq for bin in wave for seq in bin.members]
                wave[:] = [_rebuilt(problem, members, problem.num_ranks, wave[0].wave)]
                free = 0
        if any(bin.tokens > problem.capacity for bin in wave):
            return None
        result += wave
    return result


def _next_degree(problem: _Problem, degree: int) -> int:
    later = [d for d in problem.degrees if d > degree]
    return later[0] if later else problem.num_ranks + degree


def _rebuilt(problem: _Problem, members: list[int], degree: int, wave: int) -> _Bin:
    k = problem.degrees.index(degree)
    bin = _Bin(degree=degree, wave=wave)
    for seq in members:
        _put(bin, seq, float(problem.seconds[k, seq]), -(-int(problem.seqlens[seq]) // degree))
    return bin


def _place(
    problem: _Problem, bins: list[_Bin], load: np.ndarray
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Step 5: assign bins to blocks of ranks, microbatch by microbatch; sets `bin.first`.

    Returns the ranks' finishing times, and per microbatch the (num_ranks,) bool of ranks left over.
    """
    load = load.copy()
    waves: dict[int, list[_Bin]] = {}
    for bin in bins:
        waves.setdefault(bin.wave, []).append(bin)
    left: dict[int, np.ndarray] = {}
    # Wide groups first: at the start all ranks are in sync.
    for number in sorted(waves, key=lambda w: (-max(bin.degree for bin in waves[w]), w)):
        free = np.ones(problem.num_ranks, dtype=bool)
        for degree in sorted({bin.degree for bin in waves[number]}, reverse=True):
            mine = [bin for bin in waves[number] if bin.degree == degree]
            mine.sort(key=lambda bin: -bin.seconds)
            whole = problem.num_ranks // degree * degree
            open_blocks = np.flatnonzero(free[:whole].reshape(-1, degree).all(axis=1))
            start_s = load[:whole].reshape(-1, degree).max(axis=1)[open_blocks]
            blocks = open_blocks[np.argsort(start_s, kind="stable")].tolist()
            for bin, block in zip(mine, blocks, strict=False):
                bin.first = block * degree
                span = slice(bin.first, bin.first + degree)
                free[span] = False
                load[span] = load[span].max() + bin.seconds + problem.fixed_s
        left[number] = free
    return load, left


def _deal(problem: _Problem, bins: list[_Bin]) -> tuple[float, Groups]:
    """Step 5 for all bins: finishing time and [microbatch][rank][sequences]."""
    load, left = _place(problem, bins, np.zeros(problem.num_ranks))
    groups: dict[int, list[list[int]]] = {w: [[]] * problem.num_ranks for w in left}
    for bin in bins:
        for rank in range(bin.first, bin.first + bin.degree):
            groups[bin.wave][rank] = bin.members
    assert all(not free.any() for free in left.values()), "ranks without a group"
    return float(load.max()), list(groups.values())
