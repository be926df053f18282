"""open_dataset(): from the name of some data to a TokenDataset, tokenizing only what is new.

    dataset = open_dataset("stdlib", tokenizer="bpe:4096")
    dataset.seqlens            # (n,) int64, without touching a token
    dataset[17].input_ids      # (seqlen,) a view of a memory map: only slices are read
    print(dataset.report)      # what was read, skipped and cut

Tokens are cached under a key derived from the source's state (paths, sizes, times), the tokenizer's
content and the options that affect tokens. Length limits are not part of the key: they select from
the index when a cache is opened, so changing `--max-length` does not rebuild it.

Invariants, each with a test of the same name in tests/data/test_cache.py:

* workers_change_nothing      the files are the same for any number of workers
* changes_are_detected        a changed file, tokenizer or option gives a new cache
* damaged_cache_is_rebuilt    truncated files are detected by their size, and other damage by the
                              checksums that opening checks (sealed.py); the cache is rebuilt

Tokens of caches over 64 MiB are not read to open them, so damage there that keeps the size is found
by `hdp data CACHE --verify` only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hdp import console
from hdp.data.dataset import TokenDataset, open_cache
from hdp.data.views import Overlong

from .build import build, check_index
from .documents import Document
from .locate import open_source
from .sealed import build_once
from .source import Source
from .tokenizer import BpeTokenizer, Tokenizer, check_no_template, load_tokenizer, train_bpe

_FORMAT_VERSION = 3  # of tokenizer and token caches; part of the key
_TRAINING_BYTES = 32 << 20  # a byte-pair tokenizer is trained on about this much of the source


def open_dataset(
    data: Any = "stdlib",
    *,
    tokenizer: str | Tokenizer = "bpe:4096",
    text_column: str = "text",
    pattern: str | None = None,
    subset: str | None = None,
    split: str = "train",
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    format: str = "auto",
    append_eos: bool = True,
    max_length: int | None = None,
    overlong: Overlong = "error",
    strict: bool = False,
    cache_dir: str | Path | None = None,
    num_workers: int | None = None,
    show_progress: bool | None = None,
) -> TokenDataset:
    """Open data as token sequences; tokenize and cache them first if they are not cached yet.

    Of several processes that start at once, one builds and the others wait: call this before
    anything that can time out, such as creating a process group with a short timeout.

    Args:
        data: "stdlib", a file, folder, glob, list of files, hub name or `datasets.Dataset`; see
            `locate.open_source`, which takes text_column, format, pattern, subset and split.
        tokenizer: "bpe:SIZE" (trained on the data), "bytes", a path or hub name, or a Tokenizer.
        chat_template: a Jinja file, or the name of one of the templates that the tokenizer has.
        chat_template_kwargs: variables for the chat template, e.g. {"enable_thinking": False}.
        append_eos: end each text with the tokenizer's EOS (a chat ends as its template says).
        max_length: maximum tokens per sequence; None: no limit.
        overlong: what happens to documents over max_length: "error", "drop", "truncate" (keep the
            first max_length tokens) or "split" (into sequences of max_length and a remainder).
        strict: damaged rows are an error; otherwise they are skipped and counted.
        cache_dir: None: ~/.cache/hdp.
        num_workers: tokenizer processes; None: one per core if there is enough data.
        show_progress: None: only on a terminal.

    Raises ValueError if the data does not exist, contains no documents, or violates an option, and
    OSError, naming the cache folder, if it is full.
    """
    folder = cache_folder(cache_dir)
    where: dict[str, Any] = {"pattern": pattern, "subset": subset, "split": split}
    source = open_source(data, text_column=text_column, format=format, **where)
    template: Any = {"chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs}
    tokenizer = open_tokenizer(
        tokenizer, source, cache_dir=folder, show_progress=show_progress, **template
    )
    key = _key([source.fingerprint(), tokenizer.fingerprint(), append_eos])
    options: dict[str, Any] = {"num_workers": num_workers, "show_progress": show_progress}
    options |= {"append_eos": append_eos, "strict": strict}
    path = folder / f"tokens-{key}"
    build_once(
        path, lambda folder: _fill(folder, source, tokenizer, key, options), check=check_index
    )
    return open_cache(
        path, max_length=max_length, overlong=overlong, strict=strict, tokenizer=tokenizer
    )


def _fill(
    directory: Path, source: Source, tokenizer: Tokenizer, key: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Fill `directory` and return its metadata, with what is to be said about the tokenizer."""
    meta = build(directory, source, tokenizer, **options)
    notes = [*meta.get("notes", ()), *tokenizer.notes()]
    return {**meta, "notes": notes, "fingerprint": key}


def cache_folder(cache_dir: str | Path | None) -> Path:
    """`cache_dir`, or ~/.cache/hdp."""
    return Path(cache_dir).expanduser() if cache_dir else Path.home() / ".cache" / "hdp"


def open_tokenizer(
    spec: str | Tokenizer,
    source: Source,
    *,
    cache_dir: Path,
    show_progress: bool | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """The tokenizer named by `spec`; "bpe:SIZE" is trained on the source once and cached.

    Raises ValueError for a tokenizer that does not exist, or that takes no chat template.
    """
    if isinstance(spec, Tokenizer):
        check_no_template(f"object {spec.name}", chat_template, chat_template_kwargs)
        return spec
    if spec == "bpe":
        spec = "bpe:4096"
    if not spec.startswith("bpe:"):
        return load_tokenizer(
            spec, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs
        )
    check_no_template(spec, chat_template, chat_template_kwargs)
    size = spec.removeprefix("bpe:")
    if not size.isdecimal():
        raise ValueError(
            f"tokenizer {spec!r}: expected bpe: and a vocabulary size, such as bpe:4096"
        )

    def fill(directory: Path) -> dict[str, Any]:
        trained = train_bpe(_training_texts(source, show_progress), int(size))
        trained.save_pretrained(directory)
        return {"source": source.label}

    path = cache_dir / f"tokenizer-{_key([source.fingerprint(), size])}"
    build_once(path, fill)
    tokenizer = load_tokenizer(str(path))
    assert isinstance(tokenizer, BpeTokenizer), type(tokenizer)
    return tokenizer


def _training_texts(source: Source, show_progress: bool | None) -> Iterator[str]:
    """Texts from shards spread evenly over the source, the same in every run."""
    shards = source.shards(1 << 20)
    stride = max(1, -(-source.num_bytes() // _TRAINING_BYTES))
    chosen = shards[::stride]
    total = sum(shard.num_bytes for shard in chosen)
    num_characters = 0
    with console.progress(
        f"training a tokenizer on {source.label}", total, unit="bytes", enabled=show_progress
    ) as advance:
        for shard in chosen:
            for item in source.read(shard):
                for text in _texts(item) if isinstance(item, Document) else ():
                    yield text[: max(0, 2 * _TRAINING_BYTES - num_characters)]  # of one long text
                    num_characters += len(text)
            advance(shard.num_bytes)


def _texts(document: Document) -> Iterator[str]:
    if document.messages is None:
        texts = (document.text, document.prompt, document.completion)
        yield from (text for text in texts if text)
    for message in document.messages or ():
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text


def _key(parts: list[Any]) -> str:
    content = json.dumps([_FORMAT_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:20]
