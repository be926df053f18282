"""Preference pairs: TRL's shapes, what is no pair, batches of whole pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hdp.data.pairs import Mismatched, PairSampler, open_labeled, open_pairs
from hdp.data.prepare.documents import Rejected
from hdp.data.prepare.preference import one_answer
from hdp.data.prepare.rows import find_format

USER = {"role": "user", "content": "2 + 2?"}


def said(text):
    return {"role": "assistant", "content": text}


def opened(tmp_path, rows, **options):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_pairs(str(file), tokenizer="bytes", cache_dir=tmp_path / "cache", **options)


def text(pairs, index):
    """(whole text, text with a loss) of a sequence of bytes."""
    sample = pairs[index]
    ids = np.asarray(sample.input_ids)
    return pairs.tokenizer.decode(ids), pairs.tokenizer.decode(ids[np.asarray(sample.loss_mask)])


def test_three_strings(tmp_path):
    row = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " five"}
    pairs = opened(tmp_path, [row])
    assert len(pairs) == 2 and pairs.pair_lengths.tolist() == [pairs.seqlens.sum()]
    for index, side in enumerate(("chosen", "rejected")):
        whole, learned = text(pairs, index)
        assert whole.startswith(row["prompt"] + row[side]) and learned.startswith(row[side])
        assert row["prompt"] not in learned


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [said("4")], "rejected": [said("5")]},
        {"chosen": [USER, said("4")], "rejected": [USER, said("5")]},
        {"prompt": "2 + 2?", "chosen": [USER, said("4")], "rejected": [USER, said("5")]},
        {
            "prompt": json.dumps([USER]),
            "chosen": json.dumps([said("4")]),
            "rejected": json.dumps([said("5")]),
        },
    ],
)
def test_messages_in_every_shape(row):
    for side, answer in (("chosen", "4"), ("rejected", "5")):
        got = one_answer(row, side)
        assert got == {"prompt": [USER], "completion": [said(answer)]}


def test_a_common_start_is_the_prompt():
    row = {"chosen": "Human: hi\nAssistant: good day", "rejected": "Human: hi\nAssistant: go away"}
    assert one_answer(row, "chosen")["prompt"] == "Human: hi\nAssistant: go"
    row = {"chosen": "sky is blue", "rejected": "sky is green"}
    assert one_answer(row, "rejected") == {"prompt": "sky is", "completion": " green"}


WRONG = [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "equal"),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "'chosen' is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": "  "}, "'rejected' is empty"),
    ({"prompt": [USER], "chosen": [said("")], "rejected": [said("b")]}, "'chosen' is empty"),
    ({"prompt": [USER], "chosen": [], "rejected": [said("b")]}, "'chosen' is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": [said("b")]}, "two strings, or two lists"),
    ({"prompt": "a", "chosen": 3, "rejected": 4}, "two strings, or two lists"),
    ({"prompt": "x", "chosen": [USER, said("4")], "rejected": [USER, said("5")]}, "begin with"),
    ({"chosen": "yes", "rejected": "yes indeed"}, "'chosen' is empty"),
]


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_what_is_no_pair(row, message, tmp_path):
    """Skipped and counted, whatever side is asked for; an error under strict."""
    sides = [one_answer(row, side) for side in ("chosen", "rejected")]
    assert sides[0] == sides[1] and isinstance(sides[0], Rejected)
    good = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    if "rejected" in row and isinstance(row["rejected"], str) and "prompt" in row:
        pairs = opened(tmp_path, [good, row, good])
        assert len(pairs) == 4 and "2 pairs of 3 rows" in str(pairs.report)
        assert "rows skipped" in str(pairs.report) and "jsonl:2" in str(pairs.report)
        with pytest.raises(ValueError, match=r"jsonl:2 is .*fix it, or turn off strict"):
            opened(tmp_path, [good, row, good], strict=True)
    assert message in f"{sides[0].reason} {sides[0].detail}"


def test_pairs_are_whole(tmp_path):
    """One side over the limit, or a prompt over it, takes the pair; every row is accounted for."""
    rows = [
        {"prompt": "p", "chosen": "yes", "rejected": "no"},
        {"prompt": "p", "chosen": "y" * 50, "rejected": "no"},
        {"prompt": "p" * 50, "chosen": "yes", "rejected": "no"},
        {"prompt": "q", "chosen": "same" * 5 + "a", "rejected": "same" * 5 + "b"},
        {"prompt": "r", "chosen": "yes", "rejected": "n" * 30},
    ]
    dropped = opened(tmp_path, rows, max_length=16, overlong="drop")
    assert [text(dropped, i)[0][:2] for i in range(len(dropped))] == ["py", "pn"]
    assert dropped.num_broken == 4 and "pairs skipped" in str(dropped.report)
    cut = opened(tmp_path, rows, max_length=16, overlong="truncate")
    assert len(cut) == 6 and cut.num_equal == 1 and cut.num_broken == 1 and cut.seqlens.max() == 16
    assert "the same tokens within the limit): 1" in str(cut.report)
    with pytest.raises(ValueError, match=r"jsonl:\d+ has .* tokens"):
        opened(tmp_path, rows, max_length=16)
    with pytest.raises(ValueError, match="an answer of the pair is over the limit"):
        opened(tmp_path, rows, max_length=16, overlong="drop", strict=True)
    with pytest.raises(ValueError, match="parts of answers"):
        opened(tmp_path, rows, max_length=16, overlong="split")
    with pytest.raises(ValueError, match="no pair is left: 2 have an answer over the limit"):
        opened(tmp_path, [rows[1], rows[4]], max_length=20, overlong="drop")


def test_batches_are_pairs(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"{i}", "chosen": "a" * int(n), "rejected": "b" * int(m)}
        for i, (n, m) in enumerate(rng.integers(1, 40, (50, 2)))
    ]
    pairs = opened(tmp_path, rows)
    sampler = PairSampler(pairs.pair_lengths, batch_tokens=200, seed=3)
    seen = []
    while sampler.position[0] == 0:
        ids, sampler.position = sampler.batch_at(sampler.position)
        assert (ids[1::2] == ids[0::2] + 1).all() and not (ids[0::2] % 2).any()
        assert pairs.seqlens[ids].sum() <= 200
        seen += ids.tolist()
        for k in ids[0::2]:
            assert text(pairs, k)[0].rstrip("\x00").split("a")[0] in text(pairs, k + 1)[0]
    assert sorted(seen) == list(range(100))
    with pytest.raises(ValueError, match=r"the pair of .*jsonl:\d+ has"):
        pairs.check_fits(hdp_size=2, max_tokens_per_rank=20)


def labeled(tmp_path, rows, **options):
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_labeled(str(file), tokenizer="bytes", cache_dir=tmp_path / "cache", **options)


def test_labels_and_pairs_are_good_and_bad_answers(tmp_path):
    rows = [
        {"prompt": "p", "completion": "yes", "label": True},
        {"prompt": "q", "completion": "no", "label": False},
        {"prompt": "r", "completion": "ja", "label": 1},
        {"prompt": "s", "completion": "", "label": False},
        {"prompt": "t", "completion": "hm", "label": "maybe"},
    ]
    data = labeled(tmp_path, rows)
    got = [(text(data, i)[0][:3], data[i].columns["is_good"].tolist()[0]) for i in range(3)]
    assert len(data) == 3 and got == [("pye", 1.0), ("rja", 1.0), ("qno", 0.0)]
    assert "without an answer" in data.report and "'label' is 'maybe'" in data.report
    with pytest.raises(ValueError, match="fix it, or turn off strict"):
        labeled(tmp_path, rows, strict=True)
    pairs = labeled(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert [pairs[i].columns["is_good"][0] for i in range(2)] == [1.0, 0.0]
    with pytest.raises(ValueError, match="no documents"):
        labeled(tmp_path, rows[:1])


def test_mismatched_answers_belong_to_the_next_prompt(tmp_path):
    rows = [{"prompt": p, "completion": c, "label": True} for p, c in (("a", "b"), ("cc", "dd"))]
    rows.append({"prompt": "eee", "completion": "fff", "label": False})
    data = labeled(tmp_path, rows)
    source = Mismatched([data[i] for i in range(3)], max_length=5)
    decode = data.tokenizer.decode
    got = [(decode(source[i].input_ids), int(source[i].loss_mask.sum())) for i in range(3)]
    end = decode([data.tokenizer.eos_id])
    assert got[0] == (f"add{end}", 3) and got[1] == ("ccfff", 3) and got[2] == (f"eeeb{end}", 2)
    assert source.seqlens.tolist() == [4, 5, 5] and source.num_loss_tokens.tolist() == [3, 3, 2]


def test_auto_never_takes_pairs_for_text():
    columns = ["prompt", "chosen", "rejected"]
    assert find_format(columns) is None
    assert find_format(columns, requested="chosen") == "chosen"
    assert find_format(["prompt", "chosen"], requested="chosen") is None
