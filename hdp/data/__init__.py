"""Data: from files, tables and chats to token sequences, global batches, and one rank's tokens.

Reading order: documents -> sources -> tokenizer (chat) -> build -> cache -> dataset -> sampler ->
pack -> feed. Names are imported on first use; everything except `pack` and `feed` works without
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # as in hdp/__init__.py
    from .dataset import DataReport as DataReport
    from .dataset import TokenDataset as TokenDataset
    from .dataset import open_cache as open_cache
    from .mixture import MixtureSampler as MixtureSampler
    from .prepare.cache import open_dataset as open_dataset
    from .prepare.locate import open_source as open_source
    from .prepare.tokenizer import Tokenizer as Tokenizer
    from .sample import Sample as Sample
    from .sample import SampleList as SampleList
    from .sample import SampleSource as SampleSource
    from .sampler import Sampler as Sampler

_EXPORTS = {
    "hdp.data.prepare.locate": ("open_source",),
    "hdp.data.prepare.tokenizer": ("Tokenizer",),
    "hdp.data.prepare.cache": ("open_dataset",),
    "hdp.data.dataset": ("TokenDataset", "DataReport", "open_cache"),
    "hdp.data.sampler": ("Sampler",),
    "hdp.data.mixture": ("MixtureSampler",),
    "hdp.data.sample": ("Sample", "SampleList", "SampleSource"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

if not TYPE_CHECKING:
    __all__ = list(_MODULE_OF)

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            return getattr(import_module(_MODULE_OF[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)
