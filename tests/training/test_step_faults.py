"""What a step cannot run stops all ranks, before a ring, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from hdp.errors import NonFiniteError
from hdp.objectives import DPO, algorithms, cross_entropy
from hdp.scheduler import StepPlan
from hdp.training.step import forward_step, train_step
from tests.run_ranks import run_ranks
from tests.tiny_models import (
    random_samples,
)
from tests.training.steps import SEQLENS, dense_step, make_batch, make_context, make_plan


def _non_finite(rank, world):
    context = make_context(torch.float32)
    step = make_batch(make_plan("random1", SEQLENS, world), rank, random_samples(SEQLENS))
    poisoned = 6
    inner = context.model.forward

    def forward(batch, comm):
        out = inner(batch, comm)
        return out * float("nan") if poisoned in batch.seqs else out

    context.model.forward = forward
    with pytest.raises(NonFiniteError, match=r"sequences \[[^]]*\b1006\b"):
        train_step(context, step)
    assert context.optimizer.gradients is None


def test_non_finite_loss_raises_everywhere_before_the_optimizer():
    run_ranks(_non_finite, 3)


def _no_labels(rank, world):
    """One rank's first microbatch is local, the others' is a ring with it: no rank may enter."""
    context = make_context(torch.float32)
    masked = [
        dataclasses.replace(s, loss_mask=np.zeros(len(s.input_ids), bool))
        for s in random_samples([8, 9])
    ]
    step = make_batch(make_plan("random1", [8, 9], world), rank, masked)
    with pytest.raises(ValueError, match=r"sequences \[1000, 1001\] have no label token"):
        train_step(context, step)
    offloaded = StepPlan.from_lists(
        [8, 9], [[0], [1]], [[[0]], [[1]]], max_tokens_per_rank=16, offload_ratio=[[0.5], [0.0]]
    )
    step = make_batch(offloaded, rank, random_samples([8, 9]))
    for run in (train_step, forward_step):
        with pytest.raises(ValueError, match=r"offload ratio 0\.50"):
            run(context, step)
    plan = make_plan("hdp", [8, 9], world)
    step = make_batch(plan, rank, random_samples([8, 9]))
    with pytest.raises(ValueError, match="number of label tokens is from 15 to 16, so"):
        train_step(context, dataclasses.replace(step, num_loss_tokens=15 + rank))


def _after_a_failure(rank, world):
    """Steps that fail on all ranks, caught as by a loop that skips bad batches."""
    context = make_context(torch.float64)
    samples = random_samples(SEQLENS)
    step = make_batch(make_plan("random1", SEQLENS, world), rank, samples)
    calls = 0

    def infinite(logprobs, batch, step):
        return cross_entropy(logprobs, batch, step)[0] + math.inf, {}

    def fails_late(logprobs, batch, step):
        nonlocal calls
        calls += 1
        if calls == len(own.batches):
            raise KeyError("advantages")
        return cross_entropy(logprobs, batch, step)

    def not_a_number(logprobs, batch, step):
        return (logprobs * math.nan).sum(), {}

    with pytest.raises(NonFiniteError):
        train_step(context, step, infinite)
    own = make_batch(make_plan("local", SEQLENS, world), rank, samples)  # no rank waits in a ring
    with pytest.raises(KeyError):
        train_step(context, own, fails_late)
    with pytest.raises(NonFiniteError):
        train_step(context, step, not_a_number)
    train_step(context, step)
    return context.optimizer.gradients


@pytest.mark.parametrize("world", [1, 2])
def test_a_failed_step_leaves_no_gradients(world):
    _, dense = dense_step(torch.float64)
    for name, got in run_ranks(_after_a_failure, world)[0].items():
        assert (got - dense[name]).norm() / dense[name].norm() < 1e-10, name


def _other_names(rank, world, names):
    context = make_context(torch.float64)
    step = make_batch(make_plan("random1", SEQLENS, world), rank, random_samples(SEQLENS))
    calls = 0

    def objective(logprobs, batch, step):
        nonlocal calls
        calls += 1
        loss, one = logprobs.sum(), torch.ones(())
        return loss, dict.fromkeys(names[min(rank, calls - 1)], one)

    with pytest.raises(ValueError, match=r"reports the metrics \['a'\] for a .* rank 0 and \["):
        train_step(context, step, objective)
    assert context.optimizer.gradients is None


@pytest.mark.parametrize("names", [(["a"], ["b"]), (["a"], []), (["a"], ["a", "b"])])
def test_metrics_with_other_names_stop_all_ranks(names):
    run_ranks(_other_names, 2, names, timeout_s=60)


def _forward_often(rank, world):
    context = make_context(torch.float64)
    frozen = context.model.layers[0]
    frozen.eval()
    step = make_batch(make_plan("static", SEQLENS, world), rank, random_samples(SEQLENS))
    for _ in range(3):
        forward_step(context, step)
    assert not context.comm.stats.waits, "they would grow with every call"
    assert context.model.training and not frozen.training

    def fail(batch, comm):
        raise KeyError("no such layer")

    context.model.forward = fail
    with pytest.raises(KeyError):
        forward_step(context, step)
    assert context.model.training and not frozen.training


def test_forward_step_leaves_the_context_as_it_was():
    run_ranks(_forward_often, 2)


def _other_sequences(rank, world):
    context = make_context(torch.float64)
    step = make_batch(make_plan("random1", SEQLENS, world), rank, random_samples(SEQLENS))
    step = dataclasses.replace(step, seq_ids=step.seq_ids + rank)
    for run in (train_step, forward_step):
        with pytest.raises(ValueError, match="checksum of the sequence ids is from"):
            run(context, step)


def test_ranks_with_other_sequences_of_the_same_lengths_stop():
    run_ranks(_other_sequences, 2, timeout_s=60)


def test_what_no_rank_can_run_stops_all_of_them_before_a_ring():
    run_ranks(_no_labels, 2, timeout_s=60)


def _disagree(rank, world):
    context = make_context(torch.float32)
    samples = random_samples(SEQLENS)
    step = make_batch(make_plan(f"random{1 + (rank == 2)}", SEQLENS, world), rank, samples)
    with pytest.raises(ValueError, match=r"rank.* 2\b"):
        train_step(context, step)


def test_ranks_that_disagree_on_the_plan_stop_before_they_can_hang():
    run_ranks(_disagree, 3, timeout_s=60)


def _without_columns(rank, world):
    context = make_context(torch.float64)
    samples = [
        dataclasses.replace(s, columns={"advantages": np.ones(len(s.input_ids))})
        for s in random_samples([8, 9])
    ]
    step = make_batch(make_plan("random1", [8, 9], world), rank, samples)
    with pytest.raises(ValueError, match=r"needs the columns \['old_logprobs'\]; the samples have"):
        train_step(context, step, algorithms.ppo())
    halves = make_batch(make_plan("static", [8, 9], world), rank, random_samples([8, 9]))
    with pytest.raises(ValueError, match="needs the columns"):
        train_step(context, halves, DPO(comm=context.comm))


def test_an_objective_without_its_columns_stops_all_ranks():
    run_ranks(_without_columns, 2, timeout_s=60)
