"""The memory of a build: it depends on neither the number of documents nor, much, their length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

TOOL = Path(__file__).parents[2] / "tools" / "bench_tokenize.py"
MIB = 1 << 20


def child(*words: object) -> dict:
    command = [sys.executable, str(TOOL), "--child", *map(str, words)]
    return json.loads(subprocess.check_output(command, env=os.environ, text=True).splitlines()[-1])


def built(tmp_path, kind: str, count: int) -> tuple[int, int]:
    """(bytes of the data, bytes of memory that its build added to the process)."""
    path = tmp_path / f"{kind}-{count}.jsonl"
    written = child("write", path, kind, count)["bytes"]
    result = child("build", path, tmp_path / f"cache-{kind}-{count}", "bpe:400")
    return written, int((result["peak_mib"] - result["before_mib"]) * MIB)


def test_many_documents_take_the_memory_of_few(tmp_path):
    few_bytes, few = built(tmp_path, "documents", 4_000)
    many_bytes, many = built(tmp_path, "documents", 40_000)
    assert many_bytes > 9 * few_bytes
    assert many - few < many_bytes + 4 * MIB  # 170 bytes per byte if all were encoded at once


def test_a_long_document_takes_a_few_times_its_size(tmp_path):
    short_bytes, short = built(tmp_path, "long", 400_000)
    long_bytes, long = built(tmp_path, "long", 4_000_000)
    assert long - short < 12 * (long_bytes - short_bytes)  # 170 before texts were cut
