"""encode_batch(): documents of any kind to ids and loss masks, each with the tokenizer's method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .documents import UNKNOWN_TOKEN, Document, Rejected
from .tokenizer import Tokenizer


def encode_batch(
    batch: list[tuple[int, Document]], tokenizer: Tokenizer, *, append_eos: bool
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray | None] | Rejected]]:
    """(row, (ids, mask or None) or Rejected) for each document, in order.

    Documents of one kind go to the tokenizer together.
    """
    encoders: dict[str, Callable[[list[Document]], list[Any]]] = {
        "text": lambda documents: _encode_texts(tokenizer, documents, append_eos),
        "chat": tokenizer.encode_chats,
        "completion": lambda documents: _encode_completions(tokenizer, documents, append_eos),
        "tokens": lambda documents: _check_tokens(tokenizer, documents),
    }
    groups: dict[str, list[tuple[int, Document]]] = {}
    for row, document in batch:
        groups.setdefault(_kind(document, tokenizer), []).append((row, document))
    results: dict[int, Any] = {}
    for kind, group in groups.items():  # none is empty, which some back ends do not accept
        encoded = encoders[kind]([document for _, document in group])
        results |= zip((row for row, _ in group), encoded, strict=True)
    return ((row, results[row]) for row, _ in batch)


def _kind(document: Document, tokenizer: Tokenizer) -> str:
    if document.input_ids is not None:
        return "tokens"
    if document.text is not None:
        return "text"
    has_choice = document.messages is not None and document.completion is not None
    is_chat = tokenizer.has_chat_template if has_choice else document.messages is not None
    return "chat" if is_chat else "completion"


def _encode_texts(tokenizer: Tokenizer, documents: list[Document], append_eos: bool) -> list[Any]:
    texts = tokenizer.encode_texts([document.text or "" for document in documents])
    return [(_with_eos(ids, tokenizer) if append_eos else ids, None) for ids in texts]


def _encode_completions(
    tokenizer: Tokenizer, documents: list[Document], append_eos: bool
) -> list[Any]:
    results: list[Any] = []
    for encoded in tokenizer.encode_completions(documents):
        if not isinstance(encoded, Rejected):
            ids, mask = encoded
            longer = _with_eos(ids, tokenizer) if append_eos else ids
            encoded = longer, np.append(mask, np.ones(len(longer) - len(ids), dtype=bool))
        results.append(encoded)
    return results


def _check_tokens(tokenizer: Tokenizer, documents: list[Document]) -> list[Any]:
    """Token rows as they are, if the vocabulary has their ids."""
    results: list[Any] = []
    size = tokenizer.vocab_size
    for document in documents:
        ids, mask = document.input_ids, document.loss_mask
        assert ids is not None and mask is not None
        unknown = np.flatnonzero((ids < 0) | (ids >= size))
        if len(unknown):
            at = int(unknown[0])
            detail = f"token {at} is {ids[at]}; {tokenizer.name} has ids 0 to {size - 1}"
            results.append(Rejected(reason=UNKNOWN_TOKEN, detail=detail))
        else:
            results.append((ids, mask))
    return results


def _with_eos(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    eos = tokenizer.eos_id
    if eos is None or (len(ids) and ids[-1] == eos):
        return ids
    # A tokenizer with few ids may return a dtype that cannot hold its EOS.
    return np.append(ids, np.array(eos, dtype=np.promote_types(ids.dtype, np.min_scalar_type(eos))))
