"""Selections: what is held out, what is left, and what both share."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from hdp.data import open_dataset
from hdp.data.selection import Selection, count_shared, hold_out, subset


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Texts, of which the long ones are split, and chats."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    texts = [{"text": "".join(rng.choices("abcd ", k=rng.randrange(2, 400)))} for _ in range(40)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": "u" * rng.randrange(1, 50)},
                {"role": "assistant", "content": "a" * rng.randrange(1, 50)},
            ]
        }
        for _ in range(25)
    ]
    options = {"tokenizer": "bytes", "cache_dir": folder / "cache"}
    limit = {"max_length": 100, "overlong": "split"}
    return [
        open_dataset(write_rows(folder / "texts.jsonl", texts), **options, **limit),
        open_dataset(write_rows(folder / "chats.jsonl", chats), **options),
    ]


def contents(data):
    return [bytes(sample.input_ids.astype(np.uint16)) for sample in data]


def test_sequences_of_all_datasets_in_order(datasets):
    both = Selection(datasets)
    assert contents(both) == [*contents(datasets[0]), *contents(datasets[1])]
    assert both.seqlens.tolist() == [len(sample.input_ids) for sample in both]
    assert both.num_loss_tokens.tolist() == [sample.num_loss_tokens for sample in both]
    assert both[0].loss_mask is None and both[-1].loss_mask is not None
    assert both.num_by_dataset == [len(dataset) for dataset in datasets]
    assert both.name(len(datasets[0])) == datasets[1].name(0)
    with pytest.raises(IndexError, match=f"sequence {len(both)} of {len(both)}"):
        both[len(both)]
    few = both.take(np.array([3, len(both) - 1])).take(np.array([1]))
    assert contents(few) == contents(both)[-1:] and few.num_by_dataset == [0, 1]
    assert both.fingerprint == Selection(datasets).fingerprint != few.fingerprint
    assert str(datasets[1].report) in both.report


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_held_out_is_not_trained_on(datasets, share):
    training, held = hold_out(datasets, share, seed=3)
    assert sorted(contents(training) + contents(held)) == sorted(contents(Selection(datasets)))
    assert not set(training.documents()) & set(held.documents())
    for number, dataset in enumerate(datasets):
        count = len(set(dataset.documents))
        docs = held.documents() - (datasets[0].report.num_documents if number else 0)
        mine = docs[np.isin(docs, dataset.documents)] if number else docs[docs < 40]
        assert len(set(mine[mine >= 0])) == min(max(round(share * count), 1), count - 1)


def test_split_documents_stay_whole(datasets):
    training, held = hold_out(datasets[:1], 0.3, seed=0)
    assert len(held) > len(set(held.documents())), "no document of this set was split"
    assert not set(training.documents()) & set(held.documents())


def test_held_out_is_fixed_by_the_seed(datasets):
    first, again, other = (hold_out(datasets, 0.2, seed=s)[1] for s in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    # the choice of documents does not depend on the length limit
    whole = open_again(datasets[0])
    assert set(hold_out([whole], 0.2, seed=1)[1].documents()) == set(
        hold_out(datasets[:1], 0.2, seed=1)[1].documents()
    )


def open_again(dataset):
    from hdp.data import open_cache

    return open_cache(dataset.report.cache_path)


def test_one_document_cannot_be_shared(tmp_path):
    path = write_rows(tmp_path / "one.jsonl", [{"text": "only one"}])
    data = open_dataset(path, tokenizer="bytes", cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"one\.jsonl has one document.*--eval-data instead"):
        hold_out([data], 0.5, seed=0)


def test_subset_is_at_most_so_many_tokens(datasets):
    both = Selection(datasets)
    for limit in (int(both.seqlens.min()), 200, 1000, int(both.seqlens.sum()) - 1):
        some = subset(both, limit, seed=0)
        assert 0 < some.seqlens.sum() <= limit
        assert some.fingerprint == subset(both, limit, seed=0).fingerprint
        assert set(contents(some)) <= set(contents(both))
    assert subset(both, int(both.seqlens.sum()), seed=0) is both
    with pytest.raises(ValueError, match=r"--eval-tokens 1: the shortest of the \d+ sequences"):
        subset(both, 1, seed=0)


def test_shared_sequences_are_counted(datasets, tmp_path):
    training, held = hold_out(datasets, 0.3, seed=3)
    text = datasets[0]
    rows = [{"text": "not in there"}, {"text": text.tokenizer.decode(text[5].input_ids[:-1])}]
    path = write_rows(tmp_path / "eval.jsonl", rows)
    data = open_dataset(path, tokenizer=text.tokenizer, cache_dir=tmp_path)
    assert count_shared(Selection([data]), text) == (int(contents(text)[5] in contents(data)), 2)
    known = set(contents(training))
    assert count_shared(held, training)[0] == sum(row in known for row in contents(held))
    assert count_shared(Selection(datasets[1:]), Selection(datasets)) == (25, 25)


def test_other_vocabularies_are_refused(datasets, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abc abc " * 50}])
    data = open_dataset(path, tokenizer="bpe:300", cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"cannot be mixed: tokenize all of them with one"):
        Selection([datasets[0], data])
