"""pack(): labels and positions are those of the whole sequence, whatever the cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.data.pack import IGNORE_INDEX, Sample, pack
from hdp.scheduler import StepPlan
from tests.random_plans import random_plan


class Recorded(np.ndarray):
    """An array that notes which elements were read."""

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
def test_every_token_has_its_place_and_label(seqlens, hdp_size, seed):
    rng = np.random.default_rng(seed)
    samples = [_sample(n, rng, masked=bool(i % 2)) for i, n in enumerate(seqlens)]
    plan = random_plan(seqlens, hdp_size, seed)
    got = {}
    for rank in range(hdp_size):
        for index, microbatch in enumerate(plan.microbatches(rank)):
            batch = pack(plan, rank, index, samples)
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
            learn = not last and (sample.loss_mask is None or sample.loss_mask[p + 1])
            label = sample.input_ids[p + 1] if learn else IGNORE_INDEX
            assert got.pop((i, p)) == (token, label)
    assert not got


def test_only_own_tokens_are_read():
    ids = np.arange(1000).view(Recorded)
    ids.reads = []
    plan = StepPlan.from_lists([1000], [[0, 1, 2, 3]], [[[0]]] * 4, max_tokens_per_rank=250)
    batch = pack(plan, 1, 0, [Sample(input_ids=ids)])
    assert batch.input_ids.tolist() == [*range(125, 250), *range(750, 875)]
    # own chunks, and shifted by one for the labels
    assert set(ids.reads) == {*range(125, 251), *range(750, 876)}


def test_a_plan_for_other_data_is_refused():
    plan = StepPlan.from_lists([5], [[0]], [[[0]]], max_tokens_per_rank=8)
    with pytest.raises(ValueError, match="has 6 tokens, the plan was made for 5"):
        pack(plan, 0, 0, [Sample(input_ids=np.arange(6))])
