"""TokenDataset: length limits, counts, and lazy reading."""

from __future__ import annotations

import json
import os
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.data.dataset import TokenDataset, open_cache
from hdp.data.prepare.cache import open_dataset
from hdp.data.views import choose
from hdp.scheduler.workloads.limit import limit_lengths
from hdp.scheduler.workloads.read import read_lengths


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Texts of 1 to 100 bytes; files that are not documents; chats in a separate file."""
    path = tmp_path_factory.mktemp("data")
    (path / "texts").mkdir()
    for i in range(1, 101):
        (path / "texts" / f"{i:03}.txt").write_bytes(bytes([97 + i % 26]) * i)
    (path / "texts" / "zz-empty").write_text("")
    (path / "texts" / "zz-bad").write_bytes(b"\xff")
    chats = [
        [{"role": "user", "content": "u" * i}, {"role": "assistant", "content": "a" * (60 - i)}]
        for i in range(60)
    ]
    rows = [json.dumps({"messages": chat}) for chat in chats]
    (path / "chats.jsonl").write_text("\n".join(["broken", "", *rows]))
    return path


def texts(folder: Path, **options) -> TokenDataset:
    options = {"tokenizer": "bytes", "append_eos": False, **options}
    return open_dataset(str(folder / "texts"), cache_dir=folder / "cache", **options)


def chats(folder: Path, **options) -> TokenDataset:
    data = str(folder / "chats.jsonl")
    return open_dataset(data, cache_dir=folder / "cache", tokenizer="bytes", **options)


def test_nothing_is_cut_by_default(folder):
    message = (
        r"100.txt has 100 tokens, more than max_length=70 \(30 of 100 documents are too long\): "
        r"raise it to 100, or choose --overlong drop, truncate or split"
    )
    with pytest.raises(ValueError, match=message):
        texts(folder, max_length=70)
    assert len(texts(folder, max_length=100)) == 99  # all but the single-token text
    with pytest.raises(ValueError, match="overlong='drop' requires max_length"):
        texts(folder, overlong="drop")
    with pytest.raises(ValueError, match="error, drop, truncate, split, not 'cut'"):
        texts(folder, max_length=10, overlong="cut")
    with pytest.raises(ValueError, match="max_length=1 must be at least 2"):
        texts(folder, max_length=1, overlong="split")


def test_every_row_is_accounted_for(folder):
    """Source rows = documents + rejections; tokens = kept + lost + without loss."""
    for dataset in (texts(folder), chats(folder)):
        report = dataset.report
        assert report.num_rows == report.num_documents + sum(report.num_rejected.values())
    assert texts(folder).report.num_rejected == {"not UTF-8": 1, "empty": 1}
    assert chats(folder).report.num_rejected == {"malformed": 1}
    assert chats(folder).report.examples["malformed"][0][0].endswith("chats.jsonl:1")
    for overlong in ("drop", "truncate", "split"):
        report = texts(folder, max_length=30, overlong=overlong).report
        num_skipped = report.num_without_loss  # each has one token here
        assert report.num_tokens + report.lost_tokens + num_skipped == 5050


def test_drop_truncate_split(folder):
    drop = texts(folder, max_length=30, overlong="drop")
    assert drop.seqlens.tolist() == list(range(2, 31))
    assert (drop.report.num_overlong, drop.report.lost_tokens) == (70, 5050 - 465)
    truncate = texts(folder, max_length=30, overlong="truncate")
    assert truncate.seqlens.tolist() == [*range(2, 31), *[30] * 70]
    split = texts(folder, max_length=30, overlong="split")
    whole = limit_lengths(np.arange(1, 101), 30, "split")  # as `hdp plan` splits
    assert split.seqlens.tolist() == [n for n in whole.tolist() if n > 1]
    assert split.report.lost_tokens == 0
    parts = [i for i in range(len(split)) if "100.txt" in split.name(i)]
    assert [split.name(i).split("txt ")[1] for i in parts] == [
        "[tokens 0:30]",
        "[tokens 30:60]",
        "[tokens 60:90]",
        "[tokens 90:100]",
    ]
    joined = b"".join(bytes(split[i].input_ids) for i in parts)
    assert joined == (folder / "texts" / "100.txt").read_bytes()
    assert drop.name(0).endswith("002.txt") and truncate.name(98).endswith("100.txt [tokens 0:30]")


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split"])
@pytest.mark.parametrize("max_length", [2, 40, 90])
def test_num_loss_tokens_match_the_samples(folder, overlong, max_length):
    limit = {"max_length": max_length, "overlong": overlong}
    datasets = [texts(folder, **limit)]
    if max_length > 81 or (max_length > 2 and overlong != "drop"):  # each chat has 81 tokens
        datasets.append(chats(folder, **limit))
    for dataset in datasets:
        for i, sample in enumerate(dataset):
            seqlen = len(sample.input_ids)
            mask = np.ones(seqlen, bool) if sample.loss_mask is None else sample.loss_mask
            assert seqlen == dataset.seqlens[i] <= max_length
            assert dataset.num_loss_tokens[i] == np.count_nonzero(mask[1:]) > 0
            assert (sample.labels(0, seqlen) >= 0).sum() == dataset.num_loss_tokens[i]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2**30)), min_size=1, max_size=20),
    st.integers(2, 40),
    st.sampled_from(["drop", "truncate", "split"]),
    st.booleans(),
)
def test_choose_against_a_loop(documents, max_length, overlong, has_mask):
    """choose() gives the same result as a simple loop over documents."""
    seqlens = np.array([seqlen for seqlen, _ in documents])
    offsets = np.concatenate([[0], np.cumsum(seqlens)])
    mask = np.ones(offsets[-1], bool)
    if has_mask:
        mask = np.array([bits >> i & 1 for n, bits in documents for i in range(n)], dtype=bool)
    loss = np.array([mask[start + 1 : stop].sum() for start, stop in pairwise(offsets)])
    expected = []
    for document, (start, stop) in enumerate(pairwise(offsets)):
        starts = range(start, stop, max_length) if overlong == "split" else [start]
        for part in starts:
            if overlong == "drop" and stop - start > max_length:
                continue
            end = min(stop, part + max_length)
            if mask[part + 1 : end].any():
                expected.append((document, part, end - part, mask[part + 1 : end].sum()))
    arguments = (offsets, seqlens, loss, mask if has_mask else None)
    options = {"max_length": max_length, "overlong": overlong, "name": str}
    if not expected:
        with pytest.raises(ValueError, match="no sequence is left"):
            choose(*arguments, **options)
        return
    chosen = choose(*arguments, **options)
    columns = (chosen.documents, chosen.starts, chosen.seqlens, chosen.num_loss_tokens)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == expected


def test_views_read_nothing(folder):
    """Samples share memory with the map of the cache, and cannot write to it."""
    dataset = chats(folder)
    sample = dataset[3]
    assert np.shares_memory(sample.input_ids, dataset._tokens)
    assert np.shares_memory(sample.loss_mask, dataset._loss_mask)
    assert type(sample.input_ids) is np.ndarray
    with pytest.raises(ValueError, match="read-only"):
        sample.input_ids[0] = 1
    assert len(pickle.dumps(sample)) < 1000  # the slice, not the map


def test_indexing(folder):
    dataset = texts(folder)
    assert bytes(dataset[-1].input_ids) == bytes([97 + 100 % 26]) * 100
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    assert len(list(dataset)) == len(dataset)


def test_pickle_carries_a_path(folder):
    dataset = texts(folder, max_length=30, overlong="split")
    data = pickle.dumps(dataset)
    copy = pickle.loads(data)
    assert len(data) < 1000 and copy.fingerprint == dataset.fingerprint
    np.testing.assert_array_equal(copy.seqlens, dataset.seqlens)
    assert copy.tokenizer.name == "bytes"


def test_open_cache_without_the_source(folder, tmp_path):
    dataset = texts(folder)
    again = open_cache(dataset.report.cache_path)
    assert again.fingerprint == dataset.fingerprint and again.tokenizer is None
    assert again.vocab_size == 256 and again.name(0) == dataset.name(0)
    with pytest.raises(ValueError, match=r"bad.* is not UTF-8"):
        open_cache(dataset.report.cache_path, strict=True)
    with pytest.raises(ValueError, match="is not a token cache"):
        open_cache(tmp_path)


def test_lengths_for_the_planner(folder, tmp_path):
    """`hdp plan --lengths` reads both a cache folder and saved lengths."""
    dataset = texts(folder, max_length=50, overlong="truncate")
    cached = read_lengths(dataset.report.cache_path)
    assert cached.tolist() == list(range(1, 101))
    dataset.save_lengths(tmp_path / "lengths.npy")
    assert read_lengths(tmp_path / "lengths.npy").tolist() == dataset.seqlens.tolist()


def test_check_fits(folder):
    dataset = texts(folder)
    dataset.check_fits(hdp_size=4, max_tokens_per_rank=25)
    message = (
        r"100.txt has 100 tokens, but 4 ranks of 24 tokens hold 96 \(4 sequences do not fit\): use "
        r"5 ranks, or --max-tokens-per-rank 25, or --max-length 96 --overlong drop\|truncate\|split"
    )
    with pytest.raises(ValueError, match=message):
        dataset.check_fits(hdp_size=4, max_tokens_per_rank=24)


def test_all_sequences_without_loss(folder):
    with pytest.raises(ValueError, match="no sequence is left of 60 documents"):
        chats(folder, max_length=2, overlong="truncate")


def test_report_summary(folder):
    text = str(texts(folder, max_length=50, overlong="truncate").report)
    assert text.splitlines() == [
        f"{folder / 'texts'}: 99 sequences, 3,774 tokens (bytes), 3,675 with loss, longest 50",
        f"rows skipped (not UTF-8): 1, first {folder / 'texts' / 'zz-bad'} "
        "(byte 0: invalid start byte)",
        f"rows skipped (empty): 1, first {folder / 'texts' / 'zz-empty'}",
        "documents over 50 tokens, truncated: 50; 1,275 tokens left out",
        f"sequences skipped (no loss tokens): 1, first {folder / 'texts' / '001.txt'}",
    ]


def test_cache_folder_may_be_read_only(folder, tmp_path):
    """Ranks that only read the cache need no write permission."""
    path = Path(texts(folder).report.cache_path)
    mode = path.stat().st_mode
    os.chmod(path, 0o555)
    try:
        assert len(texts(folder)) == 99
    finally:
        os.chmod(path, mode)
