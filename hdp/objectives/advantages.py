"""Advantages from rewards, before a step is planned: scalars per sequence, or arrays per token.

Rewards are a few numbers per sequence, so all ranks gather them and compute the same bits; the
result travels as a column of the samples. NumPy only.

    group_advantages   GRPO, Dr. GRPO, RLOO and DAPO: against the other samples of a prompt
    gae                PPO: generalized advantage estimation (arXiv 1506.02438 Eq. 16)
    whiten             PPO, REINFORCE++: to mean 0 and variance 1 over all tokens of the step
    reward_with_kl     PPO, REINFORCE++: -beta log(old / reference) at each token, R at the last
    soft_overlong      DAPO Eq. 13: a penalty that grows in the last tokens before the limit
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

GroupBaseline = Literal["mean", "mean_std", "leave_one_out"]


def group_advantages(
    rewards: Sequence[float] | np.ndarray,
    groups: Sequence[int] | np.ndarray,
    baseline: GroupBaseline = "mean_std",
    *,
    eps: float = 1e-6,
) -> np.ndarray:
    """(num_seqs,) float64: the advantage of each sample over the others of its prompt.

    rewards: (num_seqs,). groups: (num_seqs,) samples of one prompt have the same number.
    baseline:
        mean_std        (R - mean) / (std + eps), with the unbiased std: GRPO (arXiv 2402.03300
                        section 4.1.2), DAPO
        mean            R - mean: Dr. GRPO (arXiv 2503.20783)
        leave_one_out   R - mean of the others: RLOO (arXiv 2402.14740)

    A group whose rewards are all equal has advantage 0. Raises ValueError for a group of one
    sample, which has no baseline, and for rewards that are not finite.
    """
    values = _finite("rewards", rewards)
    _, place, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if len(place) != len(values):
        raise ValueError(f"{len(place)} groups for {len(values)} rewards; give one per sample")
    if len(sizes) and sizes.min() < 2:
        lonely = np.asarray(groups)[sizes[place] < 2][0]
        raise ValueError(
            f"group {lonely} has one sample, so its advantage is undefined: draw 2 or more samples "
            "of each prompt, or use a critic"
        )
    size = sizes[place].astype(np.float64)
    centered = values - np.bincount(place, weights=values)[place] / size
    if baseline == "mean":
        return centered
    if baseline == "leave_one_out":
        return centered * size / (size - 1.0)
    if baseline == "mean_std":
        std = np.sqrt(np.bincount(place, weights=centered**2)[place] / (size - 1.0))
        return centered / (std + eps)
    raise ValueError(f"baseline {baseline!r} is unknown; choose mean, mean_std or leave_one_out")


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns of one sequence, (seqlen,) float64 each; 0 where mask is False.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    return = A + V

    rewards, values: (seqlen,) at each token; mask: (seqlen,) bool, the response's trained tokens.
    Tokens that are masked out inside a response (a tool's answer) are skipped: t + 1 is the next
    trained token. Raises ValueError unless gamma and lam are in [0, 1] and all numbers are finite.
    """
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= factor <= 1.0:
            raise ValueError(f"{name}={factor} must be in [0, 1]")
    mask = np.asarray(mask, dtype=bool)
    r, v = _finite("rewards", rewards)[mask], _finite("values", values)[mask]
    following = np.append(v[1:], 0.0)
    delta = r + gamma * following - v
    found = np.zeros(len(delta))
    carried = 0.0
    for t in range(len(delta) - 1, -1, -1):
        carried = delta[t] + gamma * lam * carried
        found[t] = carried
    advantages, returns = np.zeros((2, len(mask)))
    advantages[mask], returns[mask] = found, found + v
    return advantages, returns


def whiten(
    arrays: Sequence[np.ndarray], masks: Sequence[np.ndarray], *, eps: float = 1e-8
) -> list[np.ndarray]:
    """The arrays of a whole step, shifted and scaled to mean 0 and unbiased variance 1 under masks.

    arrays, masks: one (seqlen,) each per sequence. eps: added to the variance. Raises ValueError
    with fewer than two tokens.
    """
    picked = np.concatenate(
        [np.asarray(a)[np.asarray(m, bool)] for a, m in zip(arrays, masks, strict=True)]
    )
    if len(picked) < 2:
        raise ValueError(f"{len(picked)} tokens have no variance: whiten needs two or more")
    picked = _finite("advantages", picked)
    mean, scale = picked.mean(), 1.0 / np.sqrt(picked.var(ddof=1) + eps)
    return [
        np.where(np.asarray(m, bool), (np.asarray(a) - mean) * scale, 0.0)
        for a, m in zip(arrays, masks, strict=True)
    ]


def reward_with_kl(
    reward: float,
    old_logprobs: np.ndarray,
    ref_logprobs: np.ndarray,
    mask: np.ndarray,
    *,
    beta: float,
) -> np.ndarray:
    """(seqlen,) float64: -beta (old - ref) at each trained token, plus `reward` at the last one.

    The estimator k1 inside the reward (InstructGPT, arXiv 2203.02155 Eq. 2). old_logprobs,
    ref_logprobs: (seqlen,) at each token; mask: (seqlen,) bool, the trained ones. Raises
    ValueError for a sequence without trained tokens or numbers that are not finite.
    """
    mask = np.asarray(mask, dtype=bool)
    if not mask.any():
        raise ValueError("a sequence without trained tokens has no place for its reward")
    kl = _finite("old_logprobs", old_logprobs) - _finite("ref_logprobs", ref_logprobs)
    result = np.where(mask, -beta * kl, 0.0)
    result[np.flatnonzero(mask)[-1]] += float(reward)
    return result


def soft_overlong(num_tokens: np.ndarray, *, limit: int, cache: int) -> np.ndarray:
    """(num_seqs,) float64 in [-1, 0], to add to rewards: DAPO's soft overlong punishment, Eq. 13.

    0 up to limit - cache tokens, then linear down to -1 at limit. Raises ValueError unless
    0 < cache <= limit.
    """
    if not 0 < cache <= limit:
        raise ValueError(f"cache={cache} must be in 1..limit={limit}")
    over = np.asarray(num_tokens, dtype=np.float64) - (limit - cache)
    return -np.clip(over / cache, 0.0, 1.0)


def _finite(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"{name}[{bad[0]}] is {array[bad[0]]} ({len(bad)} such); must be finite")
    return array
