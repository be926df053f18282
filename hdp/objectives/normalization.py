"""Normalization: what each token's loss is divided by, named and global.

A loss is a sum over tokens, loss = sum_i c_i sum_t m_t l_t, where c_i is the coefficient of
sequence i. Papers and libraries differ in c_i, under names that do not always say which:

    mode         c_i                       who
    token        1 / sum_j n_j             SFT, PPO, DAPO in code ("token-mean", TRL "dapo")
    sequence     1 / (N n_i)               GRPO Eq. 3, GSPO ("seq-mean-token-mean")
    sum          1 / N                     REINFORCE and RLOO of sequences ("seq-mean-token-sum")
    constant     1 / (N L)                 Dr. GRPO with L = longest response ("...-sum-norm")
    group        1 / (G sum_{j in g} n_j)  DAPO Eq. 8 as written; G groups, sequence i in group g

n_i are the label tokens of sequence i and N the number of sequences, both of the whole step.
Computed before the step is planned, the coefficients do not depend on how it is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Normalization = Literal["token", "sequence", "sum", "constant", "group"]
MODES: tuple[Normalization, ...] = ("token", "sequence", "sum", "constant", "group")


def loss_weights(
    num_loss_tokens: Sequence[int] | np.ndarray,
    mode: Normalization = "token",
    *,
    constant: float | None = None,
    groups: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """(num_seqs,) float64: the coefficient c_i of each sequence's tokens; see the module docstring.

    num_loss_tokens: (num_seqs,) label tokens of each sequence of the step. A sequence without any
    counts in N. constant: L of mode "constant". groups: (num_seqs,) of mode "group".

    Raises ValueError for an unknown mode, a step without label tokens, or a missing argument.
    """
    counts = np.asarray(num_loss_tokens, dtype=np.float64)
    if counts.ndim != 1 or not counts.sum() > 0:
        raise ValueError(f"{len(counts)} sequences have {counts.sum():g} label tokens: need some")
    if (constant is not None) != (mode == "constant") or (groups is not None) != (mode == "group"):
        raise ValueError(
            f"normalization {mode!r} with constant={constant} and "
            f"{'no ' if groups is None else ''}groups: 'constant' needs constant, 'group' needs "
            "groups, and no other mode takes them"
        )
    ones = np.ones(len(counts))
    if mode == "token":
        return ones / counts.sum()
    if mode == "sequence":
        return ones / (len(counts) * np.maximum(counts, 1.0))
    if mode == "sum":
        return ones / len(counts)
    if mode == "constant":
        assert constant is not None
        if not constant > 0:
            raise ValueError(f"constant={constant} must be above 0: the longest response")
        return ones / (len(counts) * constant)
    if mode == "group":
        assert groups is not None
        _, place = np.unique(np.asarray(groups), return_inverse=True)
        if len(place) != len(counts):
            raise ValueError(f"{len(place)} groups for {len(counts)} sequences; give one each")
        totals = np.bincount(place, weights=counts)
        return 1.0 / (len(totals) * np.maximum(totals[place], 1.0))
    raise ValueError(f"normalization {mode!r} is unknown; choose one of {', '.join(MODES)}")
