"""JoinedSource: several sources as one, to train a tokenizer on all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from hdp.data.prepare.documents import Document, Rejected
from hdp.data.prepare.sources import Shard, Source


class JoinedSource(Source):
    """The rows of `sources`, one after another; chats and texts may come together."""

    row_kind = "row"

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = list(sources)
        self._first_files = [0]
        for source in self._sources:
            self._first_files.append(self._first_files[-1] + max(1, len(source.files)))
        self.label = ", ".join(source.label for source in self._sources)
        self.files = [name for source in self._sources for name in source.files]

    @property
    def is_chat(self) -> bool:
        """Whether any of the sources has conversations."""
        return any(source.is_chat for source in self._sources)

    def fingerprint(self) -> dict[str, Any]:
        """Changes whenever that of a source does."""
        return {"kind": "joined", "sources": [source.fingerprint() for source in self._sources]}

    def num_bytes(self) -> int:
        """Approximate size of the data."""
        return sum(source.num_bytes() for source in self._sources)

    def shards(self, target_bytes: int) -> list[Shard]:
        """The shards of all sources, with files counted through all of them."""
        return [
            replace(shard, file=shard.file + first)
            for source, first in zip(self._sources, self._first_files, strict=False)
            for shard in source.shards(target_bytes)
        ]

    def read(self, shard: Shard) -> Iterator[Document | Rejected | None]:
        """The rows of a shard of one of the sources."""
        owner = sum(first <= shard.file for first in self._first_files) - 1
        return self._sources[owner].read(replace(shard, file=shard.file - self._first_files[owner]))
