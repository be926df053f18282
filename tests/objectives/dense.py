"""The objectives restated from their papers on dense (num_seqs, longest) tensors, one process.

Written without looking at hdp/objectives: gradients come from differentiating the published
formula, not from the estimator's weights. m is the mask of label tokens, c the normalization.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def pad(arrays, longest):
    """(num_seqs, longest) float64 of per-token arrays; 0 beyond a sequence's end."""
    out = np.zeros((len(arrays), longest))
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)


def normalization(m, mode, constant=None, groups=None):
    n = m.sum(1)
    if mode == "token":
        return torch.ones(len(n), dtype=m.dtype) / n.sum()
    if mode == "sequence":
        return 1.0 / (len(n) * n)
    if mode == "sum":
        return torch.ones(len(n), dtype=m.dtype) / len(n)
    if mode == "constant":
        return torch.ones(len(n), dtype=m.dtype) / (len(n) * constant)
    totals = torch.stack([n[groups == g].sum() for g in groups])
    return 1.0 / (len(set(groups.tolist())) * totals)


def mean(per_token, m, c):
    return (c[:, None] * per_token * m).sum()


def surrogate(logp, old, adv, low, high, dual=None):
    ratio = (logp - old).exp()
    loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - low, 1 + high))
    if dual is not None:
        loss = torch.where(adv < 0, torch.minimum(loss, -adv * dual), loss)
    return loss


def k3(logp, ref):
    return (ref - logp).exp() - (ref - logp) - 1


def sft(logp, m, c, **_):
    return mean(-logp, m, c)


def reinforce(logp, m, c, advantages, **_):
    return mean(-advantages * logp, m, c)


def ppo(logp, m, c, old_logprobs, advantages, low=0.2, high=0.2, dual=None, **_):
    return mean(surrogate(logp, old_logprobs, advantages, low, high, dual), m, c)


def grpo(logp, m, c, old_logprobs, advantages, ref_logprobs, beta=0.04, **_):
    loss = surrogate(logp, old_logprobs, advantages, 0.2, 0.2) + beta * k3(logp, ref_logprobs)
    return mean(loss, m, c)


def dapo(logp, m, c, old_logprobs, advantages, **_):
    return mean(surrogate(logp, old_logprobs, advantages, 0.2, 0.28), m, c)


def cispo(logp, m, c, old_logprobs, advantages, **_):
    weight = (logp - old_logprobs).exp().clamp(0.0, 1.28).detach()
    return mean(-weight * advantages * logp, m, c)


def gspo(logp, m, c, old_logprobs, advantages, low=3e-4, high=4e-4, **_):
    s = (((logp - old_logprobs) * m).sum(1) / m.sum(1)).detach().exp()[:, None]
    ratio = s * (logp - logp.detach()).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    return mean(loss, m, c)


def hpt(logp, m, c, old_logprobs, advantages, is_demo, **_):
    rl = surrogate(logp, old_logprobs, advantages, 0.2, 0.2)
    return mean(torch.where(is_demo > 0, -logp, rl), m, c)


def distill(logp, m, c, teacher_logprobs, **_):
    return mean(-(teacher_logprobs - logp).detach() * logp, m, c)


def tis(
    logp, m, c, old_logprobs, advantages, rollout_logprobs, level, high, low=0.0, drop=False, **_
):
    log_rho = (old_logprobs - rollout_logprobs) * m
    if level != "token":
        total = log_rho.sum(1, keepdim=True)
        log_rho = (total if level == "sequence" else total / m.sum(1, keepdim=True)).expand_as(m)
    rho = log_rho.exp()
    if drop:
        weight = rho * ((rho >= low) & (rho <= high))
    else:
        weight = rho.clamp(max=high) * (rho >= low)
    return mean(weight * surrogate(logp, old_logprobs, advantages, 0.2, 0.2), m, c)


def entropy_bonus(logp, m, c, old_logprobs, advantages, entropy, coefficient, **_):
    loss = surrogate(logp, old_logprobs, advantages, 0.2, 0.2) - coefficient * entropy
    return mean(loss, m, c)


def dpo(logp, m, ref_logprobs, beta=0.1, loss="sigmoid", label_smoothing=0.0, nll=0.0, **_):
    gap = ((logp - ref_logprobs) * m).sum(1)
    if loss == "ipo":
        gap = gap / m.sum(1)
    delta = gap[0::2] - gap[1::2]
    if loss == "ipo":
        losses = (delta - 1 / (2 * beta)) ** 2
    else:
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * delta)
        losses = losses - label_smoothing * F.logsigmoid(-beta * delta)
    likelihood = ((logp * m).sum(1) / m.sum(1))[0::2]
    return (losses - nll * likelihood).mean()


def kto(
    logp, m, ref_logprobs, is_good, kl_baseline, beta=0.1, good_weight=1.0, bad_weight=1.0, **_
):
    gap = ((logp - ref_logprobs) * m).sum(1)
    z, good = kl_baseline.max(), (is_good * m).sum(1) > 0
    wanted = good_weight * (1 - torch.sigmoid(beta * (gap - z)))
    unwanted = bad_weight * (1 - torch.sigmoid(beta * (z - gap)))
    return torch.where(good, wanted, unwanted).mean()


def bradley_terry(scores, margin=0.0):
    return -F.logsigmoid(scores[0::2] - scores[1::2] - margin).mean()


def value_loss(values, m, c, returns, old_values=None, clip=None):
    errors = (values - returns) ** 2
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - returns) ** 2)
    return mean(0.5 * errors, m, c)
