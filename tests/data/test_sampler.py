"""The sampler's invariants, by name, over random lengths, budgets and seeds."""

from __future__ import annotations

import json
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.data.sampler import Sampler, permute

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=200).map(np.array)
seeds = st.integers(0, 2**70)
budgets = st.integers(1, 1000)


def epoch_batches(sampler: Sampler, epoch: int) -> list[np.ndarray]:
    position, batches = (epoch, 0), []
    while position[0] == epoch:
        ids, position = sampler.batch_at(position)
        batches.append(ids)
    assert position == (epoch + 1, 0)
    return batches


@given(lengths, seeds, budgets, st.integers(0, 5), st.booleans())
def test_once_per_epoch(seqlens, seed, batch_tokens, epoch, shuffle):
    sampler = Sampler(seqlens, seed=seed, batch_tokens=batch_tokens, shuffle=shuffle)
    batches = epoch_batches(sampler, epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(seqlens)))
    assert sampler.num_batches(epoch) == len(batches)


@given(lengths, seeds, budgets)
def test_within_budget(seqlens, seed, batch_tokens):
    for ids in epoch_batches(Sampler(seqlens, seed=seed, batch_tokens=batch_tokens), 0):
        assert len(ids) == 1 or seqlens[ids].sum() <= batch_tokens


@given(lengths, seeds, budgets)
def test_batches_are_full(seqlens, seed, batch_tokens):
    batches = epoch_batches(Sampler(seqlens, seed=seed, batch_tokens=batch_tokens), 0)
    for ids, following in pairwise(batches):
        assert seqlens[ids].sum() + seqlens[following[0]] > batch_tokens


@given(lengths, seeds, budgets, st.lists(st.integers(0, 30), max_size=8))
def test_position_determines_batch(seqlens, seed, batch_tokens, steps):
    """Iterating, or calling batch_at in any order on any instance, gives the same batches."""
    sampler = Sampler(seqlens, seed=seed, batch_tokens=batch_tokens)
    positions, position, batches = [], (0, 0), []
    for _ in range(31):
        positions.append(position)
        ids, position = sampler.batch_at(position)
        batches.append(ids)
    other = Sampler(seqlens.astype(np.uint16), seed=seed, batch_tokens=batch_tokens)
    for step in steps:
        np.testing.assert_array_equal(other.batch_at(positions[step])[0], batches[step])
    for ids, expected in zip(islice(sampler, 31), batches, strict=True):
        np.testing.assert_array_equal(ids, expected)


@given(lengths, seeds, budgets, st.integers(0, 40))
def test_state_survives_json_and_resumes(seqlens, seed, batch_tokens, num_done):
    sampler = Sampler(seqlens, seed=seed, batch_tokens=batch_tokens)
    for _ in islice(sampler, num_done):
        pass
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = Sampler(seqlens, seed=seed, batch_tokens=batch_tokens)
    resumed.load_state_dict(state)
    for a, b in zip(islice(sampler, 5), islice(resumed, 5), strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.integers(1, 5000), st.integers(0, 2**64))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key=key)) == list(range(size))


@given(st.integers(1, 2**62), st.integers(0, 2**64), st.data())
def test_permute_stays_inside_and_is_injective_at_any_size(size, key, data):
    places = data.draw(st.lists(st.integers(0, size - 1), max_size=50, unique=True))
    images = permute(np.array(places, dtype=np.int64), size, key=key)
    assert len(set(images.tolist())) == len(places)
    assert all(0 <= image < size for image in images)


def test_orders_are_uniform():
    """Every order of four items is about equally likely, and so is every place for every item."""
    from collections import Counter

    orders = Counter(tuple(permute(np.arange(4), 4, key=key)) for key in range(12000))
    assert len(orders) == 24
    assert max(abs(count - 500) for count in orders.values()) < 120  # 5 standard deviations
    counts = np.zeros((30, 30))
    for key in range(6000):
        counts[np.arange(30), permute(np.arange(30), 30, key=key)] += 1
    chi2 = ((counts - 200) ** 2 / 200).sum() / 29**2
    assert 0.85 < chi2 < 1.15, chi2


def test_order_is_pinned():
    """A changed order would break resuming existing runs."""
    sampler = Sampler(np.full(10, 5), seed=1, batch_tokens=50)
    assert [sampler.batch_at((epoch, 0))[0].tolist() for epoch in (0, 1)] == PINNED


PINNED = [[5, 1, 2, 3, 4, 6, 7, 9, 0, 8], [8, 0, 6, 5, 3, 1, 7, 4, 9, 2]]


def test_epochs_and_seeds_differ():
    orders = {
        tuple(Sampler(np.ones(50), seed=seed, batch_sequences=50).batch_at((epoch, 0))[0])
        for seed in range(10)
        for epoch in range(10)
    }
    assert len(orders) == 100


def test_long_sequence_is_a_batch_of_its_own():
    sampler = Sampler(np.array([5, 100, 5]), seed=0, batch_tokens=20, shuffle=False)
    assert [ids.tolist() for ids in epoch_batches(sampler, 0)] == [[0], [1], [2]]


def test_batch_sequences():
    sampler = Sampler(np.arange(1, 11), seed=3, batch_sequences=4)
    assert [len(ids) for ids in epoch_batches(sampler, 0)] == [4, 4, 2]


def test_window_grows_when_the_mean_length_misleads():
    """A batch with many more sequences than the mean length suggests."""
    seqlens = np.array([1] * 5000 + [10**9] * 5000)
    sampler = Sampler(seqlens, batch_tokens=5000, shuffle=False)
    assert len(sampler.batch_at((0, 0))[0]) == 5000


def test_huge_dataset_costs_only_one_batch():
    """100 million sequences of the same length: nothing of that size is allocated."""
    import tracemalloc

    seqlens = np.broadcast_to(np.int64(1000), (100_000_000,))
    tracemalloc.start()
    sampler = Sampler(seqlens, seed=1, batch_tokens=1 << 20)
    ids, position = sampler.batch_at((7, 99_999_990))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(ids) == 10 and position == (8, 0)
    assert peak < 10 << 20, peak


def test_saved_epoch_continues_with_another_budget():
    seqlens = np.arange(1, 101)
    small = Sampler(seqlens, seed=1, batch_tokens=100)
    seen = list(islice(small, 7))
    large = Sampler(seqlens, seed=1, batch_tokens=1000)
    large.load_state_dict(small.state_dict())
    while large.position[0] == 0:
        seen.append(next(iter(large)))
    assert sorted(np.concatenate(seen)) == list(range(100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of them"),
        ({"batch_tokens": 1, "batch_sequences": 1}, "give exactly one of them"),
        ({"batch_tokens": 0}, "batch size 0 must be at least 1"),
        ({"batch_tokens": 5, "seed": -1}, "seed -1 at least 0"),
    ],
)
def test_bad_budgets(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(np.array([1, 2]), **arguments)


def test_bad_positions_and_states():
    with pytest.raises(ValueError, match="empty"):
        Sampler(np.array([], dtype=np.int64), batch_tokens=1)
    sampler = Sampler(np.array([3, 4]), batch_tokens=5)
    for position in ((0, 2), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="another dataset"):
            sampler.batch_at(position)
    state = sampler.state_dict()
    with pytest.raises(ValueError, match=r"seed 0 -> 1"):
        Sampler(np.array([3, 4]), batch_tokens=5, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"seqlens_crc32"):
        Sampler(np.array([4, 3]), batch_tokens=5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"another dataset"):
        sampler.load_state_dict({**state, "index": 7})
