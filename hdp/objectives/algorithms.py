"""The algorithms of post-training by name: a few parts of the estimator each.

    algorithm     denominator   mask                advantage (advantages.py)      normalization
    sft           policy        none                1                              token
    reinforce     policy        none                R - b                          sum
    rloo          policy        none                R - mean of the others         sum
    reinforce_pp  old           clip                whitened, KL in the reward     token
    ppo           old           clip, dual clip     GAE, whitened                  token
    grpo          old           clip                (R - mean) / std of the group  sequence, k3 KL
    dr_grpo       old           clip                R - mean                       constant
    dapo          old           clip-higher         (R - mean) / std               token
    cispo         old           clipped weight      (R - mean) / std               token
    gspo          old_sequence  clip of s           (R - mean) / std               sequence
    hpt           old           clip (demos: none)  R - mean (demos: 1)            per prompt
    distill       policy        none                log teacher - log policy       token

Each function returns a `PolicyGradient` with the published defaults, which keyword arguments
override, and names the paper. Advantages and normalization are columns of the samples, so they are
computed before planning; `loss_weights` and `group_advantages` do that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .estimator import KLPenalty, PolicyGradient
from .stabilization import Clip, ClippedWeight


def sft(**parts: Any) -> PolicyGradient:
    """Supervised fine-tuning: imitate every label token (the estimator's A = 1, r = 1)."""
    return PolicyGradient(**{"denominator": "policy", "advantage": "one", **parts})


def reinforce(**parts: Any) -> PolicyGradient:
    """REINFORCE: -A log pi, on policy. RLOO is the same with leave-one-out advantages."""
    return PolicyGradient(**{"denominator": "policy", **parts})


rloo = reinforce


def ppo(
    *, low: float = 0.2, high: float = 0.2, dual: float | None = None, **parts: Any
) -> PolicyGradient:
    """PPO (arXiv 1707.06347 Eq. 7), with an optional dual clip (arXiv 1912.09729 Eq. 5).

    Advantages by `gae`, usually whitened. verl clips at 0.2 and uses dual=3.
    """
    return PolicyGradient(**{"stabilization": Clip(low=low, high=high, dual=dual), **parts})


def reinforce_pp(*, low: float = 0.2, high: float = 0.2, **parts: Any) -> PolicyGradient:
    """REINFORCE++ (arXiv 2501.03262): PPO's clip without a critic; advantages are whitened."""
    return ppo(low=low, high=high, **parts)


def grpo(
    *, low: float = 0.2, high: float = 0.2, beta: float = 0.04, **parts: Any
) -> PolicyGradient:
    """GRPO (arXiv 2402.03300 Eq. 3): clip, and beta times k3 to the reference in the loss.

    Normalization "sequence". beta: 0.04 in the paper, 0.001 for R1-Zero, 0 in TRL: no reference.
    """
    return ppo(low=low, high=high, **{"kl": KLPenalty(beta=beta) if beta else None, **parts})


def dr_grpo(*, low: float = 0.2, high: float = 0.2, **parts: Any) -> PolicyGradient:
    """Dr. GRPO (arXiv 2503.20783): no division by std or by length. Normalization "constant"."""
    return ppo(low=low, high=high, **parts)


def dapo(*, low: float = 0.2, high: float = 0.28, **parts: Any) -> PolicyGradient:
    """DAPO (arXiv 2503.14476 Eq. 8): clip-higher, token-level loss, no KL.

    Normalization "token" as in its code, or "group" as Eq. 8 has it.
    """
    return ppo(low=low, high=high, **parts)


def cispo(*, low: float = 1.0, high: float = 0.28, **parts: Any) -> PolicyGradient:
    """CISPO (arXiv 2506.13585 Eq. 4): the weight is clipped, so no token loses its gradient."""
    return PolicyGradient(**{"stabilization": ClippedWeight(low=low, high=high), **parts})


def gspo(*, low: float = 3e-4, high: float = 4e-4, **parts: Any) -> PolicyGradient:
    """GSPO (arXiv 2507.18071 Eq. 5, 7): one clipped ratio per sequence. Needs comm=context.comm.

    s = exp(mean over the sequence of log pi - log old). Normalization "sequence".
    """
    clip = Clip(low=low, high=high)
    return PolicyGradient(**{"denominator": "old_sequence", "stabilization": clip, **parts})


def hpt(*, low: float = 0.2, high: float = 0.2, **parts: Any) -> PolicyGradient:
    """HPT (arXiv 2509.04419 Eq. 10 to 12): prompts that are solved too rarely train on a demo.

    Sequences with the column is_demo are imitated, all others run Dr. GRPO. Weights by
    `hpt_loss_weights`; which prompts get a demo is decided before planning.
    """
    return PolicyGradient(**{"stabilization": Clip(low=low, high=high), "demos": True, **parts})


def distill(**parts: Any) -> PolicyGradient:
    """On-policy distillation: the gradient of the reverse KL to a teacher at sampled tokens.

    Column teacher_logprobs; the student sampled the tokens.
    """
    return PolicyGradient(**{"denominator": "policy", "advantage": "teacher", **parts})


def hpt_loss_weights(
    num_loss_tokens: np.ndarray,
    prompts: np.ndarray,
    is_demo: np.ndarray,
    *,
    longest: float,
    demo_coefficient: float = 1.0,
) -> np.ndarray:
    """(num_seqs,) float64: HPT's normalization, per prompt and global.

        1 / (P n L)   a rollout of a prompt with n rollouts; L = longest response
        c / (P n_i)   a demo of n_i tokens; P = prompts of the step

    num_loss_tokens, prompts, is_demo: (num_seqs,). Raises ValueError for longest <= 0.
    """
    if not longest > 0:
        raise ValueError(f"longest={longest} must be above 0: the longest response")
    demo = np.asarray(is_demo, dtype=bool)
    ids, place = np.unique(np.asarray(prompts), return_inverse=True)
    rollouts = np.bincount(place, weights=~demo)[place]
    per_demo = demo_coefficient / np.maximum(np.asarray(num_loss_tokens, dtype=np.float64), 1.0)
    return np.where(demo, per_demo, 1.0 / (np.maximum(rollouts, 1.0) * longest)) / len(ids)
