"""Agreement between ranks: a failure on one rank becomes the same error on all, not a hang.

A rank that raises while the others go on into a collective leaves them waiting for it. `on_rank_0`
and `on_all_ranks` run what may fail, and then all ranks return or all raise ValueError, together;
`agree_on_values` does so where ranks were given different values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


def on_rank_0(call: Callable[[], T], group: dist.ProcessGroup) -> T:
    """The result of `call` on rank 0 of `group`, on all ranks (it must pickle).

    An OSError or ValueError there is raised on all ranks, as ValueError. Collective.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = call()
        except (OSError, ValueError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=dist.get_global_rank(group, 0), group=group)
    if outcome[1] is not None:
        raise ValueError(str(outcome[1])) from outcome[1]
    return outcome[0]


def on_all_ranks(call: Callable[[], T], group: dist.ProcessGroup) -> T:
    """`call` on each rank of `group`; if it raises on any, ValueError on all. Collective.

    The text is that of the lowest rank that failed, with its number.
    """
    result, failure = None, ""
    try:
        result = call()
    except Exception as error:
        failure = str(error) if isinstance(error, ValueError) else repr(error)
    failures = [""] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure, group=group)
    for rank, text in enumerate(failures):
        if text:
            raise ValueError(f"{text} (found by rank {rank})")
    return cast(T, result)


def agree_on_values(
    ours: Mapping[str, Any], group: dist.ProcessGroup, *, problem: str, remedy: str
) -> None:
    """ValueError on all ranks if `ours` is not the same mapping on all of them. Collective.

    The text is the problem, the first name that differs, both of its values, and the remedy.
    """
    theirs = on_rank_0(lambda: dict(ours), group)

    def compare() -> None:
        for name in [*theirs, *ours]:
            here, there = (values.get(name, "missing") for values in (ours, theirs))
            if here != there:
                raise ValueError(
                    f"{problem}: {name} is {here!r} here and {there!r} on rank 0; {remedy}"
                )

    on_all_ranks(compare, group)


_BROKEN = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "gloo",
    "nccl",
)


def is_collective_error(error: BaseException | None) -> bool:
    """Whether `error`, or its cause, says that a collective broke: mostly another rank's fault."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(phrase in text for phrase in _BROKEN):
            return True
        error = error.__cause__
    return False
