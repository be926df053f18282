"""PolicyGradient: every policy-gradient algorithm from one estimator.

The Unified Policy Gradient Estimator (arXiv 2509.04419 section 3) writes the gradient of SFT,
REINFORCE, PPO and their relatives as one sum over tokens with four parts:

    grad = 1_stable  *  1 / pi_denominator  *  A  *  grad pi
         = 1_stable  *  (pi / pi_denominator)  *  A  *  grad log pi

    1. stabilization mask   which tokens keep their gradient (stabilization.py)
    2. denominator          what the likelihood ratio r = pi / pi_denominator divides by: the policy
                            itself (r = 1), the old policy, or the old policy of the whole sequence
    3. advantage            a column, 1, or the gap to a teacher
    4. likelihood gradient  of the log-probabilities that the model returns

`PolicyGradient` computes w = 1_stable r A without gradient and returns -sum c w log pi, which has
that gradient for any mask, plus a constant that makes the value the one in the paper. c is the
normalization (normalization.py). Corrections for the rollout engine, a KL penalty in the loss and
an entropy bonus are further terms. The algorithms by name are in algorithms.py.

All inputs are columns of the samples, shifted like labels; see `PolicyGradient.columns`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .correction import RolloutCorrection, spread
from .kl import KLEstimate, kl_estimate
from .objective import Share
from .sequences import sequence_sums
from .stabilization import NoMask, Stabilization

if TYPE_CHECKING:
    from hdp.attention.comm import RingComm
    from hdp.data.feed import StepBatch
    from hdp.data.pack import PackedBatch

Denominator = Literal["policy", "old", "old_sequence"]
Advantage = Literal["column", "one", "teacher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KLPenalty:
    """beta times an estimate of the KL divergence from the column `ref_logprobs`, in the loss.

    unbiased: times the importance ratio, which makes the estimate right off policy (TRL's
    `use_bias_correction_kl`). Raises ValueError unless beta > 0.
    """

    beta: float
    kind: KLEstimate = "k3"
    unbiased: bool = False

    def __post_init__(self) -> None:
        if not self.beta > 0.0:
            raise ValueError(f"beta={self.beta} must be above 0; leave the penalty out instead")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """An objective made of the estimator's parts.

    denominator: "policy": r = 1 (SFT, REINFORCE); "old": the column `old`; "old_sequence": the
        geometric mean over the sequence, GSPO's s (arXiv 2507.18071 Eq. 7)
    old: the column with the denominator's log-probabilities. "rollout_logprobs" takes the engine's
        own. Missing: the policy's own at this update, which is right if there is one update per
        rollout; use denominator "policy" then.
    stabilization: the mask
    advantage: "column": `advantages`; "one": 1 for every token (SFT); "teacher": the column
        `teacher_logprobs` minus the policy's, so that the gradient is that of the reverse KL
        (on-policy distillation)
    demos: sequences whose column `is_demo` is True are imitated: r = 1, A = 1, no mask (HPT,
        arXiv 2509.04419 section 4)
    correction: for the rollout engine, from the column `rollout_logprobs`
    kl: penalty in the loss, from the column `ref_logprobs`
    entropy_bonus: coefficient of the entropy, which the model must return (`with_entropy`)
    comm: the context's communicator, for what adds up whole sequences

    The column `loss_weights` is the normalization c; without it, 1 / step.num_loss_tokens.

    Metrics are sums over label tokens: tokens, ratio, clipped, and kl_old, kl_ref, entropy,
    correction where they are known. Divide by tokens.
    """

    denominator: Denominator = "old"
    old: str = "old_logprobs"
    stabilization: Stabilization = field(default_factory=NoMask)
    advantage: Advantage = "column"
    demos: bool = False
    correction: RolloutCorrection | None = None
    kl: KLPenalty | None = None
    entropy_bonus: float = 0.0
    comm: RingComm | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that samples must have, checked before a step starts."""
        needed = [] if self.denominator == "policy" else [self.old]
        needed += {"column": ["advantages"], "teacher": ["teacher_logprobs"], "one": []}[
            self.advantage
        ]
        needed += ["is_demo"] if self.demos else []
        if self.correction is not None:
            needed += [self.old, "rollout_logprobs"]
        needed += ["ref_logprobs"] if self.kl is not None else []
        return tuple(dict.fromkeys(needed))

    def __call__(self, output: Any, batch: PackedBatch, step: StepBatch, /) -> Share:
        """The microbatch's share of the loss and of the metrics; see `Objective`."""
        tokens = Tokens.read(self, output, batch, step)
        ratio, weights, value = self._policy_terms(tokens)
        # -sum c w log pi has the estimator's gradient; its value is replaced by the paper's.
        surrogate = -(tokens.scale * weights * tokens.logprobs).sum()
        loss = surrogate - surrogate.detach() - (tokens.scale * value).sum()
        metrics = {
            "tokens": tokens.labeled.sum(),
            "ratio": (ratio * tokens.labeled).sum(),
            "clipped": ((tokens.keep == 0) & tokens.labeled).sum(),
        }
        extra, extra_metrics = self._further_terms(tokens, ratio)
        return loss + extra, {**metrics, **extra_metrics}

    def _policy_terms(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """(r, w, the paper's objective) per token, detached; sets tokens.keep."""
        logprobs = tokens.logprobs.detach()
        log_ratio = torch.zeros_like(logprobs)
        if self.denominator != "policy":
            log_ratio = tokens.masked(logprobs - tokens.column(self.old))
        if self.denominator == "old_sequence":
            pair = torch.stack([log_ratio, tokens.labeled.to(log_ratio.dtype)], dim=1)
            sums = sequence_sums(pair, tokens.batch, self.comm)
            log_ratio = spread(sums[:, 0] / sums[:, 1].clamp(min=1.0), tokens.batch)
        if self.demos:
            log_ratio = torch.where(tokens.is_demo, 0.0, log_ratio)
        ratio = log_ratio.exp()
        advantages = self._advantages(tokens, logprobs)
        keep = self.stabilization.keep(ratio, advantages)
        value = self.stabilization.value(ratio, advantages, logprobs)
        if self.denominator == "policy":  # r = 1 for every theta: the objective is A log pi
            value = advantages * logprobs
        if self.demos:
            keep = torch.where(tokens.is_demo, 1.0, keep)
            value = torch.where(tokens.is_demo, logprobs, value)
        tokens.keep = keep
        factor = self._corrections(tokens)
        return ratio, keep * ratio * advantages * factor, value * factor

    def _advantages(self, tokens: Tokens, logprobs: Tensor) -> Tensor:
        if self.advantage == "column":
            advantages = tokens.column("advantages")
        elif self.advantage == "teacher":
            advantages = tokens.column("teacher_logprobs") - logprobs
        else:
            advantages = torch.ones_like(logprobs)
        return torch.where(tokens.is_demo, 1.0, advantages) if self.demos else advantages

    def _corrections(self, tokens: Tokens) -> Tensor:
        if self.correction is None:
            return torch.ones_like(tokens.logprobs)
        log_ratio = tokens.masked(tokens.column(self.old) - tokens.column("rollout_logprobs"))
        factor = self.correction.weights(log_ratio, tokens.labeled, tokens.batch, self.comm)
        factor = torch.where(tokens.is_demo, 1.0, factor) if self.demos else factor
        tokens.metrics["correction"] = (factor * tokens.labeled).sum()
        return factor

    def _further_terms(self, tokens: Tokens, ratio: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        metrics, loss = tokens.metrics, tokens.logprobs.new_zeros(())
        if self.denominator != "policy":
            log_ratio = tokens.masked(tokens.logprobs.detach() - tokens.column(self.old))
            metrics["kl_old"] = kl_estimate(log_ratio, torch.zeros_like(log_ratio)).sum()
        if self.kl is not None:
            d = tokens.masked(tokens.logprobs - tokens.column("ref_logprobs"))
            penalty = kl_estimate(d, torch.zeros_like(d), self.kl.kind)
            metrics["kl_ref"] = penalty.detach().sum()
            if self.kl.unbiased:
                penalty = penalty * self._live_ratio(tokens)
            loss = loss + self.kl.beta * (tokens.scale * penalty).sum()
        if self.entropy_bonus:
            entropy = tokens.entropy()
            metrics["entropy"] = tokens.masked(entropy.detach()).sum()
            loss = loss - self.entropy_bonus * (tokens.scale * entropy).sum()
        return loss, metrics

    def _live_ratio(self, tokens: Tokens) -> Tensor:
        """r of each token, with its gradient."""
        if self.denominator == "policy":
            return (tokens.logprobs - tokens.logprobs.detach()).exp()
        return tokens.masked(tokens.logprobs - tokens.column(self.old)).exp()


@dataclass(slots=True, kw_only=True)
class Tokens:
    """One microbatch as an objective sees it: (total_tokens,) each."""

    batch: PackedBatch
    output: Any
    logprobs: Tensor  # with gradient
    labeled: Tensor  # bool
    scale: Tensor  # the normalization c; 0 without a label
    is_demo: Tensor  # bool
    keep: Tensor  # the stabilization mask, once it is known
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(
        cls, objective: PolicyGradient, output: Any, batch: PackedBatch, step: StepBatch
    ) -> Tokens:
        """Pick the parts of the model's output and of the batch."""
        logprobs = output if isinstance(output, Tensor) else output.logprobs
        labeled = batch.labels >= 0
        scale = torch.full_like(logprobs, 1.0 / step.num_loss_tokens, requires_grad=False)
        if "loss_weights" in batch.columns:
            scale = batch.columns["loss_weights"].to(logprobs.dtype)
        is_demo = torch.zeros_like(labeled)
        if objective.demos:
            is_demo = batch.columns["is_demo"].to(torch.bool)
        return cls(
            batch=batch,
            output=output,
            logprobs=logprobs,
            labeled=labeled,
            scale=torch.where(labeled, scale, 0.0),
            is_demo=is_demo,
            keep=torch.ones_like(logprobs.detach()),
        )

    def column(self, name: str) -> Tensor:
        """A column in the dtype of the log-probabilities, 0 where there is no label."""
        return self.masked(self.batch.columns[name].to(self.logprobs.dtype))

    def masked(self, values: Tensor) -> Tensor:
        """The values, 0 where there is no label: what stands there must not matter, NaN or not."""
        return torch.where(self.labeled, values, 0.0)

    def entropy(self) -> Tensor:
        """The entropy of each token's distribution. Raises ValueError if the model has none."""
        if isinstance(self.output, Tensor):
            raise ValueError("an entropy bonus needs the entropies: set model.with_entropy = True")
        return self.output.entropy
