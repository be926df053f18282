"""What a run learns: its objective, the data that it takes, the models beside the policy.

    objective   data        beside the policy    passes per step
    sft         sequences   -                    forward and backward
    dpo, ipo    pairs       the reference        one forward more
    rpo         pairs       the reference        one forward more
    kto         labeled     the reference        three forwards more: two for its baseline
    reward      pairs       -                    forward and backward; a scalar head

The reference is the model that the run started from: a frozen copy, or the policy without its
adapters if it has some.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hdp.attention.comm import RingComm
from hdp.objectives import DPO, KTO, BradleyTerry, Objective, cross_entropy

if TYPE_CHECKING:
    from hdp.config import TrainConfig

_PAIRED = ("dpo", "ipo", "rpo", "reward")
_WITH_REFERENCE = ("dpo", "ipo", "rpo", "kto")


def is_paired(config: TrainConfig) -> bool:
    """Whether the run's data are pairs of answers."""
    return config.objective in _PAIRED


def needs_reference(config: TrainConfig) -> bool:
    """Whether the objective compares the policy with a reference."""
    return config.objective in _WITH_REFERENCE


def build_objective(config: TrainConfig, comm: RingComm) -> Objective:
    """The objective that `config` names. Raises ValueError for options out of range."""
    if config.objective == "sft":
        return cross_entropy
    if config.objective == "reward":
        return BradleyTerry(comm=comm)
    if config.objective == "kto":
        return KTO(beta=config.beta, comm=comm)
    return DPO(
        beta=config.beta,
        loss="ipo" if config.objective == "ipo" else "sigmoid",
        nll=config.rpo_alpha if config.objective == "rpo" else 0.0,
        comm=comm,
    )


def averages(sums: Mapping[str, float]) -> dict[str, float]:
    """Means from the sums that an objective reports for a step: per pair, or, of labeled answers,
    per answer of the kind. {} for objectives that report neither."""
    if sums.get("sequences"):
        good, bad = sums["good"], sums["sequences"] - sums["good"]
        rewards = [
            sums["good_reward"] / good if good else 0.0,
            sums["bad_reward"] / bad if bad else 0.0,
        ]
        return {
            "margin": rewards[0] - rewards[1] if good and bad else 0.0,
            "kl": sums["kl"] / sums["sequences"],
            "good_reward": rewards[0],
            "bad_reward": rewards[1],
        }
    pairs = sums.get("pairs", 0.0)
    if not pairs:
        return {}
    return {name: total / pairs for name, total in sums.items() if name != "pairs"}
