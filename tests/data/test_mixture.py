"""The invariants of mixtures, by name, over random lengths, weights, limits and seeds."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.data.mixture import MixtureSampler

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=40).map(np.array)
weights = st.floats(0.001, 1000, allow_nan=False).map(lambda x: round(x, 3))
seeds = st.integers(0, 2**70)


@st.composite
def mixtures(draw, max_sources=5, by=None):
    sources = draw(st.lists(lengths, min_size=2, max_size=max_sources))
    size = len(sources)
    return {
        "sources": sources,
        "weights": draw(st.lists(weights, min_size=size, max_size=size)),
        "by": by or draw(st.sampled_from(["sequences", "tokens"])),
        "seed": draw(seeds),
        "batch_tokens": draw(st.integers(1, 1000)),
        "short_first": draw(st.booleans()),
    }


@st.composite
def limited(draw):
    """One source and limits, each of which admits something."""
    seqlens = draw(lengths)
    tokens = draw(st.lists(st.integers(int(seqlens.min()), 310), min_size=1, max_size=4))
    starts = draw(st.lists(st.integers(1, 12), min_size=3, max_size=3, unique=True))
    limits = list(zip([0, *sorted(starts)], sorted(set(tokens)), strict=False))
    return seqlens, limits


def owners(sources, ids):
    return np.searchsorted(np.cumsum([len(s) for s in sources]), ids, side="right")


@given(mixtures())
def test_proportions_hold_at_every_prefix(options):
    sampler, sources = MixtureSampler(**options), options["sources"]
    every = np.concatenate(sources)
    shares = [Fraction(repr(weight)) for weight in options["weights"]]
    shares = [share / sum(shares) for share in shares]
    costs = every if options["by"] == "tokens" else np.ones(len(every), int)
    bound = int(costs.max())
    used = [0] * len(sources)
    for ids in islice(sampler, 25):
        for i, owner in zip(ids, owners(sources, ids), strict=True):
            used[owner] += int(costs[i])
            for got, share in zip(used, shares, strict=True):
                assert abs(got - share * sum(used)) <= bound


@given(mixtures())
def test_each_source_repeats_on_its_own(options):
    sampler, sources = MixtureSampler(**options), options["sources"]
    ids = np.concatenate(list(islice(sampler, 60)))
    first = 0
    for number, seqlens in enumerate(sources):
        mine = ids[owners(sources, ids) == number] - first
        first += len(seqlens)
        for start in range(0, len(mine), len(seqlens)):
            epoch = mine[start : start + len(seqlens)]
            assert len(set(epoch)) == len(epoch)
        done = sampler.epochs_by_source(sampler.position)[number]
        assert done == pytest.approx(len(mine) / len(seqlens))
        if options["short_first"]:
            assert (np.diff(seqlens[mine[: len(seqlens)]]) >= 0).all()


@given(mixtures())
def test_within_budget(options):
    every = np.concatenate(options["sources"])
    for ids in islice(MixtureSampler(**options), 20):
        assert len(ids) == 1 or every[ids].sum() <= options["batch_tokens"]


@given(limited(), seeds, st.integers(1, 600), st.booleans())
def test_limits_are_kept(case, seed, batch_tokens, short_first):
    """Within a limit; no epoch has a sequence twice; a whole epoch has all that its end admits."""
    seqlens, limits = case
    sampler = MixtureSampler(
        [seqlens], batch_tokens=batch_tokens, seed=seed, limits=limits, short_first=short_first
    )
    epochs: dict[int, list[int]] = {}
    last_limit: dict[int, int] = {}
    for batch in range(40):
        before = sampler.position
        ids = next(iter(sampler))
        limit = max(tokens for start, tokens in limits if start <= batch)
        assert (seqlens[ids] <= limit).all()
        # a phase may begin in an epoch whose admitted sequences are all taken: then it is the next
        epoch = sampler.position[1][0][0]
        ended = sampler.position[1][0] == (epoch, *[0] * (len(sampler.position[1][0]) - 1))
        epoch -= ended
        epochs.setdefault(epoch, []).extend(ids.tolist())
        last_limit[epoch] = limit
        assert before[0] == batch
    for epoch, ids in epochs.items():
        assert len(set(ids)) == len(ids)
        if epoch + 1 in epochs:
            assert set(ids) == set(np.flatnonzero(seqlens <= last_limit[epoch]))


@given(limited(), seeds)
def test_deferred_sequences_follow(case, seed):
    """If no epoch ends before the last limit, the first one has every admitted sequence once."""
    seqlens, limits = case
    seqlens = np.concatenate([seqlens, np.full(60, seqlens.min())])  # enough short ones
    sampler = MixtureSampler([seqlens], batch_tokens=1, seed=seed, limits=limits)
    ids = []
    while sampler.position[1][0][0] == 0:
        ids += next(iter(sampler)).tolist()
    assert sorted(ids) == np.flatnonzero(seqlens <= limits[-1][1]).tolist()


@given(mixtures(), st.lists(st.integers(0, 20), max_size=6))
def test_position_determines_batch(options, steps):
    sampler = MixtureSampler(**options)
    positions, batches = [], []
    for _ in range(21):
        positions.append(sampler.position)
        batches.append(next(iter(sampler)))
    other = MixtureSampler(**options)
    for step in steps:
        np.testing.assert_array_equal(other.batch_at(positions[step])[0], batches[step])


@given(st.one_of(mixtures(), limited()), st.integers(0, 30))
def test_state_survives_json_and_resumes(case, num_done):
    if isinstance(case, tuple):
        case = {"sources": [case[0]], "limits": case[1], "batch_tokens": 200}
    sampler = MixtureSampler(**case)
    for _ in islice(sampler, num_done):
        pass
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = MixtureSampler(**case)
    resumed.load_state_dict(state)
    for a, b in zip(islice(sampler, 10), islice(resumed, 10), strict=True):
        np.testing.assert_array_equal(a, b)
    assert resumed.position == sampler.position


@given(lengths, seeds, st.integers(1, 600), st.integers(1, 3))
def test_epochs_of_one_source_end_with_a_batch(seqlens, seed, batch_tokens, epochs):
    sampler = MixtureSampler([seqlens], batch_tokens=batch_tokens, seed=seed, short_first=True)
    ids = np.concatenate(list(islice(sampler, sampler.num_steps(epochs))))
    assert np.bincount(ids).tolist() == [epochs] * len(seqlens)
    assert sampler.num_steps(epochs, sampler.position) == 0


@given(mixtures(by="sequences"), st.floats(0.1, 3))
def test_an_epoch_of_a_mixture_has_as_many_sequences_as_its_sources(options, epochs):
    sampler = MixtureSampler(**options)
    total = sum(map(len, options["sources"]))
    batches = list(islice(sampler, sampler.num_steps(epochs)))
    num = sum(map(len, batches))
    assert num >= epochs * total - 1e-6 > num - len(batches[-1]) - 2e-6


def test_order_is_pinned():
    """A changed order would break resuming existing runs."""
    sampler = MixtureSampler([np.full(4, 5), np.full(8, 5)], weights=[1, 3], batch_tokens=40)
    assert [ids.tolist() for ids in islice(sampler, 3)] == PINNED


PINNED = [[4, 3, 6, 9, 10, 1, 7, 5], [11, 0, 8, 6, 8, 2, 4, 5], [11, 2, 10, 7, 9, 1, 6, 4]]


def test_sources_of_one_size_have_different_orders():
    sampler = MixtureSampler([np.ones(50, int)] * 2, batch_tokens=100)
    ids = next(iter(sampler))
    first, second = ids[ids < 50], ids[ids >= 50] - 50
    assert sorted(first) == sorted(second) and first.tolist() != second.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [0.5, 0]}, "must be above 0: leave out"),
        ({"weights": [0.5, -1]}, "must be above 0"),
        ({"weights": [0.5, float("nan")]}, "must be above 0"),
        ({"weights": [0.5, float("inf")]}, "must be above 0"),
        ({"weights": [0.5]}, "1 weights for 2 sources"),
        ({"by": "bytes"}, "'sequences' or 'tokens'"),
        ({"batch_tokens": 0}, "at least 1"),
        ({"limits": [(1, 5)]}, "start at batch 0"),
        ({"limits": [(0, 5), (3, 5)]}, "ascend"),
        ({"limits": [(0, 5), (3, 9), (2, 10)]}, "ascend"),
        ({"limits": [(0, 2)]}, "the shortest has 3; raise the limit"),
        ({"sources": [np.array([3]), np.array([], int)]}, "the dataset is empty"),
    ],
)
def test_bad_options(options, message):
    good = {"sources": [np.array([3, 4]), np.array([5])], "batch_tokens": 5}
    with pytest.raises(ValueError, match=message):
        MixtureSampler(**{**good, **options})


def test_bad_positions_and_states():
    sampler = MixtureSampler([np.array([3, 4]), np.array([5])], batch_tokens=5)
    good = sampler.state_dict()
    bad = (None, [0, [[0, 0]], [0]], [0, [[0, 3], [0, 0]], [0, 0]], [-1, [[0, 0]] * 2, [0, 0]])
    for position in bad:
        with pytest.raises(ValueError, match="out of range for 2 sources"):
            sampler.load_state_dict({**good, "position": position})
    other = MixtureSampler([np.array([3, 4]), np.array([5])], batch_tokens=5, weights=[1, 2])
    with pytest.raises(ValueError, match=r"weights \[1, 1\] -> \[1, 2\].*resume with the data"):
        other.load_state_dict(good)
    with pytest.raises(ValueError, match="belongs to other data"):
        sampler.load_state_dict({"epoch": 0, "index": 0})
