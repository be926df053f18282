"""A gathered ring computes the same as ring steps; the layout decides which one runs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from hdp.attention.comm import RingComm
from hdp.attention.gather import _Shares
from hdp.attention.layout import RingLayout
from hdp.attention.ring import ring_attn_varlen_func
from tests.attention.test_ring import SCALE, _data, _layouts, _shard
from tests.run_ranks import run_ranks

# (world, ring, length on the ring, lengths on each single rank), as in test_attention
CASES = {
    "two ranks": (2, (1, 0), (32,), {}),
    "three, plus local": (3, (2, 0, 1), (101,), {1: (9,), 0: (1, 2)}),
    "subset of five": (5, (4, 1, 3), (38,), {0: (5,), 3: (2,)}),
    "length 1 on four": (4, (0, 1, 2, 3), (1,), {0: (2,), 2: (1,)}),
    "shorter than the ring": (4, (1, 3, 0, 2), (3,), {}),
    "one token a chunk": (4, (0, 1, 2, 3), (8,), {3: (4,)}),
    "fewer tokens than chunks": (3, (0, 1, 2), (5,), {0: (1,)}),
    "all of eight": (8, (3, 0, 6, 1, 7, 2, 5, 4), (131,), {5: (7,)}),
}


def _check_cases(rank, world, dtype, kernel_name, tolerance):
    from hdp.attention.kernels import KERNELS

    for name, case in CASES.items():
        if case[0] != world:
            continue
        layout = list(_layouts(*case))[rank]
        layout = replace(layout, gathered=bool(layout.ring))
        data = _data(*case, dtype)
        parts = [_shard(layout, rank, {key: x[0][j] for key, x in data.items()}) for j in range(4)]
        want = [_shard(layout, rank, {key: x[1][j] for key, x in data.items()}) for j in range(4)]
        if parts[0] is None:
            parts = [torch.empty(0, h, 16, dtype=dtype) for h in (4, 2, 2, 4)]
            want = [x.double() for x in (parts[3], *parts[:3])]
        leaves = [x.clone().requires_grad_() for x in parts[:3]]
        comm = RingComm()
        kernel = KERNELS[kernel_name]()
        out = ring_attn_varlen_func(*leaves, layout, comm=comm, softmax_scale=SCALE, kernel=kernel)
        grads = torch.autograd.grad(out, leaves, parts[3])
        if rank in case[1] and layout.ring_size > 1:
            assert len(comm.stats.waits) == 3, "keys forward, keys backward, gradients"
        for label, got, expected in zip(
            ("out", "dq", "dk", "dv"), (out, *grads), want, strict=True
        ):
            assert got.shape == expected.shape and got.dtype == dtype
            if expected.numel():
                error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
                assert error <= tolerance, f"{name}, rank {rank}: {label} off by {error:.2e}"


@pytest.mark.parametrize("world", sorted({size for size, *_ in CASES.values()}))
@pytest.mark.parametrize(
    ("dtype", "kernel", "tolerance"),
    [
        (torch.float64, "cpu-flash", 1e-12),
        (torch.float64, "reference", 1e-12),
        (torch.float32, "cpu-flash", 3e-6),
        (torch.bfloat16, "cpu-flash", 2e-2),
    ],
)
def test_gathered_equals_dense(world, dtype, kernel, tolerance):
    run_ranks(_check_cases, world, dtype, kernel, tolerance)


def _compare_modes(rank, world):
    """Many random lengths: gather and ring agree to rounding, and are bitwise repeatable."""
    lengths = random.Random(5)
    for _ in range(12):
        seqlen, local = lengths.randint(1, 90), lengths.randint(0, 9)
        layout = RingLayout(
            ring=tuple(range(world)),
            ring_rank=rank,
            ring_seqlens=(seqlen,),
            local_seqlens=(local,) if local else (),
        )
        torch.manual_seed(rank)
        leaves = [
            torch.randn(layout.total_tokens, h, 8, dtype=torch.float64, requires_grad=True)
            for h in (4, 2, 2)
        ]
        results = []
        for gathered in (False, True, True):
            layout = replace(layout, gathered=gathered)
            out = ring_attn_varlen_func(*leaves, layout, comm=RingComm())
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
        for ring, gathered, again in zip(*results, strict=True):
            torch.testing.assert_close(gathered, ring, rtol=0, atol=1e-12)
            assert torch.equal(gathered, again)


def test_gathered_equals_ring():
    run_ranks(_compare_modes, 4)


def _packed_ring(rank, world):
    """Several sequences on one ring use ring steps."""
    layout = RingLayout(ring=(0, 1, 2), ring_rank=rank, ring_seqlens=(20, 9))
    x = torch.randn(layout.total_tokens, 2, 8)
    comm = RingComm()
    ring_attn_varlen_func(x, x, x, layout, comm=comm)
    return len(comm.stats.waits)


def test_packed_zigzag_uses_ring_steps():
    assert run_ranks(_packed_ring, 3) == [2, 2, 2]
    with pytest.raises(ValueError, match=r"\(20, 9\): a gathered ring takes exactly one"):
        RingLayout(ring=(0, 1, 2), ring_seqlens=(20, 9), gathered=True)
    with pytest.raises(ValueError, match="gathered"):
        RingLayout(local_seqlens=(9,), gathered=True)


def _bytes_sent(rank, world):
    layout = RingLayout(ring=tuple(range(world)), ring_rank=rank, ring_seqlens=(80,))
    sent = []
    for gathered in (False, True):
        comm = RingComm()
        x = torch.zeros(layout.total_tokens, 2, 8)
        ring_attn_varlen_func(x, x, x, replace(layout, gathered=gathered), comm=comm)
        dist.barrier()
        sent.append(comm.take_stats().bytes_sent)
    return sent


def test_only_visible_keys_are_sent():
    """The early chunk to later positions, both to earlier ones: 3/4 of the ring's bytes in all."""
    sent = run_ranks(_bytes_sent, 4)
    chunk = 10 * 2 * 8 * 4 * 2  # rows, heads, head_dim, bytes, keys and values
    assert [ring for ring, _ in sent] == [3 * 2 * chunk] * 4
    assert [gathered for _, gathered in sent] == [chunk * (3 + rank) for rank in range(4)]


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("seqlen", [1, 2, 5, 13, 64])
def test_shares_of_all_ranks_fit(size, seqlen):
    """Each rank sends what its peer expects, and together the blocks are the causal pairs."""
    shares = [
        _Shares(RingLayout(ring=tuple(range(size)), ring_rank=rank, ring_seqlens=(seqlen,)))
        for rank in range(size)
    ]
    for mine in shares:
        rank = mine.layout.ring_rank
        for other, (start, stop) in zip(mine.others, mine.key_spans, strict=True):
            assert shares[other].needed(other, rank) == stop - start
        early, late = mine.chunks[rank]
        seen = sum((rows.stop - rows.start) * keys for rows, keys, _ in mine.blocks)
        causal = (early + late) * (early + late + 1) // 2  # what the first block does
        position = sum(e for e, _ in mine.chunks[:rank])
        late_at = seqlen - sum(n for _, n in mine.chunks[: rank + 1])
        want = sum(position + i + 1 for i in range(early)) + sum(
            late_at + i + 1 for i in range(late)
        )
        assert seen + causal == want
