"""Offload on a GPU, simulated on a CPU: the real engine, as planned, on streams that keep time.

    OMP_NUM_THREADS=1 python tools/simulate_offload.py
    OMP_NUM_THREADS=1 python tools/simulate_offload.py --link-gb 25 --tokens 65536 --layers 16

Llama-7B-shaped layers, one sequence. Each operation takes what the measured ceilings of an H200
say; what it saves goes through hdp's engine as in a training step, 1 byte for 16 KiB, and copies
take the time that the link needs. So the table has what buffers, bursts and whole tensors cost,
which the planner's arithmetic leaves out:

    planned      time by the planner, against nothing offloaded
    simulated    time by the engine on simulated streams; waits of the compute stream are in it
    device       saved tensors on the device at the most, against the plan's budget: what
                 checkpointing every layer holds

It knows nothing of allocators, kernels that slow down beside copies, or Python's time.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from hdp import console
from hdp.offloading.engine import OffloadEngine
from hdp.offloading.link import Link
from hdp.offloading.packed import Packed
from hdp.offloading.per_microbatch import policy_of
from hdp.offloading.send_queue import Quota
from hdp.offloading.types import ActivationPolicy, CopyBuffers

sys.path.insert(0, str(Path(__file__).parent))
from decoder_layers import LLAMA_7B, Shape
from offload_budget import Budget, plan_for_memory
from timed_streams import TimedStreams

SCALE = 1 / (16 << 10)  # simulated bytes for real ones
MATMUL_FLOPS_PER_S = 700e12
FORWARD_FLOPS_PER_S, BOTH_FLOPS_PER_S = 559e12, 541e12  # attention
MEMORY_BYTES_PER_S = 2.5e12
SETUPS = ((32, 3), (64, 3), (128, 2), (128, 3), (64, 16), (128, 8))  # thousands of tokens, layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A tensor that an operation saves. recompute_s: to recompute it."""

    num_bytes: float
    kind: str
    recompute_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    forward_s: float
    backward_s: float
    saves: tuple[Kept, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """ratio: to the same operations with nothing offloaded. Bytes are real ones."""

    ratio: float
    stalled_s: float
    device_bytes: float
    sent_bytes: float


def decoder_layer(shape: Shape, tokens: int) -> list[Operation]:
    """A layer's operations in the order of forward."""
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    narrow, wide = 2.0 * tokens * hidden, 2.0 * tokens * mlp  # bytes in bf16

    def product_s(rows: int, columns: int) -> float:
        return 2.0 * tokens * rows * columns / MATMUL_FLOPS_PER_S

    def pointwise_s(num_bytes: float) -> float:
        return 4 * num_bytes / MEMORY_BYTES_PER_S

    def product(rows: int, columns: int, *saves: Kept) -> Operation:
        seconds = product_s(rows, columns)
        return Operation(forward_s=seconds, backward_s=2 * seconds, saves=saves)

    def pointwise(num_bytes: float, *saves: Kept) -> Operation:
        seconds = pointwise_s(num_bytes)
        return Operation(forward_s=seconds / 2, backward_s=seconds, saves=saves)

    def made(kind: str, num_bytes: float, recompute_s: float = 0.0) -> Kept:
        return Kept(num_bytes=num_bytes, kind=kind, recompute_s=recompute_s)

    normed = made("pointwise", narrow, pointwise_s(narrow))
    pairs_flops = 2.0 * tokens * tokens * heads  # causal
    forward_s = pairs_flops / FORWARD_FLOPS_PER_S
    qkv = [made("matmul", 2.0 * tokens * n, product_s(hidden, n)) for n in (heads, kv, kv)]
    up = made("matmul", wide, product_s(hidden, mlp))
    gated = made("pointwise", wide, pointwise_s(wide))
    return [
        pointwise(narrow, made("other", narrow)),  # norm
        product(hidden, heads + 2 * kv, normed),
        Operation(
            forward_s=forward_s,
            backward_s=3.5 * pairs_flops / BOTH_FLOPS_PER_S - forward_s,
            saves=(*qkv, made("other", 2.0 * tokens * heads)),
        ),
        product(heads, hidden),
        pointwise(narrow, made("matmul", narrow, product_s(heads, hidden))),
        product(hidden, 2 * mlp, normed),
        pointwise(wide, up, up, gated),  # SiLU, product
        product(mlp, hidden, gated),
    ]


def simulate(
    operations: list[Operation], policy: ActivationPolicy, buffers: CopyBuffers, bytes_per_s: float
) -> Simulated:
    """Forward and backward of the operations. What is recomputed takes its time in backward."""
    streams = TimedStreams(bytes_per_s * SCALE)
    link = Link(streams, max_bytes=1 << 30, slab_bytes=1 << 20, num_threads=1)
    engine = OffloadEngine(link, buffers=_scaled(buffers))
    quotas = {
        "pointwise": Quota(policy.recompute_pointwise),
        "matmul": Quota(policy.recompute_matmul),
    }
    stack: list[tuple[float, list[Packed]]] = []
    work_s = most = 0.0

    def on_device() -> float:
        live = {id(p.saved): p.saved for _, packs in stack for p in packs}.values()
        return sum(saved.num_bytes for saved in live if saved.value is not None) / SCALE

    with engine.forward(ActivationPolicy(ratio=policy.ratio), min_bytes=1) as forward:
        for operation in operations:
            backward_s, packs = operation.backward_s, []
            for kept in operation.saves:
                if kept.kind in quotas and quotas[kept.kind].takes(int(kept.num_bytes)):
                    backward_s += kept.recompute_s
                else:
                    data = torch.empty(int(kept.num_bytes * SCALE), dtype=torch.uint8)
                    packed = forward.pack(data)
                    assert isinstance(packed, Packed)
                    packs.append(packed)
                    del data, packed
            stack.append((backward_s, packs))
            streams.compute(operation.forward_s)
            work_s += operation.forward_s + operation.backward_s
            most = max(most, on_device())
    while stack:
        backward_s, packs = stack[-1]
        values = [packed.unpack() for packed in packs]
        given = sum(v.numel() for v, p in zip(values, packs, strict=True) if p.saved.value is None)
        most = max(most, on_device() + given / SCALE)
        streams.compute(backward_s)
        stack.pop()
        del packs, values
    sent = engine.stats().sent_bytes / SCALE
    engine.close()
    return Simulated(
        ratio=streams.now_s / work_s,
        stalled_s=streams.stalled_s,
        device_bytes=most,
        sent_bytes=sent,
    )


def _scaled(buffers: CopyBuffers) -> CopyBuffers:
    return CopyBuffers(
        send_bytes=int(buffers.send_bytes * SCALE),
        keep_bytes=int(buffers.keep_bytes * SCALE),
        prefetch_bytes=int(buffers.prefetch_bytes * SCALE),
    )


def simulate_planned(
    shape: Shape, tokens: int, num_layers: int, bytes_per_s: float
) -> tuple[ActivationPolicy, float, float, Simulated]:
    """(policy, the planner's ratio, budget in bytes, what the engine makes of it)."""
    layer = decoder_layer(shape, tokens)
    forward_s = num_layers * sum(operation.forward_s for operation in layer)
    backward_s = num_layers * sum(operation.backward_s for operation in layer)
    budget = Budget.of_recompute(shape, tokens, num_layers)
    plan = plan_for_memory(
        budget, shape, forward_s=forward_s, backward_s=backward_s, host_bytes_per_s=bytes_per_s
    )
    policy, buffers = policy_of(plan)
    ratio = 1 + plan.extra_s / (forward_s + backward_s)
    found = simulate(layer * num_layers, policy, buffers, bytes_per_s)
    return policy, ratio, budget.device_bytes, found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--link-gb", type=float, default=50.8, help="GB/s each way")
    parser.add_argument("--tokens", type=int, help="one setup of so many tokens")
    parser.add_argument("--layers", type=int, default=3)
    args = parser.parse_args(argv)
    setups = [(1024 * kilo, layers) for kilo, layers in SETUPS]
    if args.tokens:
        setups = [(args.tokens, args.layers)]
    rows = []
    for tokens, layers in setups:
        policy, planned, budget, found = simulate_planned(
            LLAMA_7B, tokens, layers, args.link_gb * 1e9
        )
        shares = (policy.ratio, policy.recompute_pointwise, policy.recompute_matmul)
        rows.append(
            [
                *(tokens, layers, *(f"{share:.2f}" for share in shares)),
                *(f"{found.sent_bytes / 1e9:.1f}", f"{planned:.3f}", f"{found.ratio:.3f}"),
                f"{1e3 * found.stalled_s:.0f}",
                f"{found.device_bytes / 1e9:.1f} of {budget / 1e9:.1f}",
            ]
        )
    console.print_table(
        [
            *("tokens", "layers", "ratio", "pointwise", "matmul", "sent GB", "planned"),
            *("simulated", "waits ms", "device GB"),
        ],
        rows,
        title=f"simulated: a link of {args.link_gb:g} GB/s each way, an H200's ceilings",
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
