"""Estimates of the KL divergence from a reference, from one sampled token each.

With d = log pi(y) - log ref(y) at a sampled token (Schulman, joschu.net/blog/kl-approx.html):

    k1   d                   unbiased; as a loss its gradient has mean 0, so use it in the reward
    k2   d^2 / 2             biased; its gradient is the reverse KL's on policy
    k3   exp(-d) + d - 1     unbiased, never negative: GRPO Eq. 4
    k3+  value of k3, gradient of k2 (verl)
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KLEstimate = Literal["k1", "k2", "k3", "k3+"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLEstimate = "k3") -> Tensor:
    """(total_tokens,) estimates, differentiable in `logprobs`.

    Raises ValueError for another kind.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    k3 = (-d).exp() + d - 1.0
    if kind == "k3":
        return k3
    if kind == "k3+":
        k2 = 0.5 * d.square()
        return k3.detach() + (k2 - k2.detach())
    raise ValueError(f"KL estimate {kind!r} is unknown; choose k1, k2, k3 or k3+")
