"""Time one layer's attention and merges by length, degree and block; needs no other ranks.

    OMP_NUM_THREADS=1 python -m hdp.profile.kernels            # the demo model's heads on a CPU
    python -m hdp.profile.kernels --tokens 32768 --heads 32 --kv-heads 8 --head-dim 128

    ring     one rank's attention over a sequence of L tokens on d ranks, forward + backward, with
             the runtime's own `ring_attn_varlen_func`; blocks of other ranks are already in place,
             so transfers take no time. d = 1 is plain causal attention
    block    x queries against y keys, no mask: the building block of a ring's steps
    merge    merging a block's (out, lse) into a rank's rows (hdp/ops/native.py)

`attention_fit` fits the ring times: seconds per token^2, the shard size at which a block runs at
half speed, the cost per token (one block of each shard is causal, and half of its diagonal is
wasted), and the cost of a ring step in addition to its block. So a single GPU is enough to measure
the ring's coefficients, except for transfers.
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
    """The attention shape of one layer, and how to time it."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    repeats: int = 5
    group: dist.ProcessGroup | None = None  # ranks that measure simultaneously, as in training

    @property
    def kernel(self) -> BlockKernel:
        return select_kernel(self.device, self.dtype, head_dim=self.head_dim)

    def draw(self, rows: int, heads: int, *, grad: bool = False) -> Tensor:
        """Random (rows, heads, head_dim)."""
        shape = (rows, heads, self.head_dim)
        return torch.randn(shape, device=self.device, dtype=self.dtype, requires_grad=grad)

    def seconds(self, call: Any) -> float:
        return median_s(call, self.device, repeats=self.repeats, group=self.group)


def measure_kernels(heads: Heads, most_tokens: int, degrees: Sequence[int]) -> list[Row]:
    """Measure all rows. most_tokens: of one rank's shard; degrees: of the rings."""
    least = min(128, most_tokens)  # below that, launch overhead dominates
    shards = [n for shift in (6, 4, 3, 2, 1, 0) if (n := most_tokens >> shift) >= least]
    rows = [measure_ring(heads, shard * d, d) for d in degrees for shard in shards]
    for shard in shards:
        rows += [measure_block(heads, shard, shard), measure_block(heads, shard, shard // 2)]
        rows.append(measure_merge(heads, shard))
    return rows


def measure_ring(heads: Heads, seqlen: int, degree: int) -> Row:
    """Time the middle rank of a ring; all ranks have equal work (zigzag)."""
    layout = RingLayout(local_seqlens=(seqlen,))
    if degree > 1:
        ring = tuple(range(degree))
        layout = RingLayout(ring=ring, ring_rank=degree // 2, ring_seqlens=(seqlen,))
    q = heads.draw(layout.total_tokens, heads.heads, grad=True)
    k = heads.draw(layout.total_tokens, heads.kv_heads, grad=True)
    v = heads.draw(layout.total_tokens, heads.kv_heads, grad=True)
    dout, comm = heads.draw(layout.total_tokens, heads.heads), InstantComm(heads.device)

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
    """Time the selected kernel on one rectangle."""
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
    """Time `merge_lse_` on `rows` rows; there is no backward."""
    precise = lse_dtype(heads.dtype)
    block, out = heads.draw(rows, heads.heads), heads.draw(rows, heads.heads).to(precise)
    lse, block_lse = (
        torch.randn(heads.heads, rows, device=heads.device, dtype=precise) for _ in range(2)
    )
    seconds = heads.seconds(lambda: merge_lse_(out, lse, block, block_lse))
    return {"kind": "merge", "rows": rows, "forward_s": seconds, "seconds": seconds}


def attention_fit(rows: Sequence[Row]) -> Fit | None:
    """Fit one layer's attention coefficients, without transfers, to the ring rows.

    None if shards were too short for time to grow with their length.
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
    """The rows, with the fit's `predicted_s` and `error` added to ring rows."""
    result = []
    for row in rows:
        more = {}
        if row["kind"] == "ring" and fit is not None:
            predicted = observation(row).predicted_s(fit.cost)
            more = {"predicted_s": predicted, "error": predicted / row["seconds"] - 1}
        result.append({**row, **more})
    return result


def _ranks(row: Row) -> str:
    degree = row.get("degree", 1)
    return f"{degree} rank" + "s" * (degree != 1)


def kernels_table(rows: Sequence[Row]) -> list[list[object]]:
    """Cells for `console.print_table` with KERNEL_COLUMNS."""
    text = {
        "ring": "{seqlen:,} tokens on {ranks}",
        "block": "block, {queries:,} queries x {keys:,} keys",
        "merge": "merge, {rows:,} rows",
    }
    return [
        [
            text[row["kind"]].format(**row, ranks=_ranks(row)),
            f"{1e3 * row['forward_s']:.3f}",
            f"{1e3 * row['seconds']:.3f}",
            f"{1e3 * row['predicted_s']:.3f}" if "predicted_s" in row else "",
            f"{row['error']:+.1%}" if "error" in row else "",
        ]
        for row in rows
    ]


KERNEL_COLUMNS = ("one layer", "forward ms", "both ms", "model", "error")


class InstantComm(RingComm):
    """A ring whose blocks arrive instantly, with random contents of the right shape."""

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
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the largest shard")
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
        raise SystemExit("times do not grow with the number of tokens: raise --tokens")
    cost = fit.cost
    print(
        f"{cost.quadratic_s:.3g} s per token^2, half speed at shards of "
        f"{cost.small_shard_tokens:.0f} tokens, {cost.linear_s:.3g} s per token, "
        f"{1e3 * cost.ring_step_s:.3f} ms per ring step"
    )


if __name__ == "__main__":
    main()
