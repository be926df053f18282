"""Attention from cu_seqlens and a group, without a plan, equals dense fp64 attention."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hdp.attention import varlen
from hdp.attention.varlen import zigzag_ring_attn_varlen_func, zigzag_rows
from tests.oracle import dense_attention_grads
from tests.run_ranks import RankError, run_ranks

HEADS, KV_HEADS, DIM = 4, 2, 16
SCALE = 0.3

LENGTHS = {
    "even": (16, 48),
    "odd": (37, 5, 101),
    "one token": (1,),
    "shorter than 2 * world": (3, 1, 2, 7),
    "long among short": (1, 2, 150, 1, 9),
}


def _bounds(seqlens):
    return list(accumulate(seqlens, initial=0))


def _whole(seqlens, dtype):
    """(q, k, v, dout) of the packed batch, and (out, dq, dk, dv) of the oracle in fp64."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(sum(seqlens), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    given = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    parts = [
        dense_attention_grads(*(x[start:stop] for x in given), SCALE)
        for start, stop in pairwise(_bounds(seqlens))
    ]
    return given, [torch.cat(x) for x in zip(*parts, strict=True)]


def _check_lengths(group, seqlens, dtype, tolerance, as_tensor):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    cu_seqlens = _bounds(seqlens)
    if as_tensor:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    (*qkv, dout), expected = _whole(seqlens, dtype)
    rows = zigzag_rows(cu_seqlens, rank, world)
    q, k, v = (x[rows].requires_grad_() for x in qkv)
    out = zigzag_ring_attn_varlen_func(q, k, v, cu_seqlens, group=group, softmax_scale=SCALE)
    grads = torch.autograd.grad(out, (q, k, v), dout[rows])
    for name, got, whole in zip(("out", "dq", "dk", "dv"), (out, *grads), expected, strict=True):
        want = whole[rows]
        assert got.shape == want.shape
        assert got.dtype == dtype
        if not want.numel():
            continue
        error = (got.double() - want).abs().flatten(1).amax(1) / max(1.0, whole.abs().max().item())
        assert error.max() <= tolerance, (
            f"{seqlens} on rank {rank} of {world}: {name} is off by {error.max():.3g}, "
            f"first at row {int(rows[error.argmax()])} of the batch"
        )


def _check_world(rank, world, dtype, tolerance):
    for i, seqlens in enumerate(LENGTHS.values()):
        _check_lengths(None, seqlens, dtype, tolerance, as_tensor=bool(i % 2))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 2e-2)],
)
def test_equals_dense(world, dtype, tolerance):
    run_ranks(_check_world, world, dtype, tolerance)


def _check_subgroups(rank, world):
    """Two groups run at the same time, on different batches."""
    groups = [dist.new_group(ranks) for ranks in ([1, 3, 4], [0, 2])]
    mine = rank not in (1, 3, 4)
    seqlens = LENGTHS["odd"] if mine else LENGTHS["long among short"]
    _check_lengths(groups[mine], seqlens, torch.float64, 1e-12, as_tensor=True)
    x = torch.zeros(4, 1, DIM)
    with pytest.raises(ValueError, match=f"rank {rank} of the default group is not in `group`"):
        zigzag_ring_attn_varlen_func(x, x, x, [0, 4], group=groups[not mine])


def test_groups_of_some_ranks():
    run_ranks(_check_subgroups, 5)


def _gather_back(rank, world):
    """The module docstring's example: shard, attend, put back."""
    cu_seqlens = _bounds(LENGTHS["odd"])
    (q, k, v, _), (expected, *_) = _whole(LENGTHS["odd"], torch.float64)
    rows = zigzag_rows(cu_seqlens, rank, world)
    out = zigzag_ring_attn_varlen_func(q[rows], k[rows], v[rows], cu_seqlens, softmax_scale=SCALE)
    parts = [None] * world
    dist.all_gather_object(parts, out)
    whole = torch.full_like(q, float("nan"))
    for other, part in enumerate(parts):
        whole[zigzag_rows(cu_seqlens, other, world)] = part
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-12)


def test_outputs_go_back_in_the_order_of_the_batch():
    run_ranks(_gather_back, 3)


def test_without_a_process_group_one_rank_holds_all():
    (*qkv, _), (expected, *_) = _whole((5, 1, 9), torch.float64)
    out = zigzag_ring_attn_varlen_func(*qkv, [0, 5, 6, 15], softmax_scale=SCALE)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert zigzag_rows([0, 5, 6, 15], 0, 1).tolist() == list(range(15))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("seqlens", LENGTHS.values(), ids=LENGTHS)
def test_rows_cover_the_batch_once_and_evenly(world, seqlens):
    cu_seqlens = _bounds(seqlens)
    shards = [zigzag_rows(torch.tensor(cu_seqlens), rank, world) for rank in range(world)]
    assert torch.cat(shards).sort().values.tolist() == list(range(sum(seqlens)))
    for rows in shards:
        assert rows.dtype == torch.int64
        for start, stop in pairwise(cu_seqlens):
            held = rows[(rows >= start) & (rows < stop)].tolist()
            assert held == sorted(held)  # a shard is a causal sequence of its own
            assert len(held) <= -(-(stop - start) // world)


def test_layers_share_one_layout(monkeypatch):
    """32 layers build one layout and read cu_seqlens once: reading a CUDA tensor waits."""
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x) or tolist(x))
    monkeypatch.setattr(varlen, "_is_worth_keeping", lambda tensor: True)  # as on CUDA
    varlen._layout.cache_clear()
    x, cu_seqlens = torch.zeros(10, 1, DIM), torch.tensor([0, 4, 10], dtype=torch.int32)
    for _ in range(32):
        zigzag_ring_attn_varlen_func(x, x, x, cu_seqlens)
    assert varlen._layout.cache_info().misses == 1
    assert sum(read is cu_seqlens for read in reads) == 1


@pytest.mark.parametrize("kept", [True, False], ids=["as on CUDA", "CPU"])
def test_modified_cu_seqlens_are_read_again(monkeypatch, kept):
    if kept:
        keep = varlen._is_worth_keeping
        monkeypatch.setattr(varlen, "_is_worth_keeping", lambda x: keep(x) or not x.is_inference())
    x, cu_seqlens = torch.randn(10, 1, DIM), torch.tensor([0, 4, 10])
    before = zigzag_ring_attn_varlen_func(x, x, x, cu_seqlens)
    cu_seqlens[1] = 6
    after = zigzag_ring_attn_varlen_func(x, x, x, cu_seqlens)
    torch.testing.assert_close(after, zigzag_ring_attn_varlen_func(x, x, x, [0, 6, 10]))
    assert not torch.equal(before, after)
    with torch.inference_mode():
        made = torch.tensor([0, 4, 10])
        torch.testing.assert_close(zigzag_ring_attn_varlen_func(x, x, x, made), before)


def test_writes_that_torch_does_not_count_are_read():
    buffer = np.array([0, 4, 10])
    bounds = torch.from_numpy(buffer)
    assert zigzag_rows(bounds, 0, 2).tolist() == [0, 3, 4, 5, 9]
    buffer[1] = 6
    assert zigzag_rows(bounds, 0, 2).tolist() == zigzag_rows([0, 6, 10], 0, 2).tolist()


def test_mismatched_inputs_are_refused():
    x = torch.zeros(8, 2, DIM)
    for cu_seqlens, message in (
        ([0, 5, 5, 8], r"cu_seqlens\[2\] is 5 after 5: entries must increase; drop empty"),
        ([0, 9, 8], r"cu_seqlens\[2\] is 8 after 9"),
        ([1, 8], r"cu_seqlens \[1, 8\] must start with 0"),
        ([0], "at least one sequence"),
        ([0, 8.0], "cu_seqlens must be integers"),
        (torch.tensor([0.0, 8.0]), r"cu_seqlens is \(2,\) torch.float32; it must be"),
        (torch.tensor([[0, 8]]), r"cu_seqlens is \(1, 2\)"),
        ([0, 9], r"8, 8, 8 rows; rank 0 of 1 holds 9 of the 9 tokens: pass x\[zigzag_rows\("),
    ):
        with pytest.raises(ValueError, match=message):
            zigzag_ring_attn_varlen_func(x, x, x, cu_seqlens)
    with pytest.raises(ValueError, match=r"dtypes torch.float32, torch.float64, .*; use one"):
        zigzag_ring_attn_varlen_func(x, x.double(), x, [0, 8])
    with pytest.raises(ValueError, match="causal"):
        zigzag_ring_attn_varlen_func(x, x, x, [0, 8], causal=False)
    with pytest.raises(ValueError, match="num_heads, head_dim"):
        zigzag_ring_attn_varlen_func(x[..., 0], x[..., 0], x[..., 0], [0, 8])
    with pytest.raises(ValueError, match=r"rank 2 is not in 0\.\.1"):
        zigzag_rows([0, 8], 2, 2)


def _pass_unsharded(rank, world):
    x = torch.zeros(9, 2, DIM)
    zigzag_ring_attn_varlen_func(x, x, x, [0, 9])


def test_whole_tensors_instead_of_shards_are_refused():
    with pytest.raises(RankError, match=r"9, 9, 9 rows; rank 0 of 2 holds 5 of the 9 tokens"):
        run_ranks(_pass_unsharded, 2)
