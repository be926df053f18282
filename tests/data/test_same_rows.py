"""One row, one meaning: the same documents from every kind of file that can hold the rows."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import socket
import sys
import zipfile

import pytest

from hdp.data.prepare.documents import EMPTY, MALFORMED, NO_COLUMN, NOT_UTF8, UNREADABLE
from hdp.data.prepare.files import open_file
from hdp.data.prepare.json_rows import layout
from hdp.data.prepare.locate import open_source
from tests.data.test_sources import lines, read_all, write

U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}

TEXTS = [
    {"text": "2024-01-05"},
    {"text": "2024-01-05T10:00:00Z"},
    {"text": "007"},
    {"text": "NA"},
    {"text": "null"},
    {"text": "true"},
    {"text": "1e5"},
    {"text": ' a,"b"\r\n\tc '},
    {"text": "\u00e4\U0001f600\u2028"},
]
CHATS = [
    {"id": 1, "messages": [U, A], "tools": None, "when": "2024-01-05"},
    {"id": 2, "messages": [{**U, "name": None}, {**A, "tool_calls": None}], "tools": [TOOL]},
    {"id": 3, "messages": [U, {**A, "tool_calls": [CALL]}]},
]
LATE = [{"id": i} for i in range(3)] + [{"id": 4, "text": None}, {"id": 5, "text": "late"}]


def save(folder, rows: list[dict], kind: str) -> str:
    path = folder / f"rows.{kind}"
    base, _, compression = kind.partition(".")
    if base in ("parquet", "arrow"):
        import pyarrow
        import pyarrow.parquet

        names = list(dict.fromkeys(name for row in rows for name in row))
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
        if base == "parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=2)
        else:
            with pyarrow.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        return str(path)
    if base in ("csv", "tsv"):
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, names, delimiter="\t" if base == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue()
    elif base == "array":
        path, content = path.with_suffix(".json"), json.dumps(rows, indent=1)
    elif base == "pretty":
        path, content = path.with_suffix(".json"), "\n".join(json.dumps(r, indent=1) for r in rows)
    else:
        content = lines(*rows)
    data = content.encode()
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(compression)
    path.write_bytes(pack(data) if pack else data)
    return str(path)


JSON = ["jsonl", "ndjson", "json", "array", "pretty", "jsonl.gz", "json.bz2", "json.xz"]
TABLES = ["parquet", "arrow"]


@pytest.mark.parametrize("kind", [*JSON, *TABLES, "csv", "tsv", "csv.gz"])
def test_texts_stay_what_they_are(tmp_path, kind):
    if kind in TABLES:
        pytest.importorskip("pyarrow")
    source = open_source(save(tmp_path, TEXTS, kind))
    assert read_all(source) == [row["text"] for row in TEXTS]
    assert read_all(source, 20) == [row["text"] for row in TEXTS]


@pytest.mark.parametrize("kind", [*JSON, *TABLES])
def test_chats_have_no_nulls(tmp_path, kind):
    if kind in TABLES:
        pytest.importorskip("pyarrow")
    source = open_source(save(tmp_path, CHATS, kind))
    documents = [item for shard in source.shards(50) for item in source.read(shard)]
    messages = [document.messages for document in documents]
    assert messages == [[U, A], [U, A], [U, {**A, "tool_calls": [CALL]}]]
    function = documents[1].tools[0]["function"]
    assert function["name"] == "f" and "default" not in function.get("parameters", {})
    assert documents[0].tools is documents[2].tools is None


@pytest.mark.parametrize("kind", [*JSON, *TABLES])
def test_columns_that_only_later_rows_have(tmp_path, kind):
    if kind in TABLES:
        pytest.importorskip("pyarrow")
    source = open_source(save(tmp_path, LATE, kind))
    assert read_all(source) == [NO_COLUMN] * 4 + ["late"]


def test_columns_after_the_sample(tmp_path, monkeypatch):
    """The rest is searched if the first rows fit no format, and only then."""
    monkeypatch.setattr("hdp.data.prepare.source._SAMPLED_ROWS", 3)
    early = [{"id": 0, "text": "a"}] * 4 + [{"messages": [U, A]}]
    source = open_source(save(tmp_path, [*LATE[:3] * 5, LATE[-1]], "jsonl"))
    assert source.row_format == "text"
    assert read_all(open_source(save(tmp_path, early, "jsonl"))) == ["a"] * 4 + [NO_COLUMN]
    (tmp_path / "first.jsonl").write_text(lines(*[{"id": 0}] * 5))
    both = open_source([tmp_path / "first.jsonl", tmp_path / "rows.jsonl"])
    assert read_all(both)[5:9] == ["a"] * 4


def test_files_of_one_table_may_differ_in_columns(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "d").mkdir()
    os.rename(save(tmp_path, [{"text": "a", "n": 1}], "parquet"), tmp_path / "d" / "a.parquet")
    os.rename(save(tmp_path, [{"n": "x", "text": "b"}], "parquet"), tmp_path / "d" / "b.parquet")
    assert read_all(open_source(tmp_path / "d")) == ["a", "b"]


def test_mixed_types_that_datasets_stores_as_json(tmp_path):
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Json"):
        pytest.skip("datasets without the type Json")
    rows = [{"messages": [U, {**A, "extra": {"a": 1}}]}, {"messages": [U, {**A, "extra": "x"}]}]
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(tmp_path / "a.parquet")
    assert read_all(open_source(tmp_path / "a.parquet")) == [row["messages"] for row in rows]


@pytest.mark.parametrize("kind", ["jsonl", "array", "pretty", "csv"])
def test_byte_order_mark(tmp_path, kind):
    path = save(tmp_path, [{"text": "a"}], kind)
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(b"\xef\xbb\xbf" + content)
    assert read_all(open_source(path)) == ["a"]


# -- JSON --


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", "", "lines"),
        ("a.json", ' \n [{"a": 1}]', "array"),
        ("a.json", '{"a": 1}\n{"a": 2}', "lines"),
        ("a.json", '{\n"a": 1}', "values"),
        ("a.jsonl", '[\n{"a": 1}\n]', "array"),
        ("a.jsonl", '[{"a": 1},\n{"a": 1}]', "array"),
        ("a.jsonl", "[1, 2]\n", "lines"),
        ("a.jsonl", '{"a": \n', "lines"),
        ("a.jsonl", "[" * 2000, "lines"),
    ],
)
def test_layout(tmp_path, name, content, expected):
    write(tmp_path, {name: content})
    assert layout(str(tmp_path / name)) == expected


def test_bad_rows_of_an_array(tmp_path):
    deep = "[" * 60_000 + "]" * 60_000
    content = (
        b'[{"text": "a"}, 3, {"text": "b" "c"}, {"text": '
        + deep.encode()
        + b'}, {"text": "caf\xe9"},'
        b' [1], {"text": 1' + b"0" * 5000 + b'}, {"text": ""}, {"text": "\\u20ac]}"}]\n'
    )
    write(tmp_path, {"a.json": content})
    expected = ["a", MALFORMED, MALFORMED, MALFORMED, NOT_UTF8, MALFORMED, MALFORMED, EMPTY]
    source = open_source(tmp_path / "a.json")
    assert read_all(source) == [*expected, "\u20ac]}"]
    assert source.row_kind == "row"


@pytest.mark.parametrize(
    ("content", "reasons", "detail"),
    [
        ('[{"text": "a"}, {"text": "b', ["a", MALFORMED], "the rest of the file is skipped"),
        ('[{"text": "a"},', ["a", MALFORMED], "Expecting value"),
        ('[{"text": "a"} {"text": "b"}]', ["a", MALFORMED], "no comma"),
        ('[{"text": "a"}] x', ["a", MALFORMED], "after the end"),
        ('[{"text": "a"}, nothing]', ["a", MALFORMED], "the rest of the file is skipped"),
    ],
)
def test_arrays_that_break(tmp_path, content, reasons, detail):
    write(tmp_path, {"a.json": content})
    source = open_source(tmp_path / "a.json")
    assert read_all(source) == reasons
    [*_, last] = source.read(source.shards(1 << 20)[0])
    assert detail in last.detail


@pytest.mark.parametrize("size", [10, 97, 1 << 20])
def test_arrays_are_parsed_as_a_stream(tmp_path, monkeypatch, size):
    """Whatever the chunks cut: numbers, escapes, strings, characters of several bytes."""
    monkeypatch.setattr("hdp.data.prepare.json_rows._CHUNK", size)
    rows = [{"text": f"\u20ac\n{i}" * (i % 7), "n": -1.5e3 * i, "x": [i, None]} for i in range(60)]
    for text in (json.dumps(rows), json.dumps(rows, ensure_ascii=False, indent=2)):
        write(tmp_path, {"a.json": text})
        expected = [row["text"] or EMPTY for row in rows]
        assert read_all(open_source(tmp_path / "a.json")) == expected


def test_folder_of_json_is_rows_only_if_all_of_it_is(tmp_path):
    write(tmp_path, {"d/a.json": '[{"text": "a"}]', "d/b.json": '[{"text": "b"}]'})
    assert read_all(open_source(tmp_path / "d")) == ["a", "b"]
    write(tmp_path, {"e/package.json": '{"name": "x"}', "e/c.json": "[1]"})
    assert read_all(open_source(tmp_path / "e")) == ["[1]", '{"name": "x"}']
    write(tmp_path, {"d/x.py": "code"})
    assert len(read_all(open_source(tmp_path / "d"))) == 3


@pytest.mark.parametrize("kind", ["lines", "array", "values"])
@pytest.mark.parametrize("size", [10, 1 << 20])
def test_a_key_that_comes_twice_refuses_the_row(tmp_path, monkeypatch, kind, size):
    monkeypatch.setattr("hdp.data.prepare.json_rows._CHUNK", size)
    rows = ['{"text": "a"}', '{"text": "lost", "x": {"y": [1]}, "text": "b"}', '{"text": "c"}']
    rows[2:2] = ['{"text": "d", "x": [{"y": 1, "y": 2}]}']
    content = {"lines": "\n".join(rows), "array": f"[{','.join(rows)}]"}
    content["values"] = "\n".join(row.replace("{", "{\n", 1) for row in rows)
    write(tmp_path, {"a.json": content[kind]})
    source = open_source(tmp_path / "a.json")
    assert read_all(source) == ["a", MALFORMED, MALFORMED, "c"]
    refused = list(source.read(source.shards(1 << 20)[0]))[1]
    assert "the key 'text' is given twice" in refused.detail


# -- CSV --


def test_bad_rows_of_a_table(tmp_path):
    content = b'id,text\n1,a\n2,b,c\n3\n\n4,"x"y\n5,caf\xe9\n6,\n7,last\n8,"open\nto the end'
    write(tmp_path, {"a.csv": content})
    reasons = ["a", MALFORMED, NO_COLUMN, MALFORMED, NOT_UTF8, EMPTY, "last", *[MALFORMED] * 2]
    assert read_all(open_source(tmp_path / "a.csv")) == reasons
    write(tmp_path, {"b.csv": "text,text\na,b\n", "c.csv": "", "d.csv": "text\n"})
    for name, message in [("b", "names a column twice"), ("c", "no rows"), ("d", "no rows")]:
        with pytest.raises(ValueError, match=rf"cannot load .*{name}\.csv.*{message}"):
            read_all(open_source(tmp_path / f"{name}.csv"))


def test_rows_that_an_open_quote_takes_along_are_counted(tmp_path):
    rows = "".join(f"{i},b\n" for i in range(3))
    write(tmp_path, {"a.csv": f'id,text\n1,a\n2,"open\n{rows}3,"x"\n4,last\n'})
    source = open_source(tmp_path / "a.csv")
    assert read_all(source) == ["a", *[MALFORMED] * 5, "last"]
    refused = list(source.read(source.shards(1 << 20)[0]))[1:6]
    assert all("lines 3 to 7, which a quote joins" in one.detail for one in refused)


def test_long_cells(tmp_path):
    path = save(tmp_path, [{"text": "x" * 500_000}], "csv")
    assert read_all(open_source(path)) == ["x" * 500_000]


# -- compressed and special files --


def test_compressed_text(tmp_path):
    write(tmp_path, {"a.txt.gz": gzip.compress(b"plain"), "b.md.xz": lzma.compress(b"more")})
    assert read_all(open_source(tmp_path)) == ["plain", "more"]
    assert read_all(open_source(tmp_path / "a.txt.gz")) == ["plain"]
    write(tmp_path, {"x/c.txt.gz": gzip.compress(b"x" * 5000)[:-9], "x/d.txt.bz2": b"no"})
    assert read_all(open_source(tmp_path / "x")) == [UNREADABLE, UNREADABLE]


@pytest.mark.parametrize("kind", ["jsonl.gz", "json.xz", "csv.gz"])
def test_truncated_archives_give_what_they_hold(tmp_path, kind):
    rows = [{"text": os.urandom(40).hex()} for _ in range(2000)]
    path = save(tmp_path, rows, kind)
    os.truncate(path, os.path.getsize(path) // 2)
    found = read_all(open_source(path))
    assert found[-1] in (UNREADABLE, MALFORMED)
    assert found[:-1] == [row["text"] for row in rows][: len(found) - 1]


def test_zstandard_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path, {"a.jsonl.zst": b"x"})
    for name in ("compression", "compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst requires.*pip install zstandard"):
        read_all(open_source(tmp_path / "a.jsonl.zst"))


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.compress(lines(*TEXTS).encode())
    write(tmp_path, {"a.jsonl.zst": packed, "b.jsonl.zst": packed[:-5] + b"damage"})
    assert read_all(open_source(tmp_path / "a.jsonl.zst")) == [row["text"] for row in TEXTS]
    assert read_all(open_source(tmp_path))[-1] == UNREADABLE


def test_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        archive.writestr("a.jsonl", '{"text": "a"}')
    write(tmp_path, {"b.tar.gz": gzip.compress(b"x"), "t/c.tar.gz": gzip.compress(b"x")})
    for name in ("a.jsonl.zip", "b.tar.gz"):
        with pytest.raises(ValueError, match=f"{name} is an archive: unpack it first"):
            open_source(tmp_path / name)
    assert read_all(open_source(tmp_path / "t")) == [UNREADABLE]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "x.arrow", "x.gz"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: socket.socket(socket.AF_UNIX).bind(path)])
def test_pipes_are_refused(tmp_path, monkeypatch, name, make):
    """Reading a pipe would wait for ever."""
    if name in ("x.parquet", "x.arrow"):
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    make(name)
    with pytest.raises(OSError, match=r"not a regular file: a|No such device"):
        open_file(name)
    with pytest.raises(ValueError, match=r"is a (pipe|socket), not a regular file"):
        open_source(name)
    good = {"x.jsonl": lines(TEXTS[0]), "x.csv": "text\n2024-01-05\n"}
    if name in good:
        write(tmp_path, {f"a{name}": good[name]})
        assert read_all(open_source(tmp_path)) == ["2024-01-05", UNREADABLE]
    elif name in ("x.json", "x.gz"):
        assert read_all(open_source(tmp_path)) == [UNREADABLE]
    else:
        with pytest.raises(ValueError, match="cannot load"):
            read_all(open_source(tmp_path))
