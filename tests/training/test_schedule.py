"""The learning rate is a pure function of the step: corners, continuity, and any restart."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.config import TrainConfig
from hdp.training.schedule import Schedule, learning_rate, schedule_of

KINDS = ("cosine", "linear", "constant", "wsd")


def test_schedule_corners():
    schedule = Schedule(peak_lr=1.0, warmup_steps=4, total_steps=12, min_lr=0.2)
    assert [schedule(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule(4) == 1.0
    assert schedule(8) == pytest.approx(0.6)  # halfway down
    assert schedule(12) == schedule(10**9) == 0.2
    assert Schedule(peak_lr=1.0, warmup_steps=0, total_steps=1)(0) == 1.0
    assert Schedule(peak_lr=1.0, warmup_steps=3, total_steps=3)(2) == 1.0


@given(
    peak=st.floats(1e-8, 10),
    ratio=st.floats(0, 1),
    warmup=st.integers(0, 50),
    rest=st.integers(1, 200),
    kind=st.sampled_from(KINDS),
    share=st.floats(0, 1),
)
def test_schedule_rises_then_falls(peak, ratio, warmup, rest, kind, share):
    schedule = Schedule(
        peak_lr=peak,
        warmup_steps=warmup,
        total_steps=warmup + rest,
        min_lr=peak * ratio,
        kind=kind,
        decay_share=share,
    )
    rates = [schedule(step) for step in range(warmup + rest + 2)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    falling = rates[warmup:]
    assert all(a >= b - 1e-12 * peak for a, b in itertools.pairwise(falling))
    assert rates[0] > 0


def test_learning_rate_of_a_run_counts_from_1():
    config = TrainConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=2, steps=10)
    assert [learning_rate(config, step) for step in (1, 2, 3)] == [0.5, 1.0, 1.0]
    assert learning_rate(config, 7) == pytest.approx(0.55)  # halfway down
    assert 0.1 < learning_rate(config, 10) < 0.15
    short = TrainConfig(lr=1.0, warmup_steps=10, steps=3)
    assert learning_rate(short, 3) == pytest.approx(0.3)


def test_schedule_is_a_value():
    schedule = Schedule(peak_lr=3e-4, warmup_steps=10, total_steps=100)
    again = Schedule(**dataclasses.asdict(schedule))
    assert again == schedule and [again(s) for s in range(120)] == [schedule(s) for s in range(120)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peak_lr": 0.0}, "peak_lr=0"),
        ({"peak_lr": math.inf}, "peak_lr=inf"),
        ({"min_lr": 2.0}, "min_lr=2"),
        ({"min_lr": -1.0}, "min_lr=-1"),
        ({"warmup_steps": 11}, "warmup_steps=11, total_steps=10"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"total_steps": 0, "warmup_steps": 0}, "at least one step"),
        ({"decay_share": 1.5}, r"decay_share=1\.5"),
        ({"kind": "step"}, "kind='step'"),
    ],
)
def test_bad_schedule_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"peak_lr": 1.0, "warmup_steps": 2, "total_steps": 10, **change})
    with pytest.raises(ValueError, match="step=-1"):
        Schedule(peak_lr=1.0, warmup_steps=2, total_steps=10)(-1)


@given(
    kind=st.sampled_from(KINDS),
    warmup=st.integers(0, 300),
    rest=st.integers(1, 3000),
    share=st.floats(0.05, 1),
    ratio=st.floats(0, 1),
)
def test_no_shape_jumps(kind, warmup, rest, share, ratio):
    """The rate meets the peak where the decay begins, and moves by little from step to step."""
    total = warmup + rest
    schedule = Schedule(
        peak_lr=1.0,
        warmup_steps=warmup,
        total_steps=total,
        min_lr=ratio,
        kind=kind,
        decay_share=share,
    )
    start = schedule.decay_start
    assert warmup <= start <= total
    if start < total:
        assert schedule(start) == pytest.approx(1.0)
    if kind != "constant":
        assert schedule(total) == ratio
    decay = max(total - start, 1)
    steepest = {"cosine": math.pi / 2 / decay, "linear": 1 / decay, "wsd": decay**-0.5}
    limit = max(steepest.get(kind, 0.0) * (1 - ratio), 1 / warmup if warmup else 0.0)
    rates = [schedule(step) for step in range(total + 1)]
    if decay > 1 or kind == "constant":
        assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= limit * (1 + 1e-9) + 1e-12


def test_corners_of_the_other_shapes():
    line = Schedule(peak_lr=1.0, warmup_steps=2, total_steps=12, min_lr=0.5, kind="linear")
    assert [line(step) for step in (0, 1, 2, 7, 12, 99)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.5]
    flat = Schedule(peak_lr=1.0, warmup_steps=2, total_steps=12, min_lr=0.5, kind="constant")
    assert [flat(step) for step in (0, 1, 2, 11, 12, 99)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    wsd = Schedule(peak_lr=1.0, warmup_steps=10, total_steps=100, min_lr=0.2, kind="wsd")
    assert {wsd(step) for step in range(9, 81)} == {1.0} and wsd.decay_start == 80
    assert wsd(85) == pytest.approx(0.2 + 0.8 * (1 - 0.25**0.5))  # a quarter of the decay
    assert wsd(100) == 0.2
    short = dataclasses.replace(wsd, total_steps=12)  # the warm-up takes the decay's place
    assert short.decay_start == 10 and short(9) == short(10) == 1.0 and short(12) == 0.2


def test_wsd_can_be_prolonged_before_its_decay():
    """Until the decay begins, a longer run has the same rates: --steps may be raised."""
    short = TrainConfig(schedule="wsd", steps=100)
    long = dataclasses.replace(short, steps=1000)
    assert all(learning_rate(short, step) == learning_rate(long, step) for step in range(1, 81))
    assert schedule_of(long).decay_start == 800
