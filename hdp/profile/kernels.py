"""Attention and merges of one layer alone, by length, degree and block: no peers needed.

    OMP_NUM_THREADS=1 python -m hdp.profile.kernels            # the demo model's heads on a CPU
    python -m hdp.profile.kernels --tokens 32768 --heads 32 --kv-heads 8 --head-dim 128

    ring     one rank's attention of a sequence of L tokens on d ranks, forward + backward, by the
             runtime's own `ring_attn_varlen_func`; what the others would send is at hand, so
             transfers take no time. d = 1 is plain causal attention
    block    x queries against y keys, no mask: what a ring's steps are made of
    merge    joining a block's (out, lse) into the rows of a rank (hdp/ops/native.py)

The rings' times are fitted (`attention_fit`): seconds per token^2, the shard at which a block runs
at half its speed, what a token costs (of each shard one block is causal, and half of its diagonal
is wasted), and what a ring step costs beside its block. So one GPU suffices for the ring's
coefficients, less the transfers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hdp import console
from hdp.attention.comm import RingComm, Transfer
from hdp.attention.kernels import BlockKernel, lse_dtype, select_kernel
from hdp.attention.layout import RingLayout, Segments
from hdp.attention.ring import ring_attn_varlen_func
from hdp.ops.native import merge_lse_
from hdp.scheduler import CostModel
from hdp.scheduler.costs.fit import Fit, Observation, fit_cost

from .stopwatch import median_s

Row = dict[str, Any]  # kind, its sizes, forward_s, seconds (forward + backward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """What attention of one layer needs to know, and how it is timed."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    repeats: int = 5
    group: dist.ProcessGroup | None = None  # ranks that measure at the same time, as they train

    @property
    def kernel(self) -> BlockKernel:
        return select_kernel(self.device, self.dtype, head_dim=self.head_dim)

    def draw(self, rows: int, heads: int, *, grad: bool = False) -> Tensor:
        """(rows, heads, head_dim) random."""
        shape = (rows, heads, self.head_dim)
        return torch.randn(shape, device=self.device, dtype=self.dtype, requires_grad=grad)

    def seconds(self, call: Any) -> float:
        return median_s(call, self.device, repeats=self.repeats, group=self.group)


def measure_kernels(heads: Heads, most_tokens: int, degrees: Sequence[int]) -> list[Row]:
    """All rows. most_tokens: of one rank's shard; `degrees`: of the rings."""
    least = min(128, most_tokens)  # below that, launches are measured and not attention
    shards = [n for shift in (6, 4, 3, 2, 1, 0) if (n := most_tokens >> shift) >= least]
    rows = [measure_ring(heads, shard * d, d) for d in degrees for shard in shards]
    for shard in shards:
        rows += [measure_block(heads, shard, shard), measure_block(heads, shard, shard // 2)]
        rows.append(measure_merge(heads, shard))
    return rows


def measure_ring(heads: Heads, seqlen: int, degree: int) -> Row:
    """One rank of a ring; all of them have equal work (zigzag), this one is in the middle."""
    layout = RingLayout(local_seqlens=(seqlen,))
    if degree > 1:
        ring = tuple(range(degree))
        layout = RingLayout(ring=ring, ring_rank=degree // 2, ring_seqlens=(seqlen,))
    q = heads.draw(layout.total_tokens, heads.heads, grad=True)
    k = heads.draw(layout.total_tokens, heads.kv_heads, grad=True)
    v = heads.draw(layout.total_tokens, heads.kv_heads, grad=True)
    dout, comm = heads.draw(layout.total_tokens, heads.heads), AtHand(heads.device)

    def forward() -> Tensor:
        return ring_attn_varlen_func(q, k, v, layout, comm=comm, kernel=heads.kernel)

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), dout)

    return {
        "kind": "ring",
        "seqlen": seqlen,
        "degree": degree,
        "forward_s": heads.seconds(forward),
        "seconds": heads.seconds(both),
    }


def measure_block(heads: Heads, num_queries: int, num_keys: int) -> Row:
    """The chosen back end on one rectangle."""
    q, dout = (heads.draw(num_queries, heads.heads) for _ in range(2))
    k, v = (heads.draw(num_keys, heads.kv_heads) for _ in range(2))
    segments, scale = Segments((num_queries,), (num_keys,), causal=False), heads.head_dim**-0.5
    kernel = heads.kernel
    out, lse = kernel.forward(q, k, v, segments, scale)
    forward_s = heads.seconds(lambda: kernel.forward(q, k, v, segments, scale))
    backward_s = heads.seconds(lambda: kernel.backward(dout, q, k, v, out, lse, segments, scale))
    return {
        "kind": "block",
        "queries": num_queries,
        "keys": num_keys,
        "forward_s": forward_s,
        "seconds": forward_s + backward_s,
    }


def measure_merge(heads: Heads, rows: int) -> Row:
    """`merge_lse_` of as many rows; forward only, there is no backward."""
    precise = lse_dtype(heads.dtype)
    block, out = heads.draw(rows, heads.heads), heads.draw(rows, heads.heads).to(precise)
    lse, block_lse = (
        torch.randn(heads.heads, rows, device=heads.device, dtype=precise) for _ in range(2)
    )
    seconds = heads.seconds(lambda: merge_lse_(out, lse, block, block_lse))
    return {"kind": "merge", "rows": rows, "forward_s": seconds, "seconds": seconds}


def attention_fit(rows: Sequence[Row]) -> Fit | None:
    """Attention's coefficients of one layer, from the rows of rings; transfers are not in them.

    None if shards were too short for their times to grow with them.
    """
    base = CostModel.from_coefficients(quadratic_s=1.0, linear_s=0.0)
    try:
        return fit_cost([observation(row) for row in rings(rows)], base, without=["fixed_s"])
    except ValueError:
        return None


def rings(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "ring"]


def observation(row: Row) -> Observation:
    return Observation(pieces=((row["seqlen"], row["degree"]),), seconds=row["seconds"])


def with_predictions(rows: Sequence[Row], fit: Fit | None) -> list[Row]:
    """The rows, those of rings with the fit's `predicted_s` and `error`."""
    told = []
    for row in rows:
        more = {}
        if row["kind"] == "ring" and fit is not None:
            predicted = observation(row).predicted_s(fit.cost)
            more = {"predicted_s": predicted, "error": predicted / row["seconds"] - 1}
        told.append({**row, **more})
    return told


def kernels_table(rows: Sequence[Row]) -> list[list[object]]:
    """For `console.print_table` with KERNEL_COLUMNS."""
    text = {
        "ring": "{seqlen:,} tokens on {degree} ranks",
        "block": "block, {queries:,} queries x {keys:,} keys",
        "merge": "merge, {rows:,} rows",
    }
    return [
        [
            text[row["kind"]].format(**row),
            f"{1e3 * row['forward_s']:.3f}",
            f"{1e3 * row['seconds']:.3f}",
            f"{1e3 * row['predicted_s']:.3f}" if "predicted_s" in row else "",
            f"{row['error']:+.1%}" if "error" in row else "",
        ]
        for row in rows
    ]


KERNEL_COLUMNS = ("one layer", "forward ms", "both ms", "model", "error")


class AtHand(RingComm):
    """A ring whose blocks are there at once, with random contents of the right shape."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(None, device)
        self._blocks: dict[tuple[Any, ...], Tensor] = {}

    def shift(
        self, tensor: Tensor, ring: tuple[int, ...], ring_rank: int, recv_shape: torch.Size | tuple
    ) -> Transfer:
        key = (tuple(recv_shape), tensor.dtype)
        if key not in self._blocks:
            self._blocks[key] = torch.randn(recv_shape, dtype=tensor.dtype, device=tensor.device)
        return Transfer(self, [], [], [(self._blocks[key], 0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of the largest shard")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    heads = Heads(
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        dtype=torch.bfloat16 if cuda else torch.float32,
        device=torch.device("cuda" if cuda else "cpu"),
    )
    rows = measure_kernels(heads, args.tokens, args.degrees)
    fit = attention_fit(rows)
    table = kernels_table(with_predictions(rows, fit))
    console.print_table(KERNEL_COLUMNS, table, title=heads.kernel.name)
    if fit is None:
        raise SystemExit("times do not grow with the tokens: raise --tokens")
    cost = fit.cost
    print(
        f"{cost.quadratic_s:.3g} s per token^2, half speed at shards of "
        f"{cost.small_shard_tokens:.0f} tokens, {cost.linear_s:.3g} s per token, "
        f"{1e3 * cost.ring_step_s:.3f} ms per ring step"
    )


if __name__ == "__main__":
    main()
