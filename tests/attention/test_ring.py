"""Ring attention equals dense fp64 attention: every sharding and dtype, forward and backward."""

from __future__ import annotations

import pytest
import torch

from hdp.attention.comm import RingComm
from hdp.attention.kernels import KERNELS, select_kernel
from hdp.attention.layout import RingLayout
from hdp.attention.ring import ring_attn_varlen_func
from hdp.ops.reference import merge
from tests.oracle import dense_attention_grads
from tests.run_ranks import RankError, run_ranks

HEADS, KV_HEADS, DIM = 4, 2, 16
SCALE = 0.3

# (world, ring, lengths on the ring, lengths on each single rank)
CASES = {
    "one rank, packed": (1, (), (), {0: (5, 1, 17)}),
    "two ranks": (2, (0, 1), (32,), {}),
    "odd length, plus local": (2, (1, 0), (37,), {0: (3, 8), 1: ()}),
    "three ranks": (3, (2, 0, 1), (101,), {1: (9,)}),
    "subset of four": (4, (3, 1), (20,), {0: (4,), 2: (11, 2)}),
    "packed zigzag": (3, (0, 1, 2), (40, 7, 23), {}),
    "packed zigzag, ragged": (2, (0, 1), (1, 64, 3, 2), {1: (6,)}),
    "length 1 on four": (4, (0, 1, 2, 3), (1,), {0: (2,), 2: (1,)}),
    "shorter than the ring": (4, (1, 3, 0, 2), (3,), {}),
    "fewer tokens than chunks": (3, (0, 1, 2), (5, 2), {0: (1,)}),
    "all of eight": (8, tuple(range(8)), (131,), {5: (7,)}),
}


def _layouts(world, ring, ring_seqlens, local):
    for rank in range(world):
        on_ring = rank in ring
        yield RingLayout(
            ring=ring if on_ring else (),
            ring_rank=ring.index(rank) if on_ring else 0,
            ring_seqlens=ring_seqlens if on_ring else (),
            local_seqlens=tuple(local.get(rank, ())),
        )


def _data(world, ring, ring_seqlens, local, dtype):
    """Whole sequences with their oracle, keyed ("ring", i) or (rank, i)."""
    generator = torch.Generator().manual_seed(7)
    names = [("ring", i) for i in range(len(ring_seqlens))]
    names += [(rank, i) for rank in range(world) for i in range(len(local.get(rank, ())))]
    data = {}
    for owner, i in names:
        n = ring_seqlens[i] if owner == "ring" else local[owner][i]
        q, dout = torch.randn(2, n, HEADS, DIM, generator=generator, dtype=torch.float64)
        k, v = torch.randn(2, n, KV_HEADS, DIM, generator=generator, dtype=torch.float64)
        q, k, v, dout = (x.to(dtype) for x in (q, k, v, dout))
        data[owner, i] = (q, k, v, dout), dense_attention_grads(q, k, v, dout, SCALE)
    return data


def _shard(layout, rank, tensors):
    """Rows of this rank, cut from the whole sequences in packing order."""
    parts = []
    for i, start, stop in layout.spans():
        local = i - len(layout.ring_seqlens)
        whole = tensors["ring", i] if local < 0 else tensors[rank, local]
        parts.append(whole[start:stop])
    return torch.cat(parts) if parts else None


def _check_case(rank, case, dtype, kernel_name, tolerance):
    layout = list(_layouts(*CASES[case]))[rank]
    data = _data(*CASES[case], dtype)
    if layout.total_tokens:
        q, k, v, dout = (
            _shard(layout, rank, {key: x[0][j] for key, x in data.items()}) for j in range(4)
        )
        expected = [
            _shard(layout, rank, {key: x[1][j] for key, x in data.items()}) for j in range(4)
        ]
    else:
        q, k, v, dout = (
            torch.empty(0, h, DIM, dtype=dtype) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)
        )
        expected = [x.double() for x in (dout, q, k, v)]
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    kernel = KERNELS[kernel_name]()
    out = ring_attn_varlen_func(
        q, k, v, layout, comm=RingComm(), softmax_scale=SCALE, kernel=kernel
    )
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for name, got, want in zip(("out", "dq", "dk", "dv"), (out, *grads), expected, strict=True):
        assert got.shape == want.shape
        assert got.dtype == dtype
        if not want.numel():
            continue
        error = (got.double() - want).abs().flatten(1).amax(1) / max(1.0, want.abs().max().item())
        assert error.max() <= tolerance, (
            f"{case}: {name} is off by {error.max():.3g}, first at row {int(error.argmax())} "
            f"of {layout}"
        )


def _check_cases(rank, world, dtype, kernel_name, tolerance):
    for case in (name for name, (size, *_) in CASES.items() if size == world):
        _check_case(rank, case, dtype, kernel_name, tolerance)


@pytest.mark.parametrize("world", sorted({size for size, *_ in CASES.values()}))
@pytest.mark.parametrize(
    ("dtype", "kernel", "tolerance"),
    [
        (torch.float64, "cpu-flash", 1e-12),
        (torch.float64, "reference", 1e-12),
        (torch.float32, "cpu-flash", 3e-6),
        (torch.bfloat16, "cpu-flash", 2e-2),  # bf16 has 8 bits: 2^-8 = 4e-3 a rounding
    ],
)
def test_ring_equals_dense(world, dtype, kernel, tolerance):
    run_ranks(_check_cases, world, dtype, kernel, tolerance)


def _check_bf16_accumulates_in_fp32(rank, world):
    """With d ring steps the bf16 error must not grow with d: partial results are kept in fp32."""
    layout = RingLayout(ring=tuple(range(world)), ring_rank=rank, ring_seqlens=(512,))
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = torch.randn(4, 512, 2, DIM, generator=generator).bfloat16()
    want = dense_attention_grads(q, k, v, dout, SCALE)
    rows = torch.cat([torch.arange(a, b) for _, a, b in layout.spans()])
    leaves = [x[rows].clone().requires_grad_() for x in (q, k, v)]
    out = ring_attn_varlen_func(*leaves, layout, comm=RingComm(), softmax_scale=SCALE)
    grads = torch.autograd.grad(out, leaves, dout[rows])
    return [
        ((got.double() - full[rows]).norm() / full[rows].norm()).item()
        for got, full in zip((out, *grads), want, strict=True)
    ]


def test_bf16_error_does_not_grow_with_the_ring():
    """Accumulated in bf16, out, dq, dk and dv are off by 1.3x as much on 8 ranks as on 2."""
    two = torch.tensor(run_ranks(_check_bf16_accumulates_in_fp32, 2)).mean(0)
    eight = torch.tensor(run_ranks(_check_bf16_accumulates_in_fp32, 8)).mean(0)
    assert (eight < 1.2 * two).all(), f"out, dq, dk, dv: 2 ranks {two}, 8 ranks {eight}"


def test_merge_is_exact_for_far_apart_lse():
    out, block = torch.ones(3, 2, 4, dtype=torch.float64), torch.zeros(3, 2, 4, dtype=torch.float64)
    lse = torch.tensor([[500.0, 0.0, -700.0]] * 2, dtype=torch.float64)
    block_lse = torch.tensor([[-500.0, 0.0, 700.0]] * 2, dtype=torch.float64)
    merged, merged_lse = merge(out, lse, block, block_lse)
    torch.testing.assert_close(merged[:, 0, 0], torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(merged_lse, torch.logaddexp(lse, block_lse))


def _check_shift_checks_shape(rank, world):
    comm = RingComm()
    with pytest.raises(ValueError, match="the ranks' plans differ"):
        comm.shift(torch.zeros(2, 4, 2, 8), (0, 1), rank, (2, 4, 3, 8))
    with pytest.raises(ValueError, match="contiguous"):
        comm.shift(torch.zeros(4, 2, 2, 8).transpose(0, 1), (0, 1), rank, (2, 4, 2, 8))


def test_shift_checks_shape():
    run_ranks(_check_shift_checks_shape, 2)


def _die_in_ring(rank, world):
    layout = RingLayout(ring=(0, 1), ring_rank=rank, ring_seqlens=(64,))
    x = torch.randn(32, 2, 8)
    if rank == 1:
        raise RuntimeError("rank 1 leaves")
    ring_attn_varlen_func(x, x, x, layout, comm=RingComm())


def test_losing_a_ring_neighbor_raises_instead_of_hanging():
    with pytest.raises(RankError) as caught:
        run_ranks(_die_in_ring, 2, timeout_s=30)
    assert caught.value.ranks == [1, 0]
    assert "rank 0 failed" in str(caught.value) and "left waiting" not in str(caught.value)


def test_mismatched_inputs_are_refused():
    layout = RingLayout(local_seqlens=(4,))
    good = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="5, 4, 4 tokens; the layout has 4"):
        ring_attn_varlen_func(torch.zeros(5, 2, 8), good, good, layout)
    with pytest.raises(ValueError, match="multiple"):
        ring_attn_varlen_func(torch.zeros(4, 3, 8), good, good, layout)
    with pytest.raises(ValueError, match="causal"):
        ring_attn_varlen_func(good, good, good, layout, causal=False)
    with pytest.raises(ValueError, match="dtypes"):
        ring_attn_varlen_func(good, good.double(), good.double(), layout)
    ring = RingLayout(ring=(0, 1), ring_seqlens=(8,))
    with pytest.raises(ValueError, match="comm"):
        ring_attn_varlen_func(good, good, good, ring)
    with pytest.raises(ValueError, match="unknown; choose one of"):
        select_kernel(torch.device("cpu"), torch.float32, "flash-9")
    with pytest.raises(ValueError, match="needs bf16 or fp16 on cuda"):
        select_kernel(torch.device("cpu"), torch.float32, "torch-flash")


def test_gradcheck_on_one_rank():
    layout = RingLayout(local_seqlens=(5, 1, 3))
    q = torch.randn(9, 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(9, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda *x: ring_attn_varlen_func(*x, layout), (q, k, v))


def test_second_gradients_are_refused():
    """Backward treats out and lse as constants, so double backward would be silently wrong."""
    q, k, v = torch.randn(3, 5, 2, 8, dtype=torch.float64).requires_grad_().unbind()
    layout = RingLayout(local_seqlens=(5,))
    out = ring_attn_varlen_func(q, k, v, layout, kernel=KERNELS["reference"]())
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_statistics_that_nobody_takes_stay_bounded(monkeypatch):
    monkeypatch.setattr("hdp.attention.comm.MOST_WAITS", 4)
    comm = RingComm()
    for _ in range(1000):
        comm.swap([], []).wait()
    stats = comm.take_stats()
    assert 4 <= len(stats.waits) < 8 and len(stats.waits) + stats.waits_dropped == 1000
    assert comm.take_stats().waits == []
