"""choose(): the sequences of a token cache that a run sees. Reads the index, not the tokens.

A document longer than `max_length` is an error by default; the user can choose to drop, truncate or
split it, so no tokens are lost unless asked for. A sequence without loss tokens (one token long, or
part of a chat in which the assistant says nothing) is left out and counted: it would cost a forward
pass and teach nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Overlong = Literal["error", "drop", "truncate", "split"]
OVERLONG = ("error", "drop", "truncate", "split")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """n sequences in the tokens of a cache."""

    starts: np.ndarray  # (n,) int64, where they start in the cache's tokens
    seqlens: np.ndarray  # (n,) int64
    num_loss_tokens: np.ndarray  # (n,) int64
    documents: np.ndarray  # (n,) int64, the document that each sequence is or is part of
    num_overlong: int = 0  # documents over max_length
    lost_tokens: int = 0  # of dropped and truncated documents
    num_without_loss: int = 0  # sequences left out because they have no loss tokens
    first_without_loss: int | None = None  # the document of the first of these

    def __len__(self) -> int:
        return len(self.seqlens)


def choose(
    offsets: np.ndarray,
    seqlens: np.ndarray,
    num_loss_tokens: np.ndarray,
    loss_mask: np.ndarray | None,
    *,
    max_length: int | None,
    overlong: Overlong,
    name: Callable[[int], str],
) -> Sequences:
    """The sequences of a cache after a length limit.

    Args:
        offsets: (n + 1,) int64, where documents start in the tokens.
        seqlens: (n,) int64, tokens per document.
        num_loss_tokens: (n,) int64, labels per document.
        loss_mask: (num_tokens,) bool; None if every token except a document's first has a loss.
        max_length: maximum tokens per sequence; None: no limit.
        overlong: what happens to longer documents.
        name: returns a document's name for messages.

    Raises ValueError if a document is too long under "error", and if no sequence is left.
    """
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, not {overlong!r}")
    if max_length is not None and max_length < 2:
        raise ValueError(
            f"max_length={max_length} must be at least 2, as one token predicts the next"
        )
    if max_length is None and overlong != "error":
        raise ValueError(
            f"overlong={overlong!r} requires max_length: the length above which it applies"
        )
    sequences = _limit(offsets, seqlens, num_loss_tokens, loss_mask, max_length, overlong, name)
    keep = sequences.num_loss_tokens > 0
    if not keep.any():
        raise ValueError(
            f"no sequence is left of {len(seqlens):,} documents: {sequences.num_overlong:,} are "
            f"over max_length={max_length} ({overlong}), and {len(keep):,} sequences have no loss "
            "tokens; raise max_length or check the data"
        )
    if keep.all():
        return sequences
    return Sequences(
        starts=sequences.starts[keep],
        seqlens=sequences.seqlens[keep],
        num_loss_tokens=sequences.num_loss_tokens[keep],
        documents=sequences.documents[keep],
        num_overlong=sequences.num_overlong,
        lost_tokens=sequences.lost_tokens,
        num_without_loss=int(np.count_nonzero(~keep)),
        first_without_loss=int(sequences.documents[np.argmin(keep)]),
    )


def _limit(
    offsets: np.ndarray,
    seqlens: np.ndarray,
    num_loss_tokens: np.ndarray,
    loss_mask: np.ndarray | None,
    max_length: int | None,
    overlong: Overlong,
    name: Callable[[int], str],
) -> Sequences:
    starts = offsets[:-1]
    documents = np.arange(len(seqlens))
    too_long = np.zeros(len(seqlens), bool) if max_length is None else seqlens > max_length
    num_overlong = int(np.count_nonzero(too_long))
    if max_length is None or not num_overlong:
        return Sequences(
            starts=starts, seqlens=seqlens, num_loss_tokens=num_loss_tokens, documents=documents
        )
    if overlong == "error":
        longest = int(np.argmax(seqlens))
        raise ValueError(
            f"{name(longest)} has {seqlens[longest]:,} tokens, more than max_length="
            f"{max_length} ({num_overlong:,} of {len(seqlens):,} documents are too long): raise "
            f"it to {seqlens[longest]}, or choose --overlong drop, truncate or split"
        )
    if overlong == "drop":
        kept = np.flatnonzero(~too_long)
        return Sequences(
            starts=starts[kept],
            seqlens=seqlens[kept],
            num_loss_tokens=num_loss_tokens[kept],
            documents=kept,
            num_overlong=num_overlong,
            lost_tokens=int(seqlens[too_long].sum()),
        )
    num_parts = -(-seqlens // max_length) if overlong == "split" else np.ones_like(seqlens)
    documents = np.repeat(documents, num_parts)
    part = np.arange(len(documents)) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    part_starts = starts[documents] + part * max_length
    part_seqlens = np.minimum(offsets[documents + 1] - part_starts, max_length)
    return Sequences(
        starts=part_starts,
        seqlens=part_seqlens,
        num_loss_tokens=_count_loss(
            part_starts, part_seqlens, num_loss_tokens[documents], too_long[documents], loss_mask
        ),
        documents=documents,
        num_overlong=num_overlong,
        lost_tokens=int(seqlens.sum() - part_seqlens.sum()),
    )


def _count_loss(
    starts: np.ndarray,
    seqlens: np.ndarray,
    of_documents: np.ndarray,
    is_cut: np.ndarray,
    loss_mask: np.ndarray | None,
) -> np.ndarray:
    """Labels per sequence: known for whole documents, counted from the mask for parts."""
    if loss_mask is None:
        return seqlens - 1
    counts = np.array(of_documents)
    for i in np.flatnonzero(is_cut):
        counts[i] = np.count_nonzero(loss_mask[starts[i] + 1 : starts[i] + seqlens[i]])
    return counts
