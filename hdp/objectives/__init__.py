"""Objectives: what a step minimizes, as functions of log-probabilities and per-token columns.

An objective sees one microbatch of one rank and knows nothing about plans, rings or ranks:

    def weighted(logprobs, batch, step):
        loss = -(batch.columns["weights"] * logprobs).sum() / step.num_loss_tokens
        return loss, {"weight": batch.columns["weights"].sum()}

    train_step(context, step, objective=weighted)

It returns the microbatch's share of the step's loss and of the sums to report. Shares are added up
over microbatches and ranks, so an objective must divide by a total of the whole step, never by one
of its microbatch; the result then does not depend on how the plan split the batch.

    cross_entropy            the default: pre-training and SFT
    estimator.py             every policy-gradient algorithm; algorithms.py has them by name
    pairs.py                 DPO, IPO, RPO, KTO, reward models
    values.py                the critic
    advantages.py, normalization.py    columns, computed from rewards before planning
"""

from . import algorithms
from .advantages import gae, group_advantages, reward_with_kl, soft_overlong, whiten
from .correction import RolloutCorrection
from .cross_entropy import cross_entropy, token_cross_entropy
from .estimator import KLPenalty, PolicyGradient
from .normalization import loss_weights
from .objective import Objective, Share
from .pairs import DPO, KTO, BradleyTerry, pair_units
from .sequences import sequence_sums
from .stabilization import Clip, ClippedWeight, NoMask
from .values import ValueLoss

__all__ = [
    "DPO",
    "KTO",
    "BradleyTerry",
    "Clip",
    "ClippedWeight",
    "KLPenalty",
    "NoMask",
    "Objective",
    "PolicyGradient",
    "RolloutCorrection",
    "Share",
    "ValueLoss",
    "algorithms",
    "cross_entropy",
    "gae",
    "group_advantages",
    "loss_weights",
    "pair_units",
    "reward_with_kl",
    "sequence_sums",
    "soft_overlong",
    "token_cross_entropy",
    "whiten",
]
