"""RingComm: keys and values travel round a ring of ranks, on the one communicator of the HDP axis.

A ring is a tuple of ranks from the plan, not a process group: every transfer is a batched send and
receive over the group that all HDP ranks share, so no communicator is made per ring (paper 5.1:
5-10 GB of NCCL buffers otherwise) and any subset of ranks in any order can be one.

Invariants:
* The size of what arrives is known from the plan and never negotiated; gloo checks neither size nor
  dtype, so `shift` does (`test_shift_checks_shape`).
* Every rank posts a ring's transfers in the same order; between two ranks messages are first in,
  first out, so no tags are needed.
* Both tensors of a transfer are held until `wait()` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .clock import Clock, Mark


@dataclass
class CommStats:
    """What a rank sent, and from when to when it waited for its ring."""

    bytes_sent: int = 0
    waits: list[tuple[Mark, Mark]] = field(default_factory=list)


class Shift:
    """A transfer under way: `wait()` returns the received tensor."""

    def __init__(self, comm: RingComm, works: list, sent: Tensor, received: Tensor) -> None:
        self._comm, self._works, self._sent, self._received = comm, works, sent, received

    def wait(self) -> Tensor:
        start = self._comm.clock.now()
        for work in self._works:
            work.wait()
        self._comm.stats.waits.append((start, self._comm.clock.now()))
        self._comm.on_exchange()
        return self._received


class RingComm:
    """Sends tensors one position along a ring.

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
    ) -> Shift:
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
        ops = []
        if tensor.numel():
            ops.append(self._op(dist.isend, tensor, ring[(ring_rank + 1) % size]))
        if received.numel():
            ops.append(self._op(dist.irecv, received, ring[(ring_rank - 1) % size]))
        works = dist.batch_isend_irecv(ops) if ops else []
        self.stats.bytes_sent += tensor.numel() * tensor.element_size()
        return Shift(self, works, tensor, received)

    def _op(self, op, tensor: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(op, tensor, group=self.group, group_peer=rank)
