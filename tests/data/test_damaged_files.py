"""Files with flipped, lost and inserted bytes: rows, rejections or one message, never a crash."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from hdp.data.prepare.cache import open_dataset
from tests.data.test_same_rows import CHATS, TABLES, save

TOKENS = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]}] * 4
INSERTED = [b'"', b"[", b"{", b"\n", b",", b"null", b"\xff", b"\x00", b"1e999"]


def damaged(content: bytes, chance: random.Random) -> bytes:
    result = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(result) + 1)
        kind = chance.randrange(4)
        if kind == 0 and at < len(result):
            result[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            result[at:] = b""
        elif kind == 2:
            result[at:at] = chance.choice(INSERTED)
        else:
            result[at : at + chance.randrange(20)] = b""
    return bytes(result)


@pytest.mark.parametrize(
    "kind", ["jsonl", "array", "pretty", "jsonl.gz", "json.xz", "csv", *TABLES]
)
@pytest.mark.parametrize("rows", [CHATS, TOKENS], ids=["chats", "tokens"])
def test_damage_is_counted_or_said(tmp_path, kind, rows):
    if kind in TABLES:
        pytest.importorskip("pyarrow")
    if kind == "csv":
        rows = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    path = Path(save(tmp_path, rows, kind))
    content = path.read_bytes()
    chance, messages = random.Random(7), []
    for i in range(12):
        path.write_bytes(damaged(content, chance))
        try:
            report = open_dataset(
                path, tokenizer="bytes", cache_dir=tmp_path / f"cache-{i}", num_workers=1
            ).report
        except ValueError as error:
            messages.append(str(error))
        else:
            assert report.num_rows == report.num_documents + sum(report.num_rejected.values())
    assert not [message for message in messages if "\n" in message]


def test_one_damaged_row_of_a_table(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    texts = [b"one", b"t\xffo", b"three"]
    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 3, 6, 11)))
    strings = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"".join(texts)))
    table = pyarrow.table({"text": strings})
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    dataset = open_dataset(tmp_path / "a.arrow", tokenizer="bytes", cache_dir=tmp_path / "cache")
    assert dataset.report.num_rejected == {"malformed": 1}
    assert [dataset.name(i).rpartition("/")[2] for i in range(2)] == [
        "a.arrow row 0",
        "a.arrow row 2",
    ]
