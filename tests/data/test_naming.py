"""Names of data sets with weights."""

from __future__ import annotations

import pytest

from hdp.data.naming import parse_names


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ("stdlib", [("stdlib", None)]),
        (("a.jsonl:0.7", "b/:0.3"), [("a.jsonl", 0.7), ("b/", 0.3)]),
        (
            ("user/name:2", "C:\\data\\x.jsonl:1e-1"),
            [("user/name", 2.0), ("C:\\data\\x.jsonl", 0.1)],
        ),
        ("C:\\data", [("C:\\data", None)]),
        ("C:/data", [("C:/data", None)]),
        ("s3://bucket/x", [("s3://bucket/x", None)]),
        (("data/*.jsonl:3", "x:y:1"), [("data/*.jsonl", 3.0), ("x:y", 1.0)]),
        (["a", "b"], [("a", None), ("b", None)]),
        (":5", [(":5", None)]),
    ],
)
def test_names_and_weights(data, names):
    assert parse_names(data) == names


def test_what_exists_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("day:1", "day", "x:2.jsonl"):
        (tmp_path / name).write_text("text")
    assert parse_names("day:1") == [("day:1", None)]
    assert parse_names(("day:1:3", "day:2")) == [("day:1", 3.0), ("day", 2.0)]
    assert parse_names("x:[0-9].jsonl") == [("x:[0-9].jsonl", None)]
    with pytest.raises(ValueError, match=r"'half' is not a weight; write a number, such as day:0"):
        parse_names("day:half")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("a:0", "b:1"), r"--data a:0: a weight must be above 0; leave the data set out"),
        (("a:0", "b:0"), r"--data a:0: a weight must be above 0"),
        (("a:-0.5", "b:1"), r"--data a:-0\.5: a weight must be above 0"),
        (("a:nan", "b:1"), r"a weight must be above 0"),
        (("a:inf", "b:1"), r"a weight must be above 0"),
        (("a:1", "b"), r"gives b no weight and others one: write b:WEIGHT, or no weights at all"),
        (("a:1", "a:2"), r"names a twice: give it once"),
        ((), r"at least one data set"),
    ],
)
def test_bad_names(data, message):
    with pytest.raises(ValueError, match=message):
        parse_names(data)
