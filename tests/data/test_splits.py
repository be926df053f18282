"""Splits: which files are trained on. Test data are never read as training data in silence."""

from __future__ import annotations

import pytest

from hdp.data.prepare.cache import open_dataset
from hdp.data.prepare.locate import open_source
from hdp.data.prepare.splits import split_of
from tests.data.test_sources import lines, read_all, write


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("data/train_sft-00000-of-00001.parquet", "train_sft"),
        ("test.jsonl", "test"),
        ("my_dev.jsonl.gz", "validation"),
        ("valid.csv", "validation"),
        ("val/a.csv", "validation"),
        ("validation/x/y.csv", "validation"),
        ("eval-2.json", "test"),
        ("Training.tsv", "train"),
        ("train/test.jsonl", "test"),
        ("latest.jsonl", None),
        ("unit-test-cases.jsonl", None),
        ("contest.jsonl", None),
        ("a.test.jsonl", None),
        (".hidden", None),
    ],
)
def test_split_of(path, split):
    assert split_of(path) == split


def layout(folder, *names: str) -> None:
    write(folder, {name: lines({"text": name}) for name in names})


def test_folder_with_splits(tmp_path):
    layout(tmp_path, "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test.jsonl")
    layout(tmp_path, "dev.jsonl")
    train = open_source(tmp_path)
    assert read_all(train) == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    [note] = train.notes
    assert note.startswith("split train: train-00000-of-00002.jsonl, train-00001-of-00002.jsonl; ")
    assert "left out: validation: dev.jsonl; test: test.jsonl" in note
    assert read_all(open_source(tmp_path, split="test")) == ["test.jsonl"]
    for name in ("dev", "validation", "val"):
        assert read_all(open_source(tmp_path, split=name)) == ["dev.jsonl"]
    assert len(read_all(open_source(tmp_path, split="train+validation"))) == 3
    with pytest.raises(ValueError, match=r"no split 'nosuch'; it has test, train, validation: cho"):
        open_source(tmp_path, split="nosuch")
    with pytest.raises(ValueError, match=r"'train\[:10%\]'.*hub only"):
        open_source(tmp_path, split="train[:10%]")
    with pytest.raises(ValueError, match="names no split"):
        open_source(tmp_path, split="")
    assert read_all(open_source(f"{tmp_path}/*.jsonl", split="test")) == ["test.jsonl"]
    assert len(read_all(open_source(f"{tmp_path}/*.jsonl"))) == 2


def test_folders_named_like_splits(tmp_path):
    layout(tmp_path, "data/train/a.jsonl", "data/test/a.jsonl", "data/extra/b.jsonl")
    assert read_all(open_source(tmp_path)) == ["data/extra/b.jsonl", "data/train/a.jsonl"]
    assert read_all(open_source(tmp_path, split="test")) == ["data/test/a.jsonl"]


def test_splits_of_other_names(tmp_path):
    layout(tmp_path, "data/train_sft-00000-of-00001.jsonl", "data/gen.jsonl")
    with pytest.raises(ValueError, match="no split 'test'; it has train, train_sft"):
        open_source(tmp_path, split="test")
    assert len(read_all(open_source(tmp_path, split="train_sft"))) == 1
    assert read_all(open_source(tmp_path, split="gen")) == ["data/gen.jsonl"]


def test_only_test_data(tmp_path):
    layout(tmp_path, "test-00000-of-00001.jsonl")
    with pytest.raises(ValueError, match="no split 'train'; it has test"):
        open_source(tmp_path)


def test_files_that_are_named_are_read(tmp_path):
    layout(tmp_path, "test.jsonl", "train.jsonl")
    assert read_all(open_source(tmp_path / "test.jsonl")) == ["test.jsonl"]
    assert read_all(open_source(tmp_path / "test.jsonl", split="test")) == ["test.jsonl"]
    both = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    assert read_all(open_source(both)) == ["train.jsonl", "test.jsonl"]
    assert read_all(open_source(both, split="test")) == ["test.jsonl"]
    with pytest.raises(ValueError, match="no split 'nosuch'; it has test"):
        open_source(tmp_path / "test.jsonl", split="nosuch")


def test_data_without_splits(tmp_path):
    layout(tmp_path, "a.jsonl", "b.jsonl")
    assert read_all(open_source(tmp_path)) == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ValueError, match=r"has no splits, so split 'test' \(--split\) does not"):
        open_source(tmp_path, split="test")
    with pytest.raises(ValueError, match=r"subset 'x' \(--subset\) applies to hub datasets and"):
        open_source(tmp_path, subset="x")
    write(tmp_path, {"code/test.py": "t", "code/train.py": "x", "code/eval.md": "e"})
    assert read_all(open_source(tmp_path / "code")) == ["e", "t", "x"]  # code is no split
    with pytest.raises(ValueError, match="text without splits"):
        open_source(tmp_path / "code", split="test")


def test_files_have_no_subsets(tmp_path):
    layout(tmp_path, "a.jsonl")
    for data in (tmp_path / "a.jsonl", [tmp_path / "a.jsonl"], f"{tmp_path}/*.jsonl", "stdlib"):
        with pytest.raises(ValueError, match=r"subset 'x' \(--subset\) .* has no subsets"):
            open_source(data, subset="x")


def test_text_files_with_splits(tmp_path):
    write(tmp_path, {"train.txt": "x", "test.txt": "t", "README.md": "about"})
    assert read_all(open_source(tmp_path, pattern="*.txt")) == ["x"]
    assert read_all(open_source(tmp_path, pattern="*.txt", split="test")) == ["t"]


def test_readme_with_configurations(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    folder = tmp_path / "hub"
    layout(folder, "en/one.jsonl", "en/two.jsonl", "de/one.jsonl")
    readme = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: en/one.jsonl
  - split: test
    path: en/two.jsonl
- config_name: de
  data_files: de/*.jsonl
---
# About
"""
    write(folder, {"README.md": readme})
    source = open_source(folder, subset="en")
    assert read_all(source) == ["en/one.jsonl"]
    assert source.notes == ("split train: en/one.jsonl; left out: test: en/two.jsonl",)
    assert read_all(open_source(folder, subset="en", split="test")) == ["en/two.jsonl"]
    assert read_all(open_source(folder, subset="de")) == ["de/one.jsonl"]
    with pytest.raises(ValueError, match=r"no split 'nosuch'; its README has test, train"):
        open_source(folder, subset="en", split="nosuch")
    with pytest.raises(ValueError, match=r"cannot load .*\['en', 'de'\]"):
        open_source(folder)


def test_saved_splits(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    one, two = (datasets.Dataset.from_dict({"text": [text]}) for text in ("one", "two"))
    datasets.DatasetDict(train=one, test=two).save_to_disk(tmp_path / "both")
    one.save_to_disk(tmp_path / "one")
    assert read_all(open_source(tmp_path / "both")) == ["one"]
    assert read_all(open_source(tmp_path / "both", split="test")) == ["two"]
    assert read_all(open_source(tmp_path / "both", split="eval")) == ["two"]
    with pytest.raises(ValueError, match="no split 'nosuch'; it has train, test"):
        read_all(open_source(tmp_path / "both", split="nosuch"))
    with pytest.raises(ValueError, match="saved without splits"):
        read_all(open_source(tmp_path / "one", split="test"))


def test_the_report_names_what_was_read_and_the_key_holds_it(tmp_path):
    layout(tmp_path / "d", "train.jsonl", "test.jsonl")

    def load(**options):
        return open_dataset(
            tmp_path / "d", tokenizer="bytes", cache_dir=tmp_path / "cache", **options
        )

    report = load().report
    assert "format text: columns text" in str(report)
    assert "split train: train.jsonl; left out: test: test.jsonl" in str(report)
    write(tmp_path / "d", {"train.jsonl": lines({"text": "a", "prompt": "b", "completion": "c"})})
    paths = [
        load(**options).report.cache_path
        for options in ({}, {"split": "test"}, {"format": "text"}, {"text_column": "prompt"},
                        {"pattern": "train*", "format": "prompt"})
    ]  # fmt: skip
    assert len({*paths, report.cache_path}) == 6
