"""Planners for bench_planner.py: ours, simple baselines, and peers if installed.

Only the file with a peer's planner is loaded, unmodified, with stubs for imports that planning does
not use. bench_planner.py explains how each result is timed.
"""

from __future__ import annotations

import contextlib
import heapq
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hdp.scheduler import CostModel, plan
from hdp.scheduler.export.megatron import power_of_two_groups


class Skipped(Exception):
    """A planner that is not installed, or that cannot plan this row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One benchmark row: the input of every planner."""

    seqlens: np.ndarray
    hdp_size: int
    max_tokens_per_rank: int
    cost: CostModel
    ranks_per_node: int | None
    pp_size: int = 1

    def piece_s(self, seqlen: Any, degree: Any) -> Any:
        across = self.ranks_per_node is not None and np.asarray(degree) > self.ranks_per_node
        return self.cost.piece_s(seqlen, degree, across)

    def static_cp_size(self) -> int:
        need = -(-int(self.seqlens.max()) // self.max_tokens_per_rank)
        return next(d for d in range(need, self.hdp_size + 1) if self.hdp_size % d == 0)


PIPELINE_POLICIES = ("hdp", "static", "bytescale-naive", "bytescale-pp")
POLICIES_SHOWN = ("hdp", "static", "bytescale-naive", "bytescale-dp")

# A planner is a pair: one function plans a case (this is timed), the other computes the step time.
Planner = tuple[Callable[[Case], Any], Callable[[Case, Any], float]]


# ---- ours, and simple baselines ----


def _policy(name: str) -> Planner:
    def make(case: Case) -> Any:
        return plan(
            case.seqlens,
            hdp_size=case.hdp_size,
            max_tokens_per_rank=case.max_tokens_per_rank,
            cost=case.cost,
            policy=name,
            ranks_per_node=case.ranks_per_node,
            pp_size=case.pp_size,
        )

    return make, lambda case, step_plan: step_plan.predicted_s


def _greedy(case: Case) -> float:
    """Finishing time of a greedy schedule: longest first, onto the least loaded ranks.

    Degrees follow from work and memory. Not a full planner: it ignores microbatches and topology,
    and considers memory one sequence at a time.
    """
    need = -(-case.seqlens // case.max_tokens_per_rank)
    alone_s = case.piece_s(case.seqlens, 1)
    target_s = float(alone_s.sum()) / case.hdp_size
    degree = np.clip(np.maximum(need, np.ceil(alone_s / target_s)), 1, case.hdp_size).astype(int)
    seconds = case.piece_s(case.seqlens, degree)
    load = [(0.0, rank) for rank in range(case.hdp_size)]
    for seq in np.argsort(-case.seqlens, kind="stable").tolist():
        ranks = [heapq.heappop(load) for _ in range(degree[seq])]
        end_s = ranks[-1][0] + float(seconds[seq])
        for _, rank in ranks:
            heapq.heappush(load, (end_s, rank))
    return max(load)[0]


def _groups(case: Case) -> Any:
    return power_of_two_groups(
        list(enumerate(case.seqlens.tolist())),
        num_ranks=case.hdp_size,
        max_tokens_per_rank=case.max_tokens_per_rank,
        cost=case.cost,
    )


def _groups_s(case: Case, groups: Any) -> float:
    free_s = np.zeros(case.hdp_size)
    for wave in groups:
        first = 0
        while first < case.hdp_size:
            stop = first + 1
            while stop < case.hdp_size and wave[stop] == wave[first]:
                stop += 1
            lengths = case.seqlens[wave[first]]
            free_s[first:stop] = free_s[first:stop].max()
            free_s[first:stop] += float(np.sum(case.piece_s(lengths, stop - first)))
            first = stop
    return float(free_s.max())


# ---- peers ----


def _load(package: str, path: str, stubs: tuple[str, ...]) -> ModuleType:
    """Load one file of an installed package without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Skipped(f"{package} is not installed")
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    file = next((folder / path for folder in folders if (folder / path).is_file()), None)
    if file is None:
        raise Skipped(f"{package} has no {path} in this version")
    with _stubs(stubs):
        module_spec = importlib.util.spec_from_file_location(f"peer_{package}", file)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        try:
            module_spec.loader.exec_module(module)
        except ImportError as error:
            raise Skipped(f"{package}: {error}") from error
    return module


@contextlib.contextmanager
def _stubs(names: tuple[str, ...]) -> Iterator[None]:
    """Replace imports with empty modules while a file is loaded."""

    class Empty(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    saved = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = Empty(name)
    try:
        yield
    finally:
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _megatron() -> Planner:
    module = _load(
        "megatron",
        "core/pipeline_parallel/hybrid_cp_schedule.py",
        ("megatron.core", "megatron.core.parallel_state", "megatron.core.rerun_state_machine"),
    )

    def make(case: Case) -> Any:
        group = type("Group", (), {"size": lambda self: case.hdp_size})()
        scheduler = module.BalancedCPScheduler(case.max_tokens_per_rank, group)
        samples = list(enumerate(case.seqlens.tolist()))
        return scheduler.get_groups_and_subsamples(samples, None)[1]

    def step_s(case: Case, groups: Any) -> float:
        total_s = 0.0
        for ranks in groups:
            ids = np.concatenate([np.array(r, dtype=int) for r in ranks])
            degree = np.bincount(ids, minlength=len(case.seqlens))
            seconds = case.piece_s(case.seqlens, np.maximum(degree, 1))
            total_s += max(float(seconds[r].sum()) for r in ranks)
        return total_s

    return make, step_s


def _verl() -> Planner:
    names = ("verl", "verl.protocol", "verl.utils", "verl.utils.tensordict_utils")
    module = _load("verl", "utils/seqlen_balancing.py", (*names, "verl.utils.device"))

    def make(case: Case) -> Any:
        work = (24576 * case.seqlens + case.seqlens**2).tolist()  # its own calculate_workload
        parts = case.hdp_size // case.static_cp_size()
        return module.get_seqlen_balanced_partitions(work, parts, equal_size=False)

    return make, _static_rings_s


def _trl() -> Planner:
    module = _load("trl", "data_utils.py", ())
    if not hasattr(module, "_pack_bfd"):
        raise Skipped("trl has no _pack_bfd in this version")
    import pyarrow

    def make(case: Case) -> Any:
        # Each row repeats its sequence number, so the packed rows tell which sequences they hold.
        offsets = np.concatenate([[0], np.cumsum(case.seqlens)]).astype(np.int32)
        values = np.repeat(np.arange(len(case.seqlens), dtype=np.int32), case.seqlens)
        rows = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))
        cp_size = case.static_cp_size()
        length = cp_size * case.max_tokens_per_rank
        packed = module._pack_bfd(pyarrow.table({"input_ids": rows}), length)
        bins = [np.unique(row) for row in packed["input_ids"].to_numpy(zero_copy_only=False)]
        parts: list[list[int]] = [[] for _ in range(case.hdp_size // cp_size)]
        for i, members in enumerate(bins):  # as a data loader deals them out
            parts[i % len(parts)] += members.tolist()
        return parts

    return make, _static_rings_s


def _static_rings_s(case: Case, parts: Any) -> float:
    seconds = case.piece_s(case.seqlens, case.static_cp_size())
    return max(float(seconds[part].sum()) for part in parts)


def planners(pp_size: int = 1) -> tuple[dict[str, Planner], list[str]]:
    """(planners by name, a message for each missing one). With pipeline stages, only ours."""
    if pp_size > 1:
        return {name: _policy(name) for name in PIPELINE_POLICIES}, []
    same: Callable[[Case, Any], float] = lambda case, step_s: step_s  # noqa: E731
    found: dict[str, Planner] = {name: _policy(name) for name in POLICIES_SHOWN}
    found["groups 2^k"] = (_groups, _groups_s)
    found["greedy LPT"] = (_greedy, same)
    missing = []
    for name, make in (("megatron", _megatron), ("verl KK", _verl), ("trl BFD", _trl)):
        try:
            found[name] = make()
        except Skipped as reason:
            missing.append(f"skipped {name}: {reason}")
    return found, missing
