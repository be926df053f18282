"""ByteScale's own policies: naive HDP (Algorithm 1) and the balance scheduler (Algorithm 2).

Both give a sequence D(s) ranks, the fewest that memory allows, and pack short ones by best fit.

    bytescale-naive  Algorithm 1: no balance
    bytescale-dp     Algorithm 2, DP-balance: longest first, to the least loaded ranks
    bytescale-pp     Algorithm 2, PP-balance: draws from all buckets in turn
    bytescale        Algorithm 2 as in the paper: PP-balance with pipeline stages, else DP-balance

Choices that the paper leaves open:

* Algorithm 1's "assign": time steps of hdp_size ranks are filled in batch order, each unit on
  contiguous ranks of the first time step with room (as in the paper's Fig. 8).
* The first iteration of Algorithm 2, when no rank is behind: all ranks are targets.
* Fewer targets than D(s): the next least loaded ranks join them, and all start together.
* delta is 0, and ties go to the lower rank. There are NUM_BUCKETS buckets of equal work.
* The paper's policies know no nodes: a ring takes the ranks that its algorithm names, whatever
  `ranks_per_node`, and one that spans nodes is priced at the slower link.
* Rings are gathered where that is faster, as under every policy (to_step_plan.py).
* With pp_size > 1 a shared microbatch has one local index; ranks that are behind get empty
  microbatches.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from hdp.scheduler.step_plan import StepPlan

from .batch import Batch, check_size
from .memory import min_degrees
from .packing import best_fit
from .to_step_plan import assemble

NUM_BUCKETS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Units:
    """What both algorithms assign, in batch order: long jobs and packs of short ones."""

    unit_of_job: np.ndarray  # (num_jobs,) int64
    degree: np.ndarray  # (num_units,) int64
    seconds: np.ndarray  # (num_units,) float64, on each of its ranks
    longest: np.ndarray  # (num_units,) int64, tokens of its longest job


def plan_naive(batch: Batch) -> StepPlan:
    """Algorithm 1: D(s) ranks each, short jobs packed, time steps filled in order."""
    units = _units(batch)
    # 3. Assign by map_d, without balance: first fit into time steps of hdp_size ranks.
    filled: list[int] = []
    first_open = 0
    rings, index = [], []
    for degree in units.degree.tolist():
        step = first_open
        while step < len(filled) and filled[step] + degree > batch.hdp_size:
            step += 1
        if step == len(filled):
            filled.append(0)
        ranks = np.arange(filled[step], filled[step] + degree)
        filled[step] += degree
        while first_open < len(filled) and filled[first_open] == batch.hdp_size:
            first_open += 1
        rings.append(ranks)
        index.append(np.full(degree, step))
    return _build(batch, units, rings, index, "bytescale-naive")


def plan_dp_balance(batch: Batch) -> StepPlan:
    """Algorithm 2, drawing from the first bucket that is not empty."""
    return _balance(batch, pipeline=False)


def plan_pp_balance(batch: Batch) -> StepPlan:
    """Algorithm 2, drawing from all buckets in turn."""
    return _balance(batch, pipeline=True)


def plan_bytescale(batch: Batch) -> StepPlan:
    """PP-balance with pipeline stages, otherwise DP-balance."""
    return _balance(batch, pipeline=batch.pp_size > 1)


def _balance(batch: Batch, *, pipeline: bool) -> StepPlan:
    units = _units(batch)
    # 1. No microbatches, no time.
    exec_s = np.zeros(batch.hdp_size)
    depth = np.zeros(batch.hdp_size, dtype=np.int64)
    none = np.empty(0, dtype=np.int64)
    rings, index = [none] * len(units.degree), [none] * len(units.degree)
    # 2. Sort by length, longest first, and cut into buckets of equal work.
    order = np.argsort(-units.longest, kind="stable")
    work = np.cumsum((units.seconds * units.degree)[order])
    edges = work[-1] * np.arange(1, NUM_BUCKETS) / NUM_BUCKETS
    cut = np.split(order, np.searchsorted(work, edges))
    buckets = [deque(bucket.tolist()) for bucket in cut if len(bucket)]
    # 3. While sequences remain, draw one and give it to the least loaded ranks.
    turn = 0
    while buckets:
        turn = turn % len(buckets) if pipeline else 0
        unit = buckets[turn].popleft()
        degree = int(units.degree[unit])
        ranks = np.sort(np.argsort(exec_s, kind="stable")[:degree])
        exec_s[ranks] = exec_s[ranks].max() + units.seconds[unit] + batch.cost.fixed_s
        if batch.same_index:
            depth[ranks] = depth[ranks].max()
        rings[unit], index[unit] = ranks, depth[ranks]
        depth[ranks] += 1
        if not buckets[turn]:
            del buckets[turn]
        else:
            turn += 1
    return _build(batch, units, rings, index, "bytescale-pp" if pipeline else "bytescale-dp")


def _units(batch: Batch) -> _Units:
    """Steps 1 and 2 of Algorithm 1: D(s) and r of long jobs, best-fit packs of short ones."""
    # 1. Eq. 3 for jobs that do not fit on one rank.
    degree = min_degrees(batch)
    check_size(batch, batch.by_seq(degree))
    tokens = batch.job_tokens
    long = tokens > batch.max_tokens_per_rank
    # 2. Pack the others up to the capacity; a pack takes the place of its first job.
    pack = np.full(batch.num_jobs, -1)
    pack[~long] = best_fit(tokens[~long], batch.max_tokens_per_rank)
    key = np.where(long, np.arange(batch.num_jobs), 0)
    _, first = np.unique(pack[~long], return_index=True)
    key[~long] = np.flatnonzero(~long)[first][pack[~long]]
    firsts, unit_of_job = np.unique(key, return_inverse=True)
    seconds = batch.seconds(degree)
    longest = np.zeros(len(firsts), dtype=np.int64)
    np.maximum.at(longest, unit_of_job, tokens)
    return _Units(
        unit_of_job=unit_of_job,
        degree=degree[firsts],
        seconds=np.bincount(unit_of_job, weights=seconds),
        longest=longest,
    )


def _build(
    batch: Batch, units: _Units, rings: list[np.ndarray], index: list[np.ndarray], policy: str
) -> StepPlan:
    unit = batch.by_seq(units.unit_of_job)
    degree = units.degree[unit]
    return assemble(
        batch,
        policy=policy,
        degree=degree,
        ring_ranks=np.concatenate([rings[u] for u in unit.tolist()]),
        index=np.concatenate([index[u] for u in unit.tolist()]),
    )
