"""The interface of tokenizers in this package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .documents import Document, Rejected

Chat = tuple[np.ndarray, np.ndarray]  # (seqlen,) ids and (seqlen,) bool: the assistant's tokens


class Tokenizer(ABC):
    """The tokenizer interface of this package. Must be picklable: workers get copies."""

    name: str
    vocab_size: int  # ids are in [0, vocab_size)
    eos_id: int | None

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes whenever ids may change."""

    def notes(self) -> list[str]:
        """What users should know about how this tokenizer was loaded, one line each."""
        return []

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """(num_tokens,) integer ids per text, without an EOS."""

    @abstractmethod
    def encode_chats(self, chats: Sequence[Document]) -> list[Chat | Rejected]:
        """(ids, loss mask) per chat, or why there are none."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, including special tokens."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that transformers and `load_tokenizer` read."""
