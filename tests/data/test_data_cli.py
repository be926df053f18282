"""`hdp data` and `hdp plan FILE --tokenizer M`: what they show, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from hdp.cli import main
from tests.data.test_sources import lines, write
from tests.patience import patience

CHAT = [{"role": "user", "content": "ask\x1b[31m"}, {"role": "assistant", "content": "say\nthis"}]


@pytest.fixture
def run(tmp_path, capsys):
    def call(*words: object) -> tuple[int, str, str]:
        code = main([*map(str, words), "--cache-dir", str(tmp_path / "cache")])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    bad = [{"messages": CHAT[:1]}, {"messages": 3}, {"messages": "x"}]
    write(tmp_path, {"chats.jsonl": lines({"messages": CHAT}, *bad, {"messages": CHAT * 9})})
    return path


def test_rows_skips_and_lengths(run, chats):
    code, out, _ = run("data", chats, "--tokenizer", "bytes")
    assert code == 0
    assert "2 sequences, 370 tokens (bytes)" in out
    assert "format chat: columns messages" in out
    assert "rows skipped (malformed): 2, first" in out and "chats.jsonl:4: malformed" in out
    assert "chats.jsonl:1: 37 tokens, 9 with a loss (in [[ ]])" in out
    shown = ["user", "ask\\x1b[31m<|im_end|>", "<|im_start|>assistant", "[[say]]"]
    shown += ["[[this<|im_end|>]]"]
    assert "".join(f"  | {line}\n" for line in ["<|im_start|>user", *shown[1:]]) in out
    assert "\x1b" not in out
    assert "33 - 64" in out and "257 - 512" in out and "90.0%" in out


def test_a_reader_that_leaves_is_no_error(chats, tmp_path):
    words = ["data", chats, "--tokenizer", "bytes", "--cache-dir", tmp_path / "cache"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "hdp", *map(str, words)]
        left = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=patience(120))
    finally:
        os.close(writer)
    assert (left.returncode, left.stderr) == (0, b"")


def test_options(run, chats, tmp_path):
    one = ("data", chats, "--tokenizer", "bytes", "--rows", 1)
    assert "chats.jsonl:5: " in run(*one, "--first", 1)[1]
    out = run(*one, "--ids", "--tokens", 3)[1]
    assert "  |      1     117 'u'\n" in out and "... 34 more tokens" in out
    assert run(*one, "--save-lengths", tmp_path / "l.npy")[0] == 0
    assert np.load(tmp_path / "l.npy").tolist() == [37, 333]
    assert "dropped: 1" in run(*one, "--max-length", "100", "--overlong", "drop")[1]
    assert run("data", chats, "--tokenizer", "bytes", "--strict")[0] == 2


def test_colors_on_a_terminal(run, chats, monkeypatch):
    monkeypatch.setattr("hdp.console.is_terminal", lambda stream: stream is sys.stdout)
    colored = run("data", chats, "--tokenizer", "bytes", "--rows", 1)[1]
    assert "  | \x1b[32msay\x1b[0m\n  | \x1b[32mthis<|im_end|>\x1b[0m\n" in colored
    assert "[[" not in colored and "ask\\x1b[31m" in colored


def test_verify_and_caches(run, chats, tmp_path, monkeypatch):
    monkeypatch.setattr("hdp.data.prepare.sealed._CHECKED_BYTES", 10)
    code, out, _ = run("data", chats, "--tokenizer", "bytes", "--verify")
    assert code == 0 and "every byte is as it was written" in out
    [cache] = (tmp_path / "cache").glob("tokens-*/")
    assert "254 117" in run("data", cache)[1]  # ids: a cache does not know its tokenizer
    content = bytearray((cache / "tokens.bin").read_bytes())
    content[30] ^= 4
    (cache / "tokens.bin").write_bytes(content)
    code, _, err = run("data", cache, "--verify")
    assert code == 2 and "is damaged: delete it" in err


def test_plan_of_a_data_file(run, chats):
    cluster = ("--hdp-size", 2, "--max-tokens-per-rank", "1K", "--json")
    for words in (
        (chats, "--tokenizer", "bytes", *cluster),
        (*cluster, "--tokenizer=bytes", "--lengths", chats),
        (chats, *cluster, "--tokenizer", "bytes", "--format", "chat"),
    ):
        code, out, err = run("plan", *words)
        assert code == 0 and json.loads(out)["num_tokens"] == 370, err
        assert "rows skipped (malformed): 2" in err


def test_plan_refuses(run, chats, capsys):
    assert main(["plan", str(chats), "--hdp-size", "2", "--max-tokens-per-rank", "1K"]) == 2
    assert "lengths depend on a tokenizer: name one" in capsys.readouterr().err
    code, _, err = run("plan", "--tokenizer", "bytes", "--hdp-size", 2)
    assert code == 2 and "name the data first" in err
    code, _, err = run("plan", "no.jsonl", "--tokenizer", "bytes", "--hdp-size", 2)
    assert code == 2 and err == "hdp: error: no such file or folder: no.jsonl\n"


def test_errors_are_one_line(run, tmp_path):
    write(
        tmp_path, {"a.jsonl": lines({"messages": [], "conversations": []}), "b\x1b[1m.jsonl": "x"}
    )
    for name, message in [
        ("a.jsonl", "fit several formats"),
        ("b\x1b[1m.jsonl", "contains no JSON object"),
        ("nope", "cannot load nope"),
    ]:
        code, out, err = run(
            "data", tmp_path / name if "." in name else name, "--tokenizer", "bytes"
        )
        assert code == 2 and out == "" and message in err
        assert err.count("\n") == 1 and "\x1b" not in err


def test_text_has_a_loss_everywhere_but_at_its_start(run, tmp_path):
    write(tmp_path, {"a.txt": "text"})
    out = run("data", tmp_path / "a.txt", "--tokenizer", "bytes")[1]
    assert "  | t[[ext<|endoftext|>]]\n" in out
