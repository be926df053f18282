"""RingComm: exchange keys and values within a ring, over the one communicator of all HDP ranks.

A ring is a tuple of ranks from the plan, not a process group: every transfer is a batch of sends
and receives over the group that all HDP ranks share. No ring needs its own communicator (which
would take 5-10 GB of NCCL buffers: paper, 5.1), and any ranks in any order can form a ring. With
NCCL a batch is one grouped call on NCCL's own stream: it starts after the work queued before it and
overlaps with the work queued after it; `wait()` blocks the stream, not the host
(tools/trace_overlap.py shows this).

    shift   one step around the ring: send to the next position, receive from the previous one
    swap    exchange with several peers at once, for gather mode (hdp/attention/gather.py)

Invariants:
* Receive sizes come from the plan and are never negotiated; gloo checks neither size nor dtype, so
  `shift` does (`test_shift_checks_shape`).
* All ranks post a ring's transfers in the same order, and messages between two ranks arrive in the
  order sent, so no tags are needed.
* A transfer keeps references to all its tensors until `wait()` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .clock import Clock, Mark

# More than a step has: 512 ring steps, forward and backward, in each of 64 layers.
MOST_WAITS = 2**16
Peers = Sequence[tuple[Tensor, int]]  # (contiguous tensor, rank on the HDP axis)


@dataclass
class CommStats:
    """Bytes that a rank sent, and the (start, end) of each wait for its ring.

    Of the waits at least the last MOST_WAITS are kept, with the number of those before them.
    """

    bytes_sent: int = 0
    waits: list[tuple[Mark, Mark]] = field(default_factory=list)
    waits_dropped: int = 0

    def waited(self, start: Mark, end: Mark) -> None:
        """Add a wait; past twice the limit, the oldest half goes."""
        self.waits.append((start, end))
        if len(self.waits) >= 2 * MOST_WAITS:
            self.waits_dropped += len(self.waits) - MOST_WAITS
            del self.waits[:-MOST_WAITS]


class Transfer:
    """Sends and receives in flight."""

    def __init__(self, comm: RingComm, works: list, sends: Peers, receives: Peers) -> None:
        self._comm, self._works, self._sends, self._receives = comm, works, sends, receives

    def wait(self) -> list[Tensor]:
        """Wait, then return the received tensors, in the order of `receives`."""
        start = self._comm.clock.now()
        peers = tuple(sorted({rank for _, rank in (*self._sends, *self._receives)}))
        with self._comm.on_wait(peers):
            for work in self._works:
                work.wait()
        self._comm.stats.waited(start, self._comm.clock.now())
        self._comm.on_exchange()
        return [tensor for tensor, _ in self._receives]


class RingComm:
    """Sends tensors between the ranks of a ring, on one communicator (ByteScale section 5.1).

    `stats` collects until `take_stats` is called, once per step in your own training loop; where
    nobody takes them, they stay bounded.

    group: the HDP axis; None: the default group. device: where the tensors live. on_exchange:
    called after each completed transfer, as a heartbeat for a watchdog. on_wait: wraps each wait
    for the given ranks, which are the ones to blame if it never ends.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
        *,
        on_exchange: Callable[[], None] = lambda: None,
        on_wait: Callable[[tuple[int, ...]], AbstractContextManager[None]] = lambda ranks: (
            nullcontext()
        ),
    ) -> None:
        self.group = group
        self.on_exchange, self.on_wait = on_exchange, on_wait
        self.clock = Clock(device)
        self.stats = CommStats()

    def take_stats(self) -> CommStats:
        """The stats collected since the last call; resets them."""
        taken, self.stats = self.stats, CommStats()
        return taken

    def shift(
        self, tensor: Tensor, ring: tuple[int, ...], ring_rank: int, recv_shape: torch.Size | tuple
    ) -> Transfer:
        """Start sending `tensor` to the next position and receiving `recv_shape` from the previous.

        ring: HDP ranks in ring order; ring_rank: our position. The received tensor has the dtype
        and device of `tensor` and may be empty. Raises ValueError if `tensor` is not contiguous, or
        if its shape differs from `recv_shape` in any dim but 1, the rows of a
        (2, rows, heads, dim) block.
        """
        if not tensor.is_contiguous():
            raise ValueError(f"shift needs a contiguous tensor, got strides {tensor.stride()}")
        expected, got = list(recv_shape), list(tensor.shape)
        if len(expected) != len(got) or expected[:1] + expected[2:] != got[:1] + got[2:]:
            raise ValueError(
                f"ring {ring} sends {got} but expects {expected}: the ranks' plans differ"
            )
        received = tensor.new_empty(recv_shape)
        size = len(ring)
        return self.swap(
            [(tensor, ring[(ring_rank + 1) % size])], [(received, ring[(ring_rank - 1) % size])]
        )

    def swap(self, sends: Peers, receives: Peers) -> Transfer:
        """Start all sends and receives as one batch; empty tensors are skipped.

        Each peer must post the matching calls, in the same order between any two ranks.
        """
        ops = []
        for kind, peers in ((dist.isend, sends), (dist.irecv, receives)):
            for tensor, rank in peers:
                assert tensor.is_contiguous(), f"strides {tensor.stride()} of {tensor.shape}"
                if tensor.numel():
                    ops.append(dist.P2POp(kind, tensor, group=self.group, group_peer=rank))
        works = dist.batch_isend_irecv(ops) if ops else []
        self.stats.bytes_sent += sum(x.numel() * x.element_size() for x, _ in sends)
        return Transfer(self, works, sends, receives)
