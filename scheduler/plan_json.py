"""A StepPlan as JSON text, small enough to keep and strict enough to take from strangers.

Version 3 says everything once, so the text grows with the pieces of a plan, not with the width of
its rings (version 2 repeated a ring of n ranks on each of them: n squared numbers):

    {"version": 3, "policy": "hdp", "hdp_size": 3, "pp_size": 1, "max_tokens_per_rank": 8,
     "aligned": false, "offloadable": 0.0, "ranks_per_node": null, "predicted_s": 0.1,
     "lower_bound_s": 0.1, "notes": {}, "seqlens": [10, 3],
     "rings": [[[0, 2]], [[2, 1]]],      for each sequence its ranks in ring order, as runs
                                         [first rank, number of ranks] of consecutive ranks
     "gathered": [0],                    the sequences whose ring is gathered
     "ranks": [[[0]], [[0]], [[1]]],     for each rank its microbatches: the sequences of each
     "offload_ratio": null}              or, like "ranks", a ratio for each microbatch

`fields_of` reads this and versions 1 (no gathered rings) and 2. It checks what it needs to build
columns of the right shape: types, limits, ranks and sequences that exist. `StepPlan.validate` then
checks the plan.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from .plain import flag, parse_json, shown, to_plain, whole, whole_column

if TYPE_CHECKING:
    from .step_plan import StepPlan

FORMAT_VERSION = 3
_WHAT = "a StepPlan"
_KEYS = {
    *("version", "policy", "hdp_size", "pp_size", "max_tokens_per_rank", "offloadable"),
    *("ranks_per_node", "predicted_s", "lower_bound_s", "notes", "seqlens", "ranks"),
}
_KEYS_OF_3 = {"aligned", "rings", "gathered", "offload_ratio"}


def text_of(plan: StepPlan) -> str:
    """The plan as JSON text of the current version; see the module docstring."""
    first, pieces = plan.microbatch_offsets.tolist(), plan.piece_offsets.tolist()
    seqs, ratio = plan.piece_seqs.tolist(), plan.offload_ratio.tolist()
    spans = [range(first[rank], first[rank + 1]) for rank in range(len(first) - 1)]
    data = {
        "version": FORMAT_VERSION,
        "policy": plan.policy,
        "hdp_size": plan.hdp_size,
        "pp_size": plan.pp_size,
        "max_tokens_per_rank": plan.max_tokens_per_rank,
        "aligned": plan.aligned,
        "offloadable": plan.offloadable,
        "ranks_per_node": plan.ranks_per_node,
        "predicted_s": plan.predicted_s,
        "lower_bound_s": plan.lower_bound_s,
        "notes": to_plain(plan.notes, "notes"),
    }
    columns = {
        "seqlens": plan.seqlens.tolist(),
        "rings": _runs(plan),
        "gathered": np.flatnonzero(plan.gathered).tolist(),
        "ranks": [[seqs[pieces[m] : pieces[m + 1]] for m in span] for span in spans],
        "offload_ratio": None,
    }
    if plan.offload_ratio.any():
        columns["offload_ratio"] = [[ratio[m] for m in span] for span in spans]
    return json.dumps({**to_plain(data), **columns}, allow_nan=False)


def _runs(plan: StepPlan) -> list[list[list[int]]]:
    """For each sequence the runs [first rank, number of ranks] of its ring."""
    ranks, offsets = plan.ring_ranks.astype(np.int64), plan.ring_offsets
    starts = np.ones(len(ranks), dtype=bool)
    starts[1:] = ranks[1:] != ranks[:-1] + 1
    starts[offsets[:-1][plan.degrees > 0]] = True
    begin = np.flatnonzero(starts)
    size = np.diff(np.append(begin, len(ranks)))
    runs = np.stack([ranks[begin], size], axis=1).tolist()
    cuts = np.searchsorted(begin, offsets).tolist()
    return [runs[cuts[s] : cuts[s + 1]] for s in range(plan.num_seqs)]


def fields_of(text: str | bytes) -> dict[str, Any]:
    """The fields of a StepPlan, by name, for its constructor.

    Raises ValueError for text that is not a plan of this or an earlier version.
    """
    data = parse_json(text, _WHAT)
    if not isinstance(data, dict) or "version" not in data:
        raise _refuse("no object with a field 'version'")
    version = data["version"]
    if isinstance(version, bool) or version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"plan has version {version if isinstance(version, (int, str)) else shown(version)}, "
            f"this library reads versions 1 to {FORMAT_VERSION}"
        )
    wanted = _KEYS | (_KEYS_OF_3 if version == 3 else set())
    if missing := sorted(wanted - set(data)):
        raise _refuse(f"no field {missing[0]!r}")
    if unknown := sorted(set(data) - wanted):
        raise _refuse(f"unknown field {shown(unknown[0])}")
    fields = _scalars(data)
    seqlens = whole_column("seqlens", _list("seqlens", data["seqlens"]))
    ranks = [_list(f"ranks[{r}]", rank) for r, rank in enumerate(_list("ranks", data["ranks"]))]
    if len(ranks) != fields["hdp_size"]:
        raise _refuse(f"hdp_size={fields['hdp_size']}, but 'ranks' has {len(ranks)} entries")
    read = _columns_of_3 if version == 3 else _columns_of_2
    columns = read(data, ranks, len(seqlens), fields["hdp_size"])
    return {**fields, "seqlens": seqlens, "microbatch_offsets": offsets_of(ranks), **columns}


def _scalars(data: dict[str, Any]) -> dict[str, Any]:
    for name, kind in (("policy", str), ("notes", dict)):
        if not isinstance(data[name], kind):
            raise _refuse(f"{name}={shown(data[name])} is no {kind.__name__}")
    node = data["ranks_per_node"]
    fields = {
        "policy": data["policy"],
        "notes": data["notes"],
        "hdp_size": whole("hdp_size", data["hdp_size"]),
        "pp_size": whole("pp_size", data["pp_size"]),
        "aligned": flag("aligned", data.get("aligned", False)),
        "max_tokens_per_rank": whole("max_tokens_per_rank", data["max_tokens_per_rank"]),
        "ranks_per_node": None if node is None else whole("ranks_per_node", node),
        "offloadable": _number("offloadable", data["offloadable"]),
    }
    for name in ("predicted_s", "lower_bound_s"):
        fields[name] = float("nan") if data[name] is None else _number(name, data[name])
    return fields


def _columns_of_3(
    data: dict[str, Any], ranks: list[list[Any]], num_seqs: int, hdp_size: int
) -> dict[str, Any]:
    microbatches = list(chain.from_iterable(ranks))
    for mb in microbatches:
        _list("a microbatch of 'ranks'", mb)
    seqs = whole_column("ranks", list(chain.from_iterable(microbatches)))
    rings = _list("rings", data["rings"])
    if len(rings) != num_seqs:
        raise _refuse(f"{len(rings)} rings for {num_seqs} sequences")
    for s, ring in enumerate(rings):
        for run in _list(f"rings[{s}]", ring):
            if len(_list(f"a run of rings[{s}]", run)) != 2:
                raise _refuse(f"rings[{s}] has {shown(run)}: give [first rank, number of ranks]")
    runs = whole_column("rings", list(chain.from_iterable(chain.from_iterable(rings))))
    begin, size = runs.reshape(-1, 2).T
    bad = np.flatnonzero((begin < 0) | (size < 1) | (size > hdp_size) | (begin > hdp_size - size))
    if len(bad):
        raise _refuse(f"a run of {size[bad[0]]} ranks from {begin[bad[0]]}, hdp_size={hdp_size}")
    # A ring in few characters may be wide: expand no more ranks than there are pieces.
    if float(size.sum(dtype=np.float64)) != len(seqs):
        raise _refuse(f"rings of {int(size.sum())} ranks in all, but {len(seqs)} pieces in 'ranks'")
    along = np.arange(len(seqs)) - np.repeat(np.cumsum(size) - size, size)
    per_seq = np.zeros(num_seqs, dtype=np.int64)
    np.add.at(per_seq, np.repeat(np.arange(num_seqs), [len(ring) for ring in rings]), size)
    gathered = np.zeros(num_seqs, dtype=bool)
    gathered[_existing("gathered", data["gathered"], num_seqs)] = True
    return {
        "ring_offsets": np.concatenate([[0], np.cumsum(per_seq)]),
        "ring_ranks": np.repeat(begin, size) + along,
        "piece_offsets": offsets_of(microbatches),
        "piece_seqs": _existing("ranks", seqs, num_seqs),
        "gathered": gathered,
        "offload_ratio": _ratios(data["offload_ratio"], ranks),
    }


def _ratios(given: Any, ranks: list[list[Any]]) -> np.ndarray:
    if given is None:
        return np.zeros(sum(map(len, ranks)))
    lists = [_list("offload_ratio", one) for one in _list("offload_ratio", given)]
    if list(map(len, lists)) != list(map(len, ranks)):
        raise _refuse("'offload_ratio' must have a number for each microbatch of 'ranks'")
    return np.array([_number("offload_ratio", x) for x in chain.from_iterable(lists)])


def _columns_of_2(
    data: dict[str, Any], ranks: list[list[Any]], num_seqs: int, hdp_size: int
) -> dict[str, Any]:
    """Versions 1 and 2: each microbatch is an object whose pieces repeat their rings."""
    rings: dict[int, list[Any]] = {}
    gathered: dict[int, bool] = {}  # by the first sequence of each microbatch
    flat: list[list[int]] = []
    ratios = []
    for mb in chain.from_iterable(ranks):
        if not isinstance(mb, dict) or not {"pieces", "offload_ratio"} <= set(mb):
            raise _refuse(f"microbatch {shown(mb)} has no 'pieces' and 'offload_ratio'")
        seqs = []
        for piece in _list("pieces", mb["pieces"]):
            if len(_list("a piece", piece)) != 2:
                raise _refuse(f"piece {shown(piece)}: give [sequence, [ranks in ring order]]")
            seq, ring = whole("a sequence", piece[0], low=0), _list("a ring", piece[1])
            if rings.setdefault(seq, ring) != ring:
                raise _refuse(f"the ranks of sequence {seq} differ on its ring")
            seqs.append(seq)
        mode = data["version"] > 1 and mb.get("gathered")
        if not isinstance(mode, bool):
            raise _refuse(f"gathered must be true or false, not {shown(mode)}")
        if seqs and gathered.setdefault(seqs[0], mode) != mode:
            raise ValueError(f"plan gathers sequence {seqs[0]} on only some of its ranks")
        flat.append(seqs)
        ratios.append(_number("offload_ratio", mb["offload_ratio"]))
    _existing("a sequence", list(rings), num_seqs)
    of_seq = [rings.get(seq, []) for seq in range(num_seqs)]
    return {
        "ring_offsets": offsets_of(of_seq),
        "ring_ranks": whole_column("ring", list(chain.from_iterable(of_seq))),
        "piece_offsets": offsets_of(flat),
        "piece_seqs": whole_column("pieces", list(chain.from_iterable(flat))),
        "gathered": np.array([gathered.get(seq, False) for seq in range(num_seqs)], dtype=bool),
        "offload_ratio": np.array(ratios, dtype=np.float64),
    }


def offsets_of(groups: Sequence[Sequence[Any]]) -> np.ndarray:
    """(num_groups + 1,) int64: where each group starts and ends when all are put in a row."""
    return np.concatenate([[0], np.cumsum([len(group) for group in groups], dtype=np.int64)])


def _existing(name: str, seqs: Any, num_seqs: int) -> np.ndarray:
    column = whole_column(name, seqs if isinstance(seqs, np.ndarray) else _list(name, seqs))
    bad = np.flatnonzero((column < 0) | (column >= num_seqs))
    if len(bad):
        raise _refuse(f"{name} has sequence {column[bad[0]]}, of {num_seqs} sequences")
    return column


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _refuse(f"{name} is {shown(value)}, not a list")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refuse(f"{name}={shown(value)} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if number - number != 0:  # 1e999 is read as infinity
        raise _refuse(f"{name}={shown(value)} must be finite")
    return number


def _refuse(problem: str) -> ValueError:
    return ValueError(f"not {_WHAT} in JSON: {problem}")
