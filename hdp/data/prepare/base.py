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
    has_chat_template = True

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

    def encode_completions(self, documents: Sequence[Document]) -> list[Chat | Rejected]:
        """(ids, loss mask) per prompt with its completion, without an EOS.

        A token with a character of the completion has a loss. Raises ValueError if the tokenizer
        does not know which characters a token has.
        """
        raise ValueError(f"tokenizer {self.name} does not support rows with prompt and completion")

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, including special tokens."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that transformers and `load_tokenizer` read."""
