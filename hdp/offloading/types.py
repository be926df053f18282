"""Offload's options, counters and internal errors; hdp/errors.py has the errors for users."""

from __future__ import annotations

from dataclasses import dataclass

from hdp.errors import HDPError, OffloadModifiedError


class PoolFull(HDPError):
    """The pool of host memory cannot grow any further."""

    def __init__(self, wanted_bytes: int, in_use_bytes: int, max_bytes: int) -> None:
        self.wanted_bytes, self.in_use_bytes, self.max_bytes = wanted_bytes, in_use_bytes, max_bytes
        super().__init__(
            f"the host pool of {text_of(max_bytes)} is full: {text_of(in_use_bytes)} are in use "
            f"and {text_of(wanted_bytes)} more are needed"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationPolicy:
    """What to do with what a forward saves for backward. Shares of bytes, 0 to 1.

    recompute_pointwise: share of element-wise results to recompute in backward
    recompute_matmul: the same for matrix products
    ratio: share of everything else to send to the host
    """

    ratio: float = 1.0
    recompute_pointwise: float = 0.0
    recompute_matmul: float = 0.0

    def __post_init__(self) -> None:
        for name in ("ratio", "recompute_pointwise", "recompute_matmul"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"offload: {name}={value} must be a share from 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyBuffers:
    """Device memory, in bytes, that offload may use to hide its copies.

    send_bytes: tensors whose copy to the host may still be in flight
    keep_bytes: the last tensors of a forward; backward needs them first, so they are never sent
    prefetch_bytes: tensors fetched in backward before they are requested

    A decoder layer saves most of its bytes in a tenth of its time, around the MLP; the link sends
    and fetches them during attention. So a buffer should hold what one layer sends: at 0.6 and 0.4
    of that, a step takes 5 to 15% longer (tools/simulate_offload.py).
    """

    send_bytes: int
    keep_bytes: int
    prefetch_bytes: int

    def __post_init__(self) -> None:
        for name in ("send_bytes", "keep_bytes", "prefetch_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"offload: {name}={getattr(self, name)} must be 0 or more")

    @classmethod
    def of_layer(cls, num_bytes: float) -> CopyBuffers:
        """Buffers for layers that send num_bytes each."""
        return cls(
            send_bytes=int(num_bytes),
            keep_bytes=int(0.15 * num_bytes),
            prefetch_bytes=int(0.8 * num_bytes),
        )


@dataclass(slots=True, kw_only=True)
class Counts:
    """Bytes sent, kept and recomputed since the start."""

    sent: int = 0
    kept: int = 0
    recomputed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStats:
    """Bytes of host memory, and bytes copied since the start."""

    held_bytes: int
    in_use_bytes: int
    peak_in_use_bytes: int
    max_bytes: int
    sent_bytes: int
    fetched_bytes: int


def modified(name: str, what: str, num_writes: int) -> OffloadModifiedError:
    """The error for a saved tensor that was modified in place."""
    return OffloadModifiedError(
        f"{name}, {what}, was modified in place after it was saved for backward "
        f"({num_writes} {'write' if num_writes == 1 else 'writes'}): its gradient would be "
        "wrong. Modify a clone, or use the out-of-place operation"
    )


def text_of(num_bytes: float) -> str:
    """A human-readable size."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"
