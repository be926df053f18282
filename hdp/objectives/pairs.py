"""Preference objectives on pairs: DPO, IPO, RPO, KTO, and Bradley-Terry reward models.

A step holds pairs: sequence 2k is the chosen and 2k + 1 the rejected answer to the same prompt. The
two are one unit of the plan (`pair_units`), so they share a microbatch on the same ranks, and the
sums over each sequence that these losses need stay inside that microbatch (`sequence_sums`).

With S the sum of the policy's log-probabilities over a sequence's label tokens, B the reference's
(column ref_logprobs), and Delta = (S_chosen - B_chosen) - (S_rejected - B_rejected):

    DPO     -log sigmoid(beta Delta), with label smoothing e: (1 - e), e   arXiv 2305.18290 Eq. 7
    IPO     (Delta - 1 / (2 beta))^2, Delta of per-token means             arXiv 2310.12036 Eq. 17
    RPO     DPO + alpha * mean negative log-likelihood of the chosen       arXiv 2404.19733 Eq. 1
    KTO     lambda (1 - sigmoid(+-beta (S - B - z)))                       arXiv 2402.01306 Eq. 7
    reward  -log sigmoid(s_chosen - s_rejected - margin)                   arXiv 2203.02155 Eq. 1

Losses are means over the pairs of the step (KTO: over its sequences).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import Share
from .sequences import is_owner, sequence_sums

if TYPE_CHECKING:
    from hdp.attention.comm import RingComm
    from hdp.data.feed import StepBatch
    from hdp.data.pack import PackedBatch


def pair_units(num_seqs: int) -> np.ndarray:
    """(num_seqs,) int64 [0, 0, 1, 1, ...]: the units of `hdp.plan` for pairs.

    Raises ValueError for an odd number of sequences.
    """
    if num_seqs % 2:
        raise ValueError(f"{num_seqs} sequences are no pairs: chosen and rejected take turns")
    return np.arange(num_seqs, dtype=np.int64) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DPO:
    """DPO, and IPO and RPO by their options.

    beta: 0.1 in the paper. loss: "sigmoid" (DPO) or "ipo". label_smoothing: the share of pairs
    whose label is taken to be wrong (conservative DPO). nll: RPO's alpha, 1 in the paper; 0: none.
    comm: the context's communicator.

    Raises ValueError unless beta > 0, 0 <= label_smoothing < 0.5 and nll >= 0.
    """

    beta: float = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    nll: float = 0.0
    comm: RingComm | None = None
    columns: tuple[str, ...] = ("ref_logprobs",)

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        if not self.nll >= 0:
            raise ValueError(f"nll={self.nll} must be 0 or more")
        if self.loss not in ("sigmoid", "ipo"):
            raise ValueError(f"loss={self.loss!r} is unknown; choose sigmoid or ipo")

    def __call__(self, output: Any, batch: PackedBatch, step: StepBatch, /) -> Share:
        """The microbatch's share of the loss and of the metrics; see `Objective`."""
        logprobs = output if isinstance(output, Tensor) else output.logprobs
        labeled = batch.labels >= 0
        ref = torch.where(labeled, batch.columns["ref_logprobs"].to(logprobs.dtype), 0.0)
        rows = torch.stack([logprobs, ref, labeled.to(logprobs.dtype)], dim=1)
        sums = sequence_sums(rows, batch, self.comm)
        chosen, rejected = _pairs(batch)
        num_pairs = step.plan.num_seqs // 2
        gaps = sums[:, 0] - sums[:, 1]
        counts = sums[:, 2].detach().clamp(min=1.0)
        if self.loss == "ipo":
            gaps = gaps / counts
        delta = gaps[chosen] - gaps[rejected]
        losses = self._losses(delta)
        if self.nll:
            losses = losses - self.nll * sums[chosen, 0] / counts[chosen]
        owned = is_owner(batch)[chosen]
        loss = _count_once(losses, owned).sum() / num_pairs + 0.0 * logprobs.sum()
        delta = delta.detach()
        metrics = {
            "pairs": owned.sum(),
            "accuracy": ((delta > 0) & owned).sum(),
            "margin": (self.beta * delta * owned).sum(),
            "chosen_reward": (self.beta * gaps.detach()[chosen] * owned).sum(),
            "rejected_reward": (self.beta * gaps.detach()[rejected] * owned).sum(),
        }
        return loss, metrics

    def _losses(self, delta: Tensor) -> Tensor:
        if self.loss == "ipo":
            return (delta - 1.0 / (2.0 * self.beta)).square()
        e = self.label_smoothing
        return -(1 - e) * F.logsigmoid(self.beta * delta) - e * F.logsigmoid(-self.beta * delta)


@dataclass(frozen=True, slots=True, kw_only=True)
class KTO:
    """KTO: single answers that are good or bad; no pairs.

    Columns ref_logprobs, is_good (the same for all tokens of a sequence) and kl_baseline, the z of
    Eq. 7: the mean of S - B over answers paired with other prompts, at least 0, computed by
    `forward_step` before the update and the same for all sequences. beta: 0.1. good_weight,
    bad_weight: the lambdas, 1.

    Raises ValueError unless beta > 0 and the weights are above 0.
    """

    beta: float = 0.1
    good_weight: float = 1.0
    bad_weight: float = 1.0
    comm: RingComm | None = None
    columns: tuple[str, ...] = ("ref_logprobs", "is_good", "kl_baseline")

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.good_weight > 0 and self.bad_weight > 0):
            raise ValueError(
                f"beta={self.beta}, good_weight={self.good_weight}, bad_weight={self.bad_weight} "
                "must be above 0"
            )

    def __call__(self, output: Any, batch: PackedBatch, step: StepBatch, /) -> Share:
        """The microbatch's share of the loss and of the metrics; see `Objective`."""
        logprobs = output if isinstance(output, Tensor) else output.logprobs
        labeled = batch.labels >= 0
        picked = [batch.columns[name].to(logprobs.dtype) for name in self.columns]
        rows = [logprobs, *(torch.where(labeled, column, 0.0) for column in picked)]
        sums = sequence_sums(
            torch.stack([*rows, labeled.to(logprobs.dtype)], dim=1), batch, self.comm
        )
        counts = sums[:, 4].detach().clamp(min=1.0)
        good = sums[:, 2].detach() / counts > 0.5
        baseline = sums[:, 3].detach() / counts
        gap = sums[:, 0] - sums[:, 1] - baseline
        sign = torch.where(good, 1.0, -1.0).to(gap.dtype)
        weight = torch.where(
            good, gap.new_tensor(self.good_weight), gap.new_tensor(self.bad_weight)
        )
        losses = weight * (1.0 - torch.sigmoid(sign * self.beta * gap))
        owned = is_owner(batch)
        loss = _count_once(losses, owned).sum() / step.plan.num_seqs + 0.0 * logprobs.sum()
        reward = self.beta * (gap + baseline).detach() * owned
        metrics = {
            "sequences": owned.sum(),
            "good": (good & owned).sum(),
            "kl": (baseline * owned).sum(),
            "good_reward": (reward * good).sum(),
            "bad_reward": (reward * ~good).sum(),
        }
        return loss, metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class BradleyTerry:
    """A reward model: the chosen answer's score should exceed the rejected one's.

    The model returns a score per token, (total_tokens,); the score of a sequence is that of its
    last token. margin: how far apart scores should be. comm: the context's communicator.
    """

    margin: float = 0.0
    comm: RingComm | None = None
    columns: tuple[str, ...] = ()

    def __call__(self, output: Tensor, batch: PackedBatch, step: StepBatch, /) -> Share:
        """The microbatch's share of the loss and of the metrics; see `Objective`."""
        scores = sequence_sums(output * is_last_token(batch, step), batch, self.comm)
        chosen, rejected = _pairs(batch)
        gap = scores[chosen] - scores[rejected]
        owned = is_owner(batch)[chosen]
        losses = -F.logsigmoid(gap - self.margin)
        loss = _count_once(losses, owned).sum() / (step.plan.num_seqs // 2) + 0.0 * output.sum()
        gap = gap.detach()
        metrics = {
            "pairs": owned.sum(),
            "accuracy": ((gap > 0) & owned).sum(),
            "margin": (gap * owned).sum(),
        }
        return loss, metrics


def is_last_token(batch: PackedBatch, step: StepBatch) -> Tensor:
    """(total_tokens,) bool: rows that hold the last token of their sequence."""
    last = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    row = 0
    for place, start, stop in batch.layout.spans():
        row += stop - start
        if (
            place < len(batch.seqs)
            and stop == step.plan.seqlens[batch.seqs[place]]
            and stop > start
        ):
            last[row - 1] = True
    return last


def _pairs(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Places in `batch.seqs` of the chosen and of the rejected sequence of each pair.

    Raises ValueError if a pair is not whole: it was not planned as a unit.
    """
    places = {seq: place for place, seq in enumerate(batch.seqs)}
    for seq in places:
        if seq ^ 1 not in places:
            raise ValueError(
                f"sequence {seq} is in a microbatch without the other one of its pair, {seq ^ 1}: "
                "plan pairs as units, plan(..., units=pair_units(num_seqs))"
            )
    chosen = sorted(seq for seq in places if seq % 2 == 0)
    device = batch.input_ids.device
    return (
        torch.tensor([places[seq] for seq in chosen], dtype=torch.int64, device=device),
        torch.tensor([places[seq + 1] for seq in chosen], dtype=torch.int64, device=device),
    )


def _count_once(losses: Tensor, owned: Tensor) -> Tensor:
    """The losses where this rank owns them, and their gradient in this rank's rows everywhere."""
    return torch.where(owned, losses.detach(), 0.0) + (losses - losses.detach())
