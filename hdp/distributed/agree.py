"""Agreement between ranks: a failure on one rank becomes the same error on all, not a hang.

If one rank raises while the others enter a collective, they wait for it forever. `on_rank_0` and
`on_all_ranks` run code that may fail; afterwards all ranks return or all raise ValueError.
`agree_on_values` raises on all ranks if they were given different values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


def on_rank_0(call: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Run `call` on rank 0 of `group` and return its result (which must pickle) on all ranks.

    An OSError or ValueError on rank 0 is raised on all ranks as ValueError. Collective.
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
    """Run `call` on each rank of `group`; if any of them raises, raise ValueError on all of them.

    The message is that of the lowest rank that failed, plus its number unless all fail with the
    same message. Collective.
    """
    result, failure, cause = None, "", None
    try:
        result = call()
    except Exception as error:
        cause = error
        failure = str(error) if isinstance(error, ValueError) else repr(error)
    failures = [""] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure, group=group)
    for rank, text in enumerate(failures):
        if text:
            everywhere = all(other == text for other in failures)
            raise ValueError(text if everywhere else f"{text} (found by rank {rank})") from cause
    return cast(T, result)


def agree_on_values(
    ours: Mapping[str, Any], group: dist.ProcessGroup, *, problem: str, remedy: str
) -> None:
    """Raise ValueError on all ranks if `ours` is not the same on all of them. Collective.

    The message has the problem, the first name that differs, its two values, and the remedy.
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


_BROKEN_COLLECTIVE = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "gloo",
    "nccl",
)


def is_collective_error(error: BaseException | None) -> bool:
    """Whether `error` or its cause is a failed collective, usually the fault of another rank."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(part in text for part in _BROKEN_COLLECTIVE):
            return True
        error = error.__cause__
    return False
