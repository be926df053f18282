"""Sums over sequences that a ring holds in parts; and whole sequences from each rank's rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hdp.attention.comm import RingComm
from hdp.data.pack import pack_rank
from hdp.distributed.mesh import HDPMesh
from hdp.objectives.sequences import is_owner, row_seqs, sequence_sums
from hdp.training.token_rows import token_rows
from tests.random_plans import random_plan
from tests.run_ranks import run_ranks
from tests.tiny_models import random_samples
from tests.training.steps import make_batch

SEQLENS = [1, 9, 2, 30, 17, 3, 1]


def _values(seq: int, start: int, stop: int) -> torch.Tensor:
    """(stop - start, 2) numbers of these tokens, the same on any rank."""
    rng = np.random.default_rng(seq)
    return torch.from_numpy(rng.normal(size=(SEQLENS[seq], 2))[start:stop])


def _rows(batch) -> torch.Tensor:
    parts = [
        _values(batch.seqs[place], start, stop)
        if place < len(batch.seqs)
        else torch.full((stop - start, 2), torch.nan, dtype=torch.float64)
        for place, start, stop in batch.layout.spans()
    ]
    return torch.cat(parts)


def _sums(rank, world, seed):
    with HDPMesh.create(device="cpu") as mesh:
        comm = RingComm(mesh.hdp_group)
        plan = random_plan(SEQLENS, world, seed)
        sums, owned, gradients = {}, [], {}
        for batch in pack_rank(plan, rank, random_samples(SEQLENS)):
            rows = _rows(batch).requires_grad_()
            found = sequence_sums(rows, batch, comm)
            assert found.shape == (len(batch.seqs), 2)
            found.square().sum().backward()
            for place, seq in enumerate(batch.seqs):
                sums[seq] = found[place].detach()
                own = rows.grad[row_seqs(batch) == place]
                gradients[seq] = own
            owned += [batch.seqs[i] for i in torch.nonzero(is_owner(batch))[:, 0].tolist()]
        return sums, owned, gradients


@pytest.mark.parametrize(("world", "seed"), [(1, 0), (2, 1), (3, 2), (4, 3), (4, 4)])
def test_sums_equal_dense(world, seed):
    """And all ranks of a ring have the same bits."""
    results = run_ranks(_sums, world, seed)
    for seq, seqlen in enumerate(SEQLENS):
        found = [sums[seq] for sums, _, _ in results if seq in sums]
        torch.testing.assert_close(found[0], _values(seq, 0, seqlen).sum(0), rtol=1e-13, atol=1e-13)
        assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize(("world", "seed"), [(1, 0), (4, 3)])
def test_gradient_is_of_own_rows(world, seed):
    """Of (sum)^2: 2 * sum at each row, once over all ranks of the ring."""
    results = run_ranks(_sums, world, seed)
    for seq, seqlen in enumerate(SEQLENS):
        parts = [gradients[seq] for _, _, gradients in results if seq in gradients]
        rows = torch.cat(parts)
        assert len(rows) == seqlen
        want = 2 * _values(seq, 0, seqlen).sum(0)
        torch.testing.assert_close(rows, want.expand(seqlen, 2), rtol=1e-12, atol=1e-12)


def test_owners_count_once():
    for seed in range(3):
        owned = [seq for _, mine, _ in run_ranks(_sums, 3, seed) for seq in mine]
        assert sorted(owned) == list(range(len(SEQLENS)))


def test_a_ring_needs_a_communicator():
    plan = random_plan([40], 2, 1)
    while plan.degrees[0] < 2:
        plan = random_plan([40], 2, int(plan.digest[:6], 16) % 1000)
    [batch] = [b for b in pack_rank(plan, 0, random_samples([40])) if b.seqs]
    with pytest.raises(ValueError, match=r"ring of ranks .* comm=context\.comm"):
        sequence_sums(batch.labels.double(), batch, None)


def _whole(rank, world, seed):
    with HDPMesh.create(device="cpu") as mesh:
        step = make_batch(random_plan(SEQLENS, world, seed), rank, random_samples(SEQLENS))
        outputs = [_rows(batch)[:, 0] for batch in step.batches]
        return token_rows(mesh, step, outputs)


@pytest.mark.parametrize("world", [1, 3])
def test_rows_become_whole_sequences_aligned_with_tokens(world):
    for rows in run_ranks(_whole, world, 5):
        for seq, (row, seqlen) in enumerate(zip(rows, SEQLENS, strict=True)):
            want = np.concatenate([[0.0], _values(seq, 0, seqlen)[:-1, 0].numpy()])
            np.testing.assert_array_equal(row, want)
