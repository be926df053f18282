"""Data: from files, tables and chats to token sequences, global batches, and one rank's tokens.

Reading order: documents -> sources -> tokenizer (chat) -> build -> cache -> dataset -> sampler ->
pack -> feed. Names are loaded on first use; all but `pack` and `feed` work without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "DataReport": "dataset",
    "Sample": "sample",
    "SampleList": "sample",
    "SampleSource": "sample",
    "Sampler": "sampler",
    "TokenDataset": "dataset",
    "Tokenizer": "prepare.tokenizer",
    "open_cache": "dataset",
    "open_dataset": "prepare.cache",
    "open_source": "prepare.locate",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
