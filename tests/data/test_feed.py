"""StepFeed: the denominator of the loss, uploads, and errors in its thread."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from hdp.data.feed import StepFeed, make_step
from hdp.data.sample import Sample, SampleList
from hdp.data.sampler import Sampler
from tests.random_plans import random_plan

SEQLENS = np.array([5, 17, 1, 40, 9, 3, 22])


class Data:
    """Samples with loss masks, and the counts that an index would have."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.samples = [
            Sample(input_ids=rng.integers(0, 50, n), loss_mask=rng.random(n) < 0.6) for n in SEQLENS
        ]
        self.seqlens = SEQLENS
        self.num_loss_tokens = np.array([s.loss_mask[1:].sum() for s in self.samples])

    def __getitem__(self, index):
        return self.samples[index]


def _feed(rank, make_plan):
    sampler = Sampler(SEQLENS, seed=1, batch_tokens=60)
    return StepFeed(Data(), sampler, make_plan, rank=rank, position=(0, 0))


def test_num_loss_tokens_counts_the_labels_of_all_ranks():
    with (
        _feed(0, lambda n: random_plan(n, 3, 0)) as a,
        _feed(1, lambda n: random_plan(n, 3, 0)) as b,
        _feed(2, lambda n: random_plan(n, 3, 0)) as c,
    ):
        counts = []
        for *ranks, _ in zip(iter(a), iter(b), iter(c), range(4), strict=False):
            labels = [x.labels for step in ranks for x in step.batches]
            count = sum(int((x >= 0).sum()) for x in labels)
            assert {step.num_loss_tokens for step in ranks} == {count}
            counts.append(count)
            assert len({step.plan.digest for step in ranks}) == 1
            assert len({step.next_position for step in ranks}) == 1
        assert len(counts) == 4 and min(counts) > 0


def test_steps_are_packed_and_uploaded_in_the_background():
    """The feed's thread does all the work, for columns too."""
    threads = set()

    def make_plan(seqlens):
        threads.add(threading.current_thread().name.partition("_")[0])
        return random_plan(seqlens, 1, 0)

    source = SampleList(
        [Sample(input_ids=np.arange(n), columns={"weights": np.ones(n)}) for n in SEQLENS]
    )
    sampler = Sampler(SEQLENS, seed=1, batch_tokens=60)
    meta = torch.device("meta")
    with StepFeed(source, sampler, make_plan, rank=0, position=(0, 0), device=meta) as feed:
        step = next(iter(feed))
    assert threads == {"hdp-feed"}
    for batch in step.batches:
        tensors = (batch.input_ids, batch.position_ids, batch.labels, batch.columns["weights"])
        assert {x.device.type for x in tensors} == {"meta"}


def test_sample_list_has_lengths():
    data = Data()
    source = SampleList(data.samples)
    assert (source.seqlens == data.seqlens).all()
    assert (source.num_loss_tokens == data.num_loss_tokens).all()
    ids = np.array([6, 0, 3])
    plan = random_plan(SEQLENS[ids], 2, 3)
    steps = [make_step(source, ids, plan, rank) for rank in range(2)]
    labels = sum(int((x.labels >= 0).sum()) for step in steps for x in step.batches)
    assert labels == steps[0].num_loss_tokens == data.num_loss_tokens[ids].sum()


def test_error_in_the_thread_reaches_the_caller():
    def fail(seqlens):
        raise ValueError(f"no plan for {len(seqlens)} sequences")

    with _feed(0, fail) as feed, pytest.raises(ValueError, match="no plan for"):
        next(iter(feed))


def test_a_long_wait_is_announced_and_a_short_one_is_not(monkeypatch):
    """To a watchdog, which would take it for a hang."""
    monkeypatch.setattr("hdp.data.feed._LONG_WAIT_S", 0.05)
    gate, waits = threading.Event(), []

    def make_plan(seqlens):
        assert gate.wait(30)
        return random_plan(seqlens, 1, 0)

    @contextmanager
    def on_wait():
        waits.append("began")
        gate.set()
        yield
        waits.append("ended")

    data = Data()
    sampler = Sampler(SEQLENS, seed=1, batch_tokens=60)
    with StepFeed(data, sampler, make_plan, rank=0, position=(0, 0), on_wait=on_wait) as feed:
        steps = iter(feed)
        next(steps)
        assert waits == ["began", "ended"]
        monkeypatch.setattr("hdp.data.feed._LONG_WAIT_S", 30.0)
        next(steps)
        assert len(waits) == 2


def test_steps_depend_only_on_the_position():
    with _feed(0, lambda n: random_plan(n, 2, 0)) as feed:
        first, second = (step for step, _ in zip(feed, range(2), strict=False))
        again = feed.make(first.next_position)
        assert again.seq_ids.tolist() == second.seq_ids.tolist()
        assert again.next_position == second.next_position
