"""pack_rank(): labels and positions do not depend on how sequences are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdp.data.pack import IGNORE_INDEX, Sample, pack_rank
from hdp.scheduler import StepPlan
from tests.random_plans import random_plan


class Recorded(np.ndarray):
    """An array that records which elements were read."""

    def __getitem__(self, key):
        if isinstance(key, slice):
            self.reads += list(range(*key.indices(len(self))))
        return np.asarray(super().__getitem__(key))


def _sample(n, rng, masked):
    return Sample(
        input_ids=rng.integers(0, 50_000, n).astype(np.uint16),
        loss_mask=rng.random(n) < 0.5 if masked else None,
    )


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 6), st.integers(0, 99))
def test_every_token_is_packed_once_with_its_label(seqlens, hdp_size, seed):
    rng = np.random.default_rng(seed)
    samples = [_sample(n, rng, masked=bool(i % 2)) for i, n in enumerate(seqlens)]
    plan = random_plan(seqlens, hdp_size, seed)
    got = {}
    for rank in range(hdp_size):
        for index, microbatch in enumerate(plan.microbatches(rank)):
            batch = pack_rank(plan, rank, samples)[index]
            assert batch.seqs == tuple(piece.seq for piece in microbatch.pieces)
            if not microbatch.num_tokens(rank):  # padding
                assert batch.labels.tolist() == [IGNORE_INDEX]
                assert batch.layout.total_tokens == batch.total_tokens == 1
                continue
            rows = zip(
                batch.input_ids.tolist(),
                batch.position_ids.tolist(),
                batch.labels.tolist(),
                strict=True,
            )
            owners = [
                batch.seqs[i] for i, start, stop in batch.layout.spans() for _ in range(start, stop)
            ]
            for owner, (token, position, label) in zip(owners, rows, strict=True):
                assert (owner, position) not in got
                got[owner, position] = token, label
    for i, sample in enumerate(samples):
        for p, token in enumerate(sample.input_ids.tolist()):
            last = p == seqlens[i] - 1
            has_loss = not last and (sample.loss_mask is None or sample.loss_mask[p + 1])
            label = sample.input_ids[p + 1] if has_loss else IGNORE_INDEX
            assert got.pop((i, p)) == (token, label)
    assert not got


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 99))
def test_columns_are_shifted_like_labels(seqlens, hdp_size, seed):
    """A position has the entry of the token that it predicts, for any cut; 0 if it has none."""
    rng = np.random.default_rng(seed)
    samples = [
        Sample(
            input_ids=rng.integers(0, 9, n),
            columns={
                "advantages": rng.random(n).astype(np.float32),
                "teacher": rng.random((n, 3)),
                "is_tool": rng.random(n) < 0.5,
            },
        )
        for n in seqlens
    ]
    plan = random_plan(seqlens, hdp_size, seed)
    seen = 0
    for rank in range(hdp_size):
        batches = pack_rank(plan, rank, samples)
        for batch, microbatch in zip(batches, plan.microbatches(rank), strict=True):
            assert {name: x.dtype for name, x in batch.columns.items()} == {
                "advantages": torch.float32,
                "teacher": torch.float64,
                "is_tool": torch.bool,
            }
            assert {len(x) for x in batch.columns.values()} == {batch.total_tokens}
            if not microbatch.num_tokens(rank):  # padding
                continue
            rows = [(batch.seqs[i], p) for i, a, b in batch.layout.spans() for p in range(a, b)]
            for row, (seq, p) in enumerate(rows):
                for name, column in samples[seq].columns.items():
                    want = column[p + 1] if p + 1 < seqlens[seq] else np.zeros_like(column[0])
                    assert np.array_equal(batch.columns[name][row], want)
                seen += 1
    assert seen == sum(seqlens)


def test_ranks_without_tokens_have_the_same_columns():
    columns = {"advantages": np.ones(2, np.float32), "teacher": np.ones((2, 4))}
    samples = [Sample(input_ids=np.arange(2), columns=columns)]
    # rank 1 of the ring has no tokens, rank 2 no microbatch, rank 3 an empty one
    ring = StepPlan.from_lists([2], [[0, 1]], [[[0]], [[0]], [], [[]]], max_tokens_per_rank=2)
    shapes = {
        rank: {name: (x.shape[1:], x.dtype) for name, x in batch.columns.items()}
        for rank in range(4)
        for batch in pack_rank(ring, rank, samples)
    }
    assert len(shapes) == 4 and all(shape == shapes[0] for shape in shapes.values())
    for rank in (2, 3):
        (batch,) = pack_rank(ring, rank, samples)
        assert batch.total_tokens == 1 and not batch.columns["teacher"].any()


def test_what_the_plan_gathers_is_gathered():
    """On every rank of the ring, also on those that got no token of it."""
    rng = np.random.default_rng(0)
    lists = [[[1], [0]], [[1]], [[1], [0]], [[1, 2]]]
    rings = [[0, 2], [3, 1, 0, 2], [3]]
    plan = StepPlan.from_lists(
        [9, 2, 5], rings, lists, gathered=[False, True, False], max_tokens_per_rank=16
    ).validate()
    samples = [_sample(n, rng, masked=False) for n in (9, 2, 5)]
    for rank in range(4):
        layouts = [batch.layout for batch in pack_rank(plan, rank, samples)]
        assert [layout.gathered for layout in layouts] == [True, False][: len(layouts)]
        assert layouts[0].ring == (3, 1, 0, 2)
    assert any(pack_rank(plan, rank, samples)[0].layout.num_ring_tokens == 0 for rank in range(4))


def test_each_sample_is_read_once():
    requested = []

    class Source:
        def __getitem__(self, index):
            requested.append(index)
            return Sample(input_ids=np.arange(40 + index))

    seqlens = [40 + index for index in range(5)]
    plan = StepPlan.from_lists(
        seqlens,
        [[0, 1], [0], [1], [0], [0]],
        [[[0, 1], [3], [4]], [[0], [2]]],
        max_tokens_per_rank=100,
    )
    pack_rank(plan, 0, Source())
    assert requested == [0, 1, 3, 4]


def test_columns_with_wrong_length_or_name_are_rejected():
    ids = np.arange(4)
    with pytest.raises(ValueError, match="advantages has 3 entries for 4 tokens"):
        Sample(input_ids=ids, columns={"advantages": np.zeros(3)})
    with pytest.raises(ValueError, match="loss_mask has 5 entries for 4 tokens"):
        Sample(input_ids=ids, loss_mask=np.zeros(5, bool))
    samples = [
        Sample(input_ids=ids, columns={"advantages": np.zeros(4)}),
        Sample(input_ids=ids, columns={"weights": np.zeros(4)}),
    ]
    plan = StepPlan.from_lists([4, 4], [[0], [0]], [[[0, 1]]], max_tokens_per_rank=8)
    with pytest.raises(ValueError, match=r"sequence 0 has columns advantages .* sequence 1 has we"):
        pack_rank(plan, 0, samples)


def test_only_own_tokens_are_read():
    ids = np.arange(1000).view(Recorded)
    ids.reads = []
    plan = StepPlan.from_lists([1000], [[0, 1, 2, 3]], [[[0]]] * 4, max_tokens_per_rank=250)
    batch = pack_rank(plan, 1, [Sample(input_ids=ids)])[0]
    assert batch.input_ids.tolist() == [*range(125, 250), *range(750, 875)]
    # own chunks, and one more token each for the labels
    assert set(ids.reads) == {*range(125, 251), *range(750, 876)}


def test_plan_for_other_data_is_rejected():
    plan = StepPlan.from_lists([5], [[0]], [[[0]]], max_tokens_per_rank=8)
    with pytest.raises(ValueError, match="has 6 tokens, but the plan was made for 5"):
        pack_rank(plan, 0, [Sample(input_ids=np.arange(6))])


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_padding_belongs_to_no_sequence(seqlens, hdp_size, multiple, more, seed):
    """Rows in front of it are those of the unpadded batch; empty microbatches are nothing else."""
    rng = np.random.default_rng(seed)
    columns = {"advantages": (np.float32, ()), "teacher": (np.float64, (2,))}
    samples = [
        Sample(
            input_ids=rng.integers(1, 9, n),
            columns={k: np.ones((n, *shape), dtype) for k, (dtype, shape) in columns.items()},
        )
        for n in seqlens
    ]
    plan = random_plan(seqlens, hdp_size, seed)
    for rank in range(hdp_size):
        plain = pack_rank(plan, rank, samples)
        count = len(plain) + more
        padded = pack_rank(plan, rank, samples, pad_to_multiple=multiple, num_microbatches=count)
        assert len(padded) == count
        for i, batch in enumerate(padded):
            assert batch.total_tokens % multiple == 0
            assert batch.layout.total_tokens == batch.total_tokens
            real = 0
            if i < len(plain):
                real = len(plain[i].labels) if plain[i].seqs else 0
                assert batch.seqs == plain[i].seqs
                for ours, theirs in zip(batch.tensors(), plain[i].tensors(), strict=True):
                    assert torch.equal(ours[:real], theirs[:real])
            assert (batch.labels[real:] == IGNORE_INDEX).all() and batch.total_tokens >= 1
            assert not any(column[real:].any() for column in batch.columns.values() if not real)
            assert set(batch.columns) == set(columns)


def test_fewer_microbatches_than_the_plan_has_are_refused():
    plan = StepPlan.from_lists([2, 3], [[0], [0]], [[[0], [1]]], max_tokens_per_rank=4)
    samples = [Sample(input_ids=np.arange(n)) for n in (2, 3)]
    with pytest.raises(ValueError, match=r"num_microbatches=1, but the plan has 2 for rank 0"):
        pack_rank(plan, 0, samples, num_microbatches=1)
    with pytest.raises(ValueError, match="pad_to_multiple=0 must be at least 1"):
        pack_rank(plan, 0, samples, pad_to_multiple=0)
