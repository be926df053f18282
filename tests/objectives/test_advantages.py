"""Advantages and normalization against their definitions, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.objectives import (
    DPO,
    KTO,
    Clip,
    ClippedWeight,
    KLPenalty,
    RolloutCorrection,
    ValueLoss,
    gae,
    group_advantages,
    loss_weights,
    pair_units,
    reward_with_kl,
    soft_overlong,
    whiten,
)
from hdp.objectives.algorithms import hpt_loss_weights


def test_group_advantages_by_hand():
    rewards, groups = [1.0, 0.0, 0.0, 5.0, 5.0], [7, 3, 7, 3, 3]
    mean = group_advantages(rewards, groups, "mean")
    np.testing.assert_allclose(mean, [0.5, -10 / 3, -0.5, 5 / 3, 5 / 3])
    others = group_advantages(rewards, groups, "leave_one_out")
    np.testing.assert_allclose(others, [1.0, -5.0, -1.0, 2.5, 2.5])
    std = group_advantages(rewards, groups, "mean_std", eps=0.0)
    np.testing.assert_allclose(std[[0, 2]], [0.5**0.5, -(0.5**0.5)])
    np.testing.assert_allclose(std[[1, 3, 4]], mean[[1, 3, 4]] / np.std([0, 5, 5], ddof=1))
    assert not group_advantages([2.0, 2.0], [0, 0]).any(), "equal rewards teach nothing"


def test_what_group_advantages_refuse():
    with pytest.raises(ValueError, match=r"group 4 has one sample, so its advantage is undefined"):
        group_advantages([1.0, 0.0, 1.0], [2, 2, 4])
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan"):
        group_advantages([1.0, float("nan")], [0, 0])
    with pytest.raises(ValueError, match="2 groups for 3 rewards"):
        group_advantages([1.0, 2.0, 3.0], [0, 0])
    with pytest.raises(ValueError, match="baseline 'max' is unknown"):
        group_advantages([1.0, 2.0], [0, 0], "max")


@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_gae_is_the_sum_of_discounted_deltas(num_tokens, gamma, lam, seed):
    """Eq. 16 as a sum, over trained tokens only: a tool's answer is skipped."""
    rng = np.random.default_rng(seed)
    mask = rng.random(num_tokens) < 0.7
    r, v = rng.normal(size=(2, num_tokens))
    advantages, returns = gae(r, v, mask, gamma=gamma, lam=lam)
    rr, vv = r[mask], np.append(v[mask], 0.0)
    delta = rr + gamma * vv[1:] - vv[:-1]
    for t, place in enumerate(np.flatnonzero(mask)):
        powers = (gamma * lam) ** np.arange(len(delta) - t)
        assert advantages[place] == pytest.approx((powers * delta[t:]).sum(), abs=1e-12)
    np.testing.assert_allclose(returns[mask], advantages[mask] + v[mask])
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_gae_refuses_what_it_cannot_discount():
    one = np.ones(2)
    with pytest.raises(ValueError, match=r"gamma=1\.5 must be in"):
        gae(one, one, one > 0, gamma=1.5)
    with pytest.raises(ValueError, match=r"values\[1\] is inf"):
        gae(one, np.array([0.0, np.inf]), one > 0)


def test_whitening_is_over_all_tokens_of_the_step():
    arrays = [np.array([1.0, 2.0, 9.0]), np.array([4.0, -9.0])]
    masks = [np.array([True, True, False]), np.array([True, False])]
    a, b = whiten(arrays, masks, eps=0.0)
    picked = np.array([a[0], a[1], b[0]])
    assert picked.mean() == pytest.approx(0.0) and picked.var(ddof=1) == pytest.approx(1.0)
    assert a[2] == 0.0 and b[1] == 0.0
    with pytest.raises(ValueError, match="1 tokens have no variance"):
        whiten([np.ones(1)], [np.ones(1, bool)])


def test_rewards_by_hand():
    mask = np.array([False, True, True, False])
    old, ref = np.array([9.0, -1.0, -2.0, 9.0]), np.array([0.0, -1.5, -1.0, 0.0])
    got = reward_with_kl(3.0, old, ref, mask, beta=0.1)
    np.testing.assert_allclose(got, [0.0, -0.05, 3.1, 0.0])
    with pytest.raises(ValueError, match="without trained tokens"):
        reward_with_kl(1.0, old, ref, np.zeros(4, bool), beta=0.1)
    np.testing.assert_allclose(
        soft_overlong(np.array([10, 16, 18, 20, 99]), limit=20, cache=4), [0, 0, -0.5, -1, -1]
    )
    with pytest.raises(ValueError, match=r"cache=0 must be in 1\.\.limit=20"):
        soft_overlong(np.array([1]), limit=20, cache=0)


def test_normalization_by_hand():
    n = [2, 6, 0, 4]
    np.testing.assert_allclose(loss_weights(n, "token"), np.full(4, 1 / 12))
    np.testing.assert_allclose(loss_weights(n, "sequence"), [1 / 8, 1 / 24, 1 / 4, 1 / 16])
    np.testing.assert_allclose(loss_weights(n, "sum"), np.full(4, 1 / 4))
    np.testing.assert_allclose(loss_weights(n, "constant", constant=8), np.full(4, 1 / 32))
    group = loss_weights(n, "group", groups=[0, 0, 1, 1])
    np.testing.assert_allclose(group, [1 / 16, 1 / 16, 1 / 8, 1 / 8])
    demo = hpt_loss_weights(
        np.array([5, 7, 4]), np.array([0, 0, 1]), np.array([0, 0, 1]), longest=10
    )
    np.testing.assert_allclose(demo, [1 / 40, 1 / 40, 1 / 8])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 0],), "0 label tokens"),
        (([1, 2], "mean"), "normalization 'mean' is unknown"),
        (([1, 2], "constant"), "'constant' needs constant"),
        (([1, 2], "token", 5.0), "no other mode takes them"),
        (([1, 2], "constant", -1.0), "constant=-1.0 must be above 0"),
        (([1, 2], "group", None, [0]), "1 groups for 2 sequences"),
    ],
)
def test_what_normalization_refuses(arguments, message):
    counts, *rest = arguments
    names = ("mode", "constant", "groups")
    with pytest.raises(ValueError, match=message):
        loss_weights(counts, **dict(zip(names, rest, strict=False)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DPO(beta=0.0), "beta=0.0 must be above 0"),
        (lambda: DPO(label_smoothing=0.5), "label_smoothing=0.5 must be in"),
        (lambda: DPO(loss="hinge"), "loss='hinge' is unknown"),
        (lambda: DPO(nll=-1.0), "nll=-1.0 must be 0 or more"),
        (lambda: KTO(beta=-0.1), "beta=-0.1"),
        (lambda: KLPenalty(beta=0.0), "leave the penalty out"),
        (lambda: Clip(low=1.5), "low=1.5 must be in"),
        (lambda: Clip(dual=1.0), "dual=1.0 must be above 1"),
        (lambda: ClippedWeight(high=-0.1), "high=-0.1"),
        (lambda: RolloutCorrection(low=2.0, high=1.0), "low=2.0 must be in"),
        (lambda: ValueLoss(clip=0.0), "clip=0.0 must be above 0"),
        (lambda: pair_units(3), "3 sequences are no pairs"),
    ],
)
def test_what_objectives_refuse(build, message):
    with pytest.raises(ValueError, match=message):
        build()
