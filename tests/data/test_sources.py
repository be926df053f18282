"""Sources: what is read, in which order, and how unreadable data is reported."""

from __future__ import annotations

import json
import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.data.prepare.documents import (
    EMPTY,
    MALFORMED,
    NO_ASSISTANT,
    NO_COLUMN,
    NOT_UTF8,
    UNREADABLE,
    Document,
    Rejected,
    chat_document,
    parse_line,
    without_none,
)
from hdp.data.prepare.locate import open_source
from hdp.data.prepare.sources import DatasetSource, FileSource, JsonLinesSource, Source

CHAT = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


def read_all(source: Source, target_bytes: int = 1 << 20) -> list:
    """Items of all shards in order: texts, or reasons of rejections, or messages, or None."""
    items = []
    for shard in source.shards(target_bytes):
        for item in source.read(shard):
            if isinstance(item, Document):
                items.append(item.text if item.messages is None else item.messages)
            else:
                items.append(item and item.reason)
    return items


def write(folder, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


# -- folders --


def test_folder_in_sorted_order_without_hidden_files(tmp_path):
    write(tmp_path, {"b.py": "b", "a/z.md": "z", ".git/x": "x", "__pycache__/c": "c", ".env": "e"})
    source = open_source(tmp_path)
    assert read_all(source) == ["z", "b"]
    assert [os.path.relpath(path, tmp_path) for path in source.files] == ["a/z.md", "b.py"]
    assert read_all(open_source(tmp_path, pattern="*.py, *.txt")) == ["b"]
    assert read_all(open_source(tmp_path, pattern="a/*")) == ["z"]
    with pytest.raises(ValueError, match=r"no files match '\*\.rs'"):
        open_source(tmp_path, pattern="*.rs")


def test_files_that_are_not_documents(tmp_path):
    write(
        tmp_path, {"1": "", "2": b"\xff\xfe", "3": b"caf\xe9", "4": b"\xef\xbb\xbfbom", "5": "ok"}
    )
    (tmp_path / "6").symlink_to("nowhere")
    os.mkfifo(tmp_path / "7")  # opening it would block forever
    reasons = [EMPTY, NOT_UTF8, NOT_UTF8, "bom", "ok", UNREADABLE, UNREADABLE]
    assert read_all(open_source(tmp_path)) == reasons


def test_line_ends_are_kept(tmp_path):
    write(tmp_path, {"a.txt": "x\r\ny\rz\n"})
    assert read_all(open_source(tmp_path / "a.txt")) == ["x\r\ny\rz\n"]


def test_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    write(tmp_path, {"a": "a", "locked/b": "b"})
    real = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert read_all(open_source(tmp_path)) == ["a", UNREADABLE]


def test_linked_folders_are_followed_once(tmp_path):
    """Linked folders are read, but each folder only once, even with a link cycle."""
    write(tmp_path, {"data/a.txt": "a", "elsewhere/b.txt": "b", "elsewhere/c/d.txt": "d"})
    (tmp_path / "data" / "books").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere" / "c")
    (tmp_path / "elsewhere" / "c" / "loop").symlink_to(tmp_path / "data")
    assert sorted(read_all(open_source(tmp_path / "data"))) == ["a", "b", "d"]


def test_stdlib():
    source = open_source()
    assert source.label == "stdlib" and len(source.files) > 100
    assert any(path.endswith("argparse.py") for path in source.files)
    assert not any("site-packages" in path for path in source.files)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 100))
def test_shards_cover_every_file_once(sizes, target_bytes):
    from hdp.data.prepare.sources import _cut_rows

    shards = _cut_rows(sizes, target_bytes)
    assert [s.start for s in shards] == [0, *[s.stop for s in shards[:-1]]]
    assert shards[-1].stop == len(sizes)
    assert all(sum(sizes[s.start : s.stop - 1]) < target_bytes for s in shards)


# -- JSON lines --


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_json_lines(tmp_path):
    write(tmp_path, {"a.jsonl": lines({"text": "one", "id": 1}, {"text": "two\u2028\n"})})
    assert read_all(open_source(tmp_path / "a.jsonl")) == ["one", "two\u2028\n"]


def test_unreadable_table_among_others(tmp_path):
    """One unreadable file is counted, and the others are read."""
    write(tmp_path, {"b.jsonl": '{"text": "b"}\n', "c.jsonl": ""})
    (tmp_path / "a.jsonl").symlink_to("nowhere")
    source = open_source(tmp_path)
    assert source.columns == ["text"]
    assert read_all(source) == [UNREADABLE, "b"]
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no JSON object: .*a\.jsonl:1: No such file"):
        _ = open_source(tmp_path).columns


def test_bad_lines(tmp_path):
    content = (
        b'\xef\xbb\xbf{"text": "bom"}\r\n'  # Windows
        b"\n  \n"
        b'{"text": "broken"\n'
        b"[1, 2]\n"
        b'"text"\n'
        b'{"text": "caf\xe9"}\n'
        b'{"text": ""}\n'
        b'{"text": null, "x": 1}\n'
        b'{"text": 5}\n'
        b'{"text": "half \\ud800"}\n' + b"[" * 100_000 + b"\n"
        b'{"text": "last, without a line end"}'
    )
    write(tmp_path, {"a.jsonl": content})
    expected = ["bom", None, None, MALFORMED, MALFORMED, MALFORMED, NOT_UTF8, EMPTY, NO_COLUMN]
    expected += [MALFORMED, NOT_UTF8, MALFORMED, "last, without a line end"]
    assert read_all(open_source(tmp_path / "a.jsonl")) == expected


rows = st.lists(st.sampled_from(["", "x", "yy\u00e9", "a" * 30]), min_size=1, max_size=15)


@given(st.lists(rows, min_size=1, max_size=4), st.integers(1, 200), st.booleans())
def test_shards_cover_every_line_once(tmp_path_factory, files, target_bytes, ends):
    folder = tmp_path_factory.mktemp("lines")
    for i, texts in enumerate(files):
        content = lines(*[{"text": text} for text in texts])
        write(folder, {f"{i}.jsonl": content if ends else content.rstrip("\n")})
    source = JsonLinesSource("x", [str(folder / f"{i}.jsonl") for i in range(len(files))])
    expected = [text or EMPTY for texts in files for text in texts]
    assert read_all(source, target_bytes) == expected


def test_error_for_a_missing_column_lists_the_columns(tmp_path):
    write(tmp_path, {"a.jsonl": "\nnot json\n" + lines({"content": "x", "id": 3})})
    source = open_source(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"no column 'text'; its columns are \['content', 'id'\]"):
        read_all(source)
    assert read_all(open_source(tmp_path / "a.jsonl", text_column="content"))[-1] == "x"
    write(tmp_path, {"b.jsonl": "\n[]\n"})
    with pytest.raises(ValueError, match=r"no JSON object: .*b.jsonl:2: a JSON list"):
        assert open_source(tmp_path / "b.jsonl").is_chat
    write(tmp_path, {"c.jsonl": ""})
    with pytest.raises(ValueError, match="no JSON object: it is empty"):
        assert open_source(tmp_path / "c.jsonl").is_chat


def test_chats_and_texts_are_distinguished(tmp_path):
    write(tmp_path, {"a.jsonl": lines({"messages": CHAT, "text": "t", "body": "b"})})
    assert read_all(open_source(tmp_path / "a.jsonl")) == [CHAT]
    assert read_all(open_source(tmp_path / "a.jsonl", text_column="body")) == ["b"]


# -- chats --


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], EMPTY),
        ("not json", MALFORMED),
        ({"role": "user"}, MALFORMED),
        ([{"content": "x"}], MALFORMED),
        (["x"], MALFORMED),
        ([{"role": "user", "content": "x"}], NO_ASSISTANT),
        ([*CHAT, {"role": "user", "content": "\ud800"}], NOT_UTF8),
    ],
)
def test_invalid_chats(messages, reason):
    assert chat_document(messages).reason == reason


def test_chat_in_a_string_and_null_keys():
    assert chat_document(json.dumps(CHAT)) == Document(messages=CHAT)
    tools = [{"type": "function", "function": {"name": "f"}}]
    document = Document(messages=CHAT, tools=tools)
    assert chat_document(CHAT, json.dumps(tools)) == chat_document(CHAT, tools) == document
    assert chat_document(CHAT, "{").reason == MALFORMED
    nulls = [{**m, "tool_calls": None} for m in CHAT]
    assert chat_document(nulls, tools=[]) == Document(messages=CHAT)
    row = {"messages": [{"a": None, "b": [None, {"c": None}]}], "d": None}
    assert without_none(row) == {"messages": [{"b": [None, {}]}]}


def test_parse_line_distinguishes_rows_from_blank_lines():
    assert parse_line(b" \n") is None
    assert parse_line(b'{"a": 1}\n') == {"a": 1}
    assert isinstance(parse_line(b"3"), Rejected)


# -- tables through datasets --


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    return module


def test_dataset_object(datasets):
    table = datasets.Dataset.from_dict({"text": ["a", "", None, "b"] * 50, "n": list(range(200))})
    source = pickle.loads(pickle.dumps(open_source(table)))
    assert read_all(source, 10) == ["a", EMPTY, NO_COLUMN, "b"] * 50
    assert source.fingerprint() == open_source(table).fingerprint()
    other = datasets.Dataset.from_dict({"text": ["c"]})
    assert source.fingerprint() != open_source(other).fingerprint()
    with pytest.raises(ValueError, match="without streaming"):
        open_source(table.to_iterable_dataset())
    with pytest.raises(ValueError, match=r"splits.*\['train'\].*pass one"):
        open_source(datasets.DatasetDict(train=table))


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl.gz", "json", "arrow"])
def test_table_files(datasets, tmp_path, suffix):
    table = datasets.Dataset.from_dict({"text": ["a", "b\n c", "d"], "n": [1, 2, 3]})
    path = tmp_path / f"data.{suffix}"
    if suffix == "arrow":
        table.save_to_disk(tmp_path / "disk")
        os.replace(next((tmp_path / "disk").glob("*.arrow")), path)
    elif suffix == "json":  # an array, not lines
        path.write_text(json.dumps(table.to_list()))
    else:
        {"parquet": table.to_parquet, "csv": table.to_csv, "jsonl.gz": table.to_json}[suffix](path)
    source = open_source(str(tmp_path / f"*.{suffix}"))
    assert not isinstance(source, DatasetSource)  # read here, without a copy in another cache
    before = source.fingerprint()
    assert read_all(source) == ["a", "b\n c", "d"]
    os.utime(path, ns=(1, 1))
    assert source.fingerprint() != before


def test_parquet_chats_have_no_null_keys(datasets, tmp_path):
    call = {"role": "assistant", "content": "c", "tool_calls": [{"name": "f"}]}
    table = datasets.Dataset.from_list([{"messages": [CHAT[0], call]}, {"messages": CHAT}])
    table.to_parquet(tmp_path / "a.parquet")
    assert read_all(open_source(tmp_path)) == [[CHAT[0], call], CHAT]


def test_saved_dataset_and_splits(datasets, tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a", "b"]})
    table.save_to_disk(tmp_path / "one")
    assert read_all(open_source(tmp_path / "one")) == ["a", "b"]
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"cannot load .*bad\.parquet: "):
        read_all(open_source(tmp_path / "bad.parquet"))


def test_hub_name_without_a_network(datasets):
    with pytest.raises(ValueError, match=r"cannot load no-such/dataset \(not a local file or f"):
        read_all(open_source("no-such/dataset"))


# -- which source a name means --


def test_names(tmp_path, monkeypatch):
    write(tmp_path, {"d/a.jsonl": lines({"text": "a"}), "d/b.ndjson": lines({"text": "b"})})
    write(
        tmp_path, {"d/README.md": "about", "d/.gitattributes": "x", "t/a.py": "a", "t/b.csv": "b"}
    )
    write(tmp_path, {"code/c.json": "{}", "one.json": '{"text": "o"}'})
    assert read_all(open_source(tmp_path / "d")) == ["a", "b"]
    assert read_all(open_source(tmp_path / "t")) == ["a", "b"]  # a table next to code is text
    assert isinstance(open_source(tmp_path / "code"), FileSource)
    assert read_all(open_source(tmp_path / "one.json")) == ["o"]
    assert read_all(open_source(str(tmp_path / "d" / "*.*json*"))) == ["a", "b"]
    assert read_all(open_source([tmp_path / "t/a.py", tmp_path / "t/a.py"])) == ["a", "a"]
    assert read_all(open_source(open_source(tmp_path / "t"))) == ["a", "b"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_all(open_source("~/t")) == ["a", "b"]


def test_mixed_folders_are_rejected(tmp_path):
    write(tmp_path, {"a.py": "a", "b.jsonl": lines({"text": "b"})})
    with pytest.raises(ValueError, match=r"both data files and others.*pattern"):
        open_source(tmp_path)
    assert read_all(open_source(tmp_path, pattern="*.jsonl")) == ["b"]
    assert read_all(open_source(tmp_path, pattern="*.py")) == ["a"]
    with pytest.raises(ValueError, match="different kinds"):
        open_source([tmp_path / "a.py", tmp_path / "b.jsonl"])


@pytest.mark.parametrize(
    "name", ["/no/such", "./nothing", "nothing.jsonl", "a/b/c", "*.nothing", "~/no/such.txt"]
)
def test_missing_data(name):
    with pytest.raises(ValueError, match=r"no such file|no files in"):
        open_source(name)


def test_missing_files_of_a_list(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*x \(1 of 1 missing\)"):
        open_source([tmp_path / "x"])


def test_fingerprint_reflects_every_change(tmp_path):
    write(tmp_path, {"a.py": "a", "b.py": "b"})
    seen = {json.dumps(open_source(tmp_path).fingerprint())}
    assert json.dumps(open_source(tmp_path).fingerprint()) in seen
    changes = [
        lambda: write(tmp_path, {"a.py": "aa"}),
        lambda: os.utime(tmp_path / "b.py", ns=(5, 5)),
        lambda: (tmp_path / "b.py").rename(tmp_path / "c.py"),
        lambda: write(tmp_path, {"d.py": ""}),
    ]
    for change in changes:
        change()
        state = json.dumps(open_source(tmp_path).fingerprint())
        assert state not in seen
        seen.add(state)
