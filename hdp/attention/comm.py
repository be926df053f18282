"""RingComm: keys and values travel between the ranks of a ring, on the one communicator of HDP.

A ring is a tuple of ranks from the plan, not a process group: every transfer is a batch of sends
and receives over the group that all HDP ranks share, so no communicator is made per ring (paper
5.1: 5-10 GB of NCCL buffers otherwise) and any subset of ranks in any order can be one. With NCCL a
batch is one grouped call on NCCL's own stream: it starts when what was queued before it is done,
and runs beside what is queued after it; `wait()` holds up the stream, not the host
(tools/trace_overlap.py shows it).

    shift   one step round the ring: to the next position, from the previous
    swap    several peers at once: what gather mode needs (hdp/attention/gather.py)

Invariants:
* The size of what arrives is known from the plan and never negotiated; gloo checks neither size nor
  dtype, so `shift` does (`test_shift_checks_shape`).
* Every rank posts a ring's transfers in the same order; between two ranks messages are first in,
  first out, so no tags are needed.
* All tensors of a transfer are held until `wait()` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .clock import Clock, Mark

Peers = Sequence[tuple[Tensor, int]]  # (contiguous tensor, rank of the HDP axis)


@dataclass
class CommStats:
    """What a rank sent, and from when to when it waited for its ring."""

    bytes_sent: int = 0
    waits: list[tuple[Mark, Mark]] = field(default_factory=list)


class Transfer:
    """Sends and receives under way."""

    def __init__(self, comm: RingComm, works: list, sends: Peers, receives: Peers) -> None:
        self._comm, self._works, self._sends, self._receives = comm, works, sends, receives

    def wait(self) -> list[Tensor]:
        """The received tensors, in the order in which they were given."""
        start = self._comm.clock.now()
        for work in self._works:
            work.wait()
        self._comm.stats.waits.append((start, self._comm.clock.now()))
        self._comm.on_exchange()
        return [tensor for tensor, _ in self._receives]


class RingComm:
    """Sends tensors between the ranks of a ring, on one communicator (ByteScale section 5.1).

    `stats` grows until `take_stats` is called: a loop of one's own calls it every step.

    group: the HDP axis, the default group if None. device: where the tensors live. on_exchange is
    called when a transfer has arrived: a sign of life for a watchdog.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
        *,
        on_exchange: Callable[[], None] = lambda: None,
    ) -> None:
        self.group = group
        self.on_exchange = on_exchange
        self.clock = Clock(device)
        self.stats = CommStats()

    def take_stats(self) -> CommStats:
        """What was collected since the last call."""
        taken, self.stats = self.stats, CommStats()
        return taken

    def shift(
        self, tensor: Tensor, ring: tuple[int, ...], ring_rank: int, recv_shape: torch.Size | tuple
    ) -> Transfer:
        """Start sending `tensor` to the next position and receiving `recv_shape` from the previous.

        ring: ranks of the HDP axis in ring order; ring_rank: our position. What arrives has the
        dtype and device of `tensor` and may be empty. Raises ValueError if `tensor` is not
        contiguous or differs from `recv_shape` in more than the number of rows (the next to dim 0
        of a (2, rows, heads, dim) block).
        """
        if not tensor.is_contiguous():
            raise ValueError(f"shift sends contiguous tensors, got strides {tensor.stride()}")
        expected, got = list(recv_shape), list(tensor.shape)
        if len(expected) != len(got) or expected[:1] + expected[2:] != got[:1] + got[2:]:
            raise ValueError(f"ring {ring} sends {got} and expects {expected}: the plans differ")
        received = tensor.new_empty(recv_shape)
        size = len(ring)
        return self.swap(
            [(tensor, ring[(ring_rank + 1) % size])], [(received, ring[(ring_rank - 1) % size])]
        )

    def swap(self, sends: Peers, receives: Peers) -> Transfer:
        """Start all of these sends and receives as one batch; empty tensors do not travel.

        Every peer must give the counterparts, in the same order between any two ranks.
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
