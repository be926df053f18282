"""Every objective with its options, its columns and its dense formula; random samples for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from hdp.objectives import (
    DPO,
    KTO,
    RolloutCorrection,
    algorithms,
    loss_weights,
)
from tests.objectives import dense
from tests.tiny_models import random_samples

# Pairs of odd lengths, some of a few tokens, one that needs every rank.
SEQLENS = [97, 40, 3, 5, 64, 33, 2, 17, 9, 31]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One objective. `make(comm)` builds it; `formula` is its dense loss."""

    name: str
    make: Callable[[Any], Any]
    formula: Callable[..., Any]
    mode: str | None = "token"  # normalization; None: the objective has its own
    paired: bool = False
    entropy: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _plain(function, **parts):
    return lambda comm: function(**parts)


def _with_comm(function, **parts):
    return lambda comm: function(comm=comm, **parts)


def _corrected(level, *, high=1.3, low=0.0, drop=False):
    correction = RolloutCorrection(level=level, high=high, low=low, drop=drop)
    return Case(
        name=f"tis-{level}{'-drop' if drop else ''}",
        make=_with_comm(algorithms.ppo, correction=correction),
        formula=partial(dense.tis, level=level, high=high, low=low, drop=drop),
    )


CASES = [
    Case(name="sft", make=_plain(algorithms.sft), formula=dense.sft),
    Case(name="reinforce", make=_plain(algorithms.reinforce), formula=dense.reinforce, mode="sum"),
    Case(name="ppo", make=_plain(algorithms.ppo), formula=dense.ppo),
    Case(
        name="ppo-dual",
        make=_plain(algorithms.ppo, low=0.1, high=0.3, dual=1.2),
        formula=partial(dense.ppo, low=0.1, high=0.3, dual=1.2),
        mode="sequence",
    ),
    Case(name="grpo", make=_plain(algorithms.grpo), formula=dense.grpo, mode="sequence"),
    Case(name="dr_grpo", make=_plain(algorithms.dr_grpo), formula=dense.ppo, mode="constant"),
    Case(name="dapo", make=_plain(algorithms.dapo), formula=dense.dapo, mode="group"),
    Case(name="cispo", make=_plain(algorithms.cispo), formula=dense.cispo),
    Case(name="gspo", make=_with_comm(algorithms.gspo), formula=dense.gspo, mode="sequence"),
    Case(
        name="gspo-wide",
        make=_with_comm(algorithms.gspo, low=0.1, high=0.1),
        formula=partial(dense.gspo, low=0.1, high=0.1),
        mode="sequence",
    ),
    Case(name="hpt", make=_plain(algorithms.hpt), formula=dense.hpt, mode="constant"),
    Case(name="distill", make=_plain(algorithms.distill), formula=dense.distill),
    _corrected("token"),
    _corrected("token", low=0.8, high=1.2, drop=True),
    _corrected("sequence"),
    _corrected("geometric", low=0.98, high=1.02, drop=True),
    Case(
        name="entropy",
        make=_plain(algorithms.ppo, entropy_bonus=0.01),
        formula=partial(dense.entropy_bonus, coefficient=0.01),
        entropy=True,
    ),
    Case(name="dpo", make=_with_comm(DPO), formula=dense.dpo, mode=None, paired=True),
    Case(
        name="dpo-smooth",
        make=_with_comm(DPO, beta=0.5, label_smoothing=0.2),
        formula=partial(dense.dpo, beta=0.5, label_smoothing=0.2),
        mode=None,
        paired=True,
    ),
    Case(
        name="ipo",
        make=_with_comm(DPO, loss="ipo"),
        formula=partial(dense.dpo, loss="ipo"),
        mode=None,
        paired=True,
    ),
    Case(
        name="rpo",
        make=_with_comm(DPO, nll=1.0),
        formula=partial(dense.dpo, nll=1.0),
        mode=None,
        paired=True,
    ),
    Case(
        name="kto",
        make=_with_comm(KTO, good_weight=1.3, bad_weight=0.8),
        formula=partial(dense.kto, good_weight=1.3, bad_weight=0.8),
        mode=None,
    ),
]
BY_NAME = {case.name: case for case in CASES}


def samples_for(case: Case, *, masked: float = 0.3, seed: int = 0):
    """Samples with every column that any objective reads, and the case's normalization.

    Tokens without a label hold NaN: what stands there must not matter.
    """
    rng = np.random.default_rng(seed)
    samples = random_samples(SEQLENS, masked=masked, seed=seed)
    # Every sequence has a label token: dense means over a sequence divide by their number.
    samples = [_with_a_label(sample) for sample in samples]
    groups = np.arange(len(samples)) // 2
    counts = np.array([sample.num_loss_tokens for sample in samples])
    extra = {"constant": 100.0} if case.mode == "constant" else {}
    extra |= {"groups": groups} if case.mode == "group" else {}
    weights = None if case.mode is None else loss_weights(counts, case.mode, **extra)
    result = []
    for i, sample in enumerate(samples):
        n = len(sample.input_ids)
        old = -4.0 + rng.normal(size=n) * 0.3
        columns = {
            "old_logprobs": old,
            "ref_logprobs": old + rng.normal(size=n) * 0.3,
            "rollout_logprobs": old + rng.normal(size=n) * 0.2,
            "teacher_logprobs": -3.5 + rng.normal(size=n) * 0.3,
            "advantages": np.full(n, rng.normal()) + 0.1 * rng.normal(size=n),
            "is_demo": np.full(n, float(i % 3 == 0)),
            "is_good": np.full(n, float(i % 2)),
            "kl_baseline": np.full(n, 0.7),
        }
        unlabeled = ~sample.loss_mask
        for column in columns.values():
            column[unlabeled] = np.nan
        if weights is not None:
            columns["loss_weights"] = np.full(n, weights[i])
        result.append(replace(sample, columns=columns))
    return result


def _with_a_label(sample):
    mask = sample.loss_mask.copy()
    mask[-1] = True
    return replace(sample, loss_mask=mask)
