"""Selection: chosen sequences of one or more token data sets, numbered one after another.

Training data is a selection when it has several data sets or when a share of it is held out for
evaluation; the held-out share is another one. Indexing stays lazy: a selection holds ids, and reads
tokens from the data sets' memory maps.

Invariants, each with a test of the same name in tests/data/test_selection.py:

* held_out_is_not_trained_on    the two selections share no document and together have them all
* split_documents_stay_whole    no document has sequences on both sides
* held_out_is_fixed_by_the_seed the choice depends on the documents' number and the seed alone
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .dataset import TokenDataset, check_fits
from .sample import Sample
from .sampler import permute, stable_hash

_HELD_OUT, _SUBSET = 1, 2  # keys: the choices are independent of the order of training
_MAX_COMPARED = 200_000  # sequences that `count_shared` reads on either side


class Selection:
    """Chosen sequences of `datasets`, in the order of `ids`, as a `SampleSource`.

    ids: (n,) int64 sequence ids, counted through all data sets; None: every sequence. The data sets
    have the same tokenizer. Attributes are those of `TokenDataset`. Raises ValueError if there is
    no sequence, or if the vocabularies differ.
    """

    def __init__(self, datasets: Sequence[TokenDataset], ids: np.ndarray | None = None) -> None:
        if not datasets or (ids is not None and not len(ids)):
            raise ValueError("no sequences are selected: the data set is empty")
        sizes = {dataset.vocab_size for dataset in datasets}
        if len(sizes) > 1:
            raise ValueError(
                f"data sets with vocabularies of {sorted(sizes)} entries cannot be mixed: "
                "tokenize all of them with one tokenizer"
            )
        self.datasets = tuple(datasets)
        self.tokenizer, self.vocab_size = datasets[0].tokenizer, datasets[0].vocab_size
        self._ends = np.cumsum([len(dataset) for dataset in datasets])
        self._ids = ids
        self.seqlens = self._gather([dataset.seqlens for dataset in datasets])
        self.num_loss_tokens = self._gather([dataset.num_loss_tokens for dataset in datasets])
        key = hashlib.sha256("+".join(dataset.fingerprint for dataset in datasets).encode())
        key.update(b"" if ids is None else np.asarray(ids, dtype="<i8").tobytes())
        self.fingerprint = key.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.seqlens)

    def __getitem__(self, index: int, /) -> Sample:
        """Sequence `index` as views. Raises IndexError outside [-len, len)."""
        dataset, local = self._locate(index)
        return dataset[local]

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def name(self, index: int) -> str:
        """The origin of sequence `index`, as `TokenDataset.name`."""
        dataset, local = self._locate(index)
        return dataset.name(local)

    def take(self, ids: np.ndarray) -> Selection:
        """The sequences `ids` of this selection."""
        return Selection(self.datasets, ids if self._ids is None else self._ids[ids])

    @property
    def num_by_dataset(self) -> list[int]:
        """How many of the sequences belong to each data set."""
        if self._ids is None:
            return [len(dataset) for dataset in self.datasets]
        owners = np.searchsorted(self._ends, self._ids, side="right")
        return np.bincount(owners, minlength=len(self.datasets)).tolist()

    @property
    def report(self) -> str:
        """What became of the rows of all data sets."""
        return "\n".join(str(dataset.report) for dataset in self.datasets)

    def check_fits(self, *, hdp_size: int, max_tokens_per_rank: int | np.ndarray) -> None:
        """Raise ValueError if a sequence is longer than all ranks together can hold."""
        check_fits(self, hdp_size=hdp_size, max_tokens_per_rank=max_tokens_per_rank)

    def documents(self) -> np.ndarray:
        """(n,) int64: the document of each sequence, counted through all data sets."""
        parts, first = [], 0
        for dataset in self.datasets:
            parts.append(dataset.documents + first)
            first += dataset.report.num_documents
        return self._gather(parts)

    def _locate(self, index: int) -> tuple[TokenDataset, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        place = index if self._ids is None else int(self._ids[index])
        owner = int(np.searchsorted(self._ends, place, side="right"))
        dataset = self.datasets[owner]
        return dataset, place - int(self._ends[owner]) + len(dataset)

    def _gather(self, parts: list[np.ndarray]) -> np.ndarray:
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole if self._ids is None else whole[self._ids]


def hold_out(
    datasets: Sequence[TokenDataset], share: float, *, seed: int
) -> tuple[Selection, Selection]:
    """(training, held out): `share` of the documents of each data set, chosen by `seed`.

    At least one document of each data set is held out, and one left. Raises ValueError if a data
    set has only one.
    """
    masks = []
    for i, dataset in enumerate(datasets):
        documents = np.unique(dataset.documents)
        count = len(documents)
        if count < 2:
            raise ValueError(
                f"{dataset.report.label} has one document, of which no share can be held out: pass "
                "--eval-data instead of --eval-share"
            )
        wanted = min(max(round(share * count), 1), count - 1)
        key = stable_hash(seed, _HELD_OUT, i)
        chosen = documents[permute(np.arange(wanted), count, key=key)]
        masks.append(np.isin(dataset.documents, chosen))
    held = np.concatenate(masks)
    return Selection(datasets, np.flatnonzero(~held)), Selection(datasets, np.flatnonzero(held))


def subset(selection: Selection, max_tokens: int, *, seed: int) -> Selection:
    """Sequences of at most `max_tokens` in all, chosen by `seed`, in their original order.

    Raises ValueError if each sequence is longer than that.
    """
    if int(selection.seqlens.sum()) <= max_tokens:
        return selection
    order = permute(np.arange(len(selection)), len(selection), key=stable_hash(seed, _SUBSET))
    order = order[selection.seqlens[order] <= max_tokens]
    if not len(order):
        raise ValueError(
            f"--eval-tokens {max_tokens}: the shortest of the {len(selection):,} sequences has "
            f"{int(selection.seqlens.min()):,} tokens; allow at least that many"
        )
    totals = np.cumsum(selection.seqlens[order])
    return selection.take(np.sort(order[: np.searchsorted(totals, max_tokens, side="right")]))


def count_shared(evaluation: Selection, training: Any) -> tuple[int, int]:
    """(shared, compared): evaluation sequences that occur token by token in the training data.

    Reads at most 200,000 sequences on either side, of the training data only those with the length
    of an evaluation sequence; `compared` is the number of evaluation sequences that were read.
    """
    ids = np.arange(len(evaluation))[:_MAX_COMPARED]
    lengths = np.unique(evaluation.seqlens[ids])
    candidates = np.flatnonzero(np.isin(training.seqlens, lengths))
    if len(candidates) > _MAX_COMPARED:
        spread = np.linspace(0, len(candidates) - 1, _MAX_COMPARED).astype(np.int64)
        candidates = candidates[spread]
    known = {_digest(training[int(i)]) for i in candidates}
    return sum(_digest(evaluation[int(i)]) in known for i in ids), len(ids)


def _digest(sample: Sample) -> bytes:
    return hashlib.blake2b(sample.input_ids.tobytes(), digest_size=12).digest()
