"""Building caches from rows of every format, from nothing, on a full disk, in a bad folder."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hdp.console import note, printable
from hdp.data.dataset import TokenDataset, open_cache
from hdp.data.prepare.cache import open_dataset
from hdp.data.prepare.documents import Document
from hdp.data.prepare.sealed import read_seal
from hdp.data.prepare.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    HFTokenizer,
    Tokenizer,
    train_bpe,
)
from tests.data.test_sources import lines, write

U, A = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
EOS = "<|endoftext|>"


def load(path, tmp_path, **options) -> TokenDataset:
    options = {"tokenizer": "bytes", "show_progress": False, **options}
    return open_dataset(path, cache_dir=tmp_path / "cache", **options)


@pytest.fixture(params=["bytes", "bpe", "hf"])
def tokenizer(request, tmp_path) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    pytest.importorskip("tokenizers")
    bpe = train_bpe(["a question and an answer\n" * 9], 300)
    if request.param == "bpe":
        return bpe
    pytest.importorskip("transformers")
    from hdp.models.huggingface import load_tokenizer

    bpe.save_pretrained(tmp_path / "tokenizer")
    return HFTokenizer(load_tokenizer(tmp_path / "tokenizer"))


# -- batches that are empty --


def test_nothing_to_encode(tokenizer):
    assert tokenizer.encode_texts([]) == []
    assert tokenizer.encode_chats([]) == []
    assert tokenizer.encode_completions([]) == []


@pytest.mark.parametrize("count", [1, 255, 256, 257, 512])
def test_any_number_of_rows(tmp_path, tokenizer, count):
    write(tmp_path, {"a.jsonl": lines(*[{"text": "a a"}] * count)})
    assert len(load(tmp_path / "a.jsonl", tmp_path, tokenizer=tokenizer)) == count


@pytest.mark.parametrize("count", [1, 256, 300])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": ""}', "empty"),
        ('{"text": 3}', "malformed"),
        ('{"other": 1, "text": null}', "missing a column"),
        ("not json", "malformed"),
    ],
)
def test_unusable_rows(tmp_path, tokenizer, count, row, reason):
    """A list of rows without a document is not given to the tokenizer; nothing left is said."""
    write(tmp_path, {"a.jsonl": '{"text": "a a"}\n' + f"{row}\n" * count})
    dataset = load(tmp_path / "a.jsonl", tmp_path, tokenizer=tokenizer)
    assert len(dataset) == 1 and dataset.report.num_rejected == {reason: count}
    write(tmp_path, {"b.jsonl": '{"text": ""}\n' + f"{row}\n" * count})
    with pytest.raises(ValueError, match=rf"no documents in .*b\.jsonl: of {count + 1} rows, "):
        load(tmp_path / "b.jsonl", tmp_path, tokenizer=tokenizer)


def test_folder_with_one_empty_file(tmp_path, tokenizer):
    write(tmp_path, {"d/a.txt": ""})
    with pytest.raises(
        ValueError, match=r"no documents in .*d: of 1 rows, 1 empty, first .*a\.txt"
    ):
        load(tmp_path / "d", tmp_path, tokenizer=tokenizer)


def test_many_empty_files_among_others(tmp_path, tokenizer):
    write(tmp_path, {f"d/{i:03}.txt": "" for i in range(600)} | {"d/z.txt": "a a"})
    dataset = load(tmp_path / "d", tmp_path, tokenizer=tokenizer)
    assert dataset.report.num_rejected == {"empty": 600} and dataset.name(0).endswith("z.txt")


@pytest.mark.parametrize("spec", ["bpe:300", "bytes"])
@pytest.mark.parametrize("content", ["", "\n\n", '{"text": null}\n', "[]", "x"])
def test_nothing_at_all(tmp_path, spec, content):
    pytest.importorskip("tokenizers")
    write(tmp_path, {"a.jsonl": content})
    with pytest.raises(ValueError, match=r"no documents in|contains no JSON object"):
        load(tmp_path / "a.jsonl", tmp_path, tokenizer=spec)


# -- formats --


def learned(dataset: TokenDataset, i: int = 0) -> tuple[str, str]:
    """(the whole text, the text with a loss) of a sequence."""
    sample = dataset[i]
    assert sample.loss_mask is not None and dataset.tokenizer is not None
    ids = np.array(sample.input_ids)
    assert dataset.num_loss_tokens[i] == sample.num_loss_tokens
    return dataset.tokenizer.decode(ids), dataset.tokenizer.decode(ids[sample.loss_mask])


def test_prompt_and_completion(tmp_path, tokenizer):
    rows = [
        {"prompt": "a question ", "completion": "an answer\u00e4"},
        {"prompt": "", "completion": "a"},
    ]
    write(tmp_path, {"a.jsonl": lines(*rows)})
    dataset = load(tmp_path / "a.jsonl", tmp_path, tokenizer=tokenizer)
    whole, loss = learned(dataset)
    assert whole == f"a question an answer\u00e4{EOS}"
    assert loss.strip() == f"an answer\u00e4{EOS}"  # a token may hold the space, too
    assert learned(dataset, 1) == (f"a{EOS}", f"a{EOS}")
    text = tokenizer.encode_texts(["a question an answer\u00e4"])[0]
    assert list(dataset[0].input_ids[:-1]) == list(text)
    plain = load(tmp_path / "a.jsonl", tmp_path, tokenizer=tokenizer, append_eos=False)
    assert learned(plain)[0] == "a question an answer\u00e4" and len(plain) == 1


def test_alpaca_and_sharegpt_are_chats(tmp_path, tokenizer):
    alpaca = {"instruction": "question", "input": "", "output": "answer"}
    turns = [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer"}]
    write(tmp_path, {"a.jsonl": lines(alpaca), "s.jsonl": lines({"conversations": turns})})
    write(tmp_path, {"m.jsonl": lines({"messages": [U, A]})})
    found = [
        learned(load(tmp_path / f"{name}.jsonl", tmp_path, tokenizer=tokenizer)) for name in "asm"
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][1].strip() == "answer<|im_end|>"


def test_alpaca_without_a_chat_template(tmp_path, tokenizer):
    if not isinstance(tokenizer, HFTokenizer):
        pytest.skip("always has one")
    tokenizer.hf.chat_template = None
    tokenizer = HFTokenizer(tokenizer.hf)
    rows = [{"instruction": "question", "input": i, "output": "answer"} for i in ("", "this")]
    write(tmp_path, {"a.jsonl": lines(*rows), "s.jsonl": lines({**rows[0], "system": "s"})})
    dataset = load(tmp_path / "a.jsonl", tmp_path, tokenizer=tokenizer)
    whole, loss = learned(dataset)
    assert whole.startswith("Below is an instruction that describes a task. Write a response that")
    assert whole.endswith(f"\n\n### Instruction:\nquestion\n\n### Response:\nanswer{EOS}")
    assert loss.strip() == f"answer{EOS}"
    whole, _ = learned(dataset, 1)
    assert "a task, paired with an input that provides further context. Write" in whole
    assert "question\n\n### Input:\nthis\n\n### Response:\nanswer" in whole
    with pytest.raises(ValueError, match="has no chat template"):
        load(tmp_path / "s.jsonl", tmp_path, tokenizer=tokenizer)


def test_prompts_of_messages_have_no_loss(tmp_path, tokenizer):
    row = {"prompt": [U, A, U], "completion": [{**A, "content": "last"}]}
    write(tmp_path, {"a.jsonl": lines(row)})
    whole, loss = learned(load(tmp_path / "a.jsonl", tmp_path, tokenizer=tokenizer))
    assert "answer<|im_end|>" in whole and loss.strip() == "last<|im_end|>"


def test_token_rows(tmp_path, tokenizer):
    rows = [
        {"input_ids": [97, 98, 99], "labels": [-100, 98, 99]},
        {"input_ids": [97, 98], "labels": [97, 98]},
        {"input_ids": [97, 5000], "labels": [97, 5000]},
        {"input_ids": [-1, 97], "labels": [-1, 97]},
    ]
    write(tmp_path, {"a.jsonl": lines(*rows)})
    dataset = load(tmp_path / "a.jsonl", tmp_path, tokenizer=tokenizer)
    assert [list(sample.input_ids) for sample in dataset] == [[97, 98, 99], [97, 98]]
    assert [list(sample.loss_mask) for sample in dataset] == [[False, True, True], [True, True]]
    assert list(dataset.num_loss_tokens) == [2, 1]
    assert dataset.report.num_rejected == {"outside the vocabulary": 2}
    size = tokenizer.vocab_size
    assert f"token 1 is 5000; {tokenizer.name} has ids 0 to {size - 1}" in str(dataset.report)


# -- caches --


@pytest.fixture
def cached(tmp_path) -> tuple[Path, TokenDataset]:
    rows = [{"messages": [U, {**A, "content": "x" * i}]} for i in range(1, 40)]
    write(tmp_path, {"a.jsonl": lines(*rows)})
    dataset = load(tmp_path / "a.jsonl", tmp_path)
    return Path(dataset.report.cache_path), dataset


@pytest.mark.parametrize(
    "name",
    ["seqlens.npy", "offsets.npy", "num_loss_tokens.npy", "rows.npy", "names.json", "tokens.bin",
     "loss_mask.bin", "meta.json"],
)  # fmt: skip
def test_damage_of_equal_size_is_rebuilt(cached, tmp_path, name):
    path, dataset = cached
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    del dataset
    for at in (0, len(whole[name]) // 2, len(whole[name]) - 2):
        content = bytearray(whole[name])
        content[at] ^= 1
        (path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            open_cache(path)
        load(tmp_path / "a.jsonl", tmp_path)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == whole


def test_index_that_does_not_fit_is_rebuilt(cached, tmp_path, monkeypatch):
    """Also if its checksums are right: a seal does not say that the contents make sense."""
    path, _ = cached
    seqlens = np.load(path / "seqlens.npy")
    from hdp.data.prepare import sealed

    meta = read_seal(path)
    np.save(path / "seqlens.npy", seqlens[::-1])
    extra = {name: value for name, value in meta.items() if name not in ("files", "crcs")}
    (path / "meta.json").unlink()
    sealed._seal(path, extra)
    assert read_seal(path) is not None
    with pytest.raises(ValueError, match="is damaged"):
        open_cache(path)
    assert (load(tmp_path / "a.jsonl", tmp_path).seqlens == seqlens).all()


def test_large_files_are_checked_on_request(cached, monkeypatch):
    path, _ = cached
    monkeypatch.setattr("hdp.data.prepare.sealed._CHECKED_BYTES", 10)
    content = bytearray((path / "tokens.bin").read_bytes())
    content[5] ^= 1
    (path / "tokens.bin").write_bytes(content)
    assert read_seal(path) is not None
    assert read_seal(path, every_byte=True) is None


def test_full_disk_names_the_folder(tmp_path, monkeypatch):
    write(tmp_path, {"a.jsonl": lines({"text": "a a"})})

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hdp.data.prepare.cache.build", fail)
    with pytest.raises(
        OSError, match=r"cache folder .*/cache: No space left.*free some.*cache-dir"
    ):
        load(tmp_path / "a.jsonl", tmp_path)


# -- names --


def test_escapes_do_not_reach_the_terminal(tmp_path, capsys):
    name = "a\x1b[31m\r\nb\u202e\x9b.txt"
    write(tmp_path, {f"d/{name}": "text", "d/c\x1b]0;x.txt": b"\xff"})
    dataset = load(tmp_path / "d", tmp_path)
    text = dataset.name(0) + str(dataset.report)
    assert all(line.isprintable() for line in text.split("\n"))
    assert dataset.name(0).endswith(r"a\x1b[31m\r\nb\u202e\x9b.txt")
    write(tmp_path, {f"x\x1b[2J/{name}": ""})
    with pytest.raises(
        ValueError, match=r"x\\x1b\[2J: of 1 rows, 1 empty, first .*a\\x1b"
    ) as error:
        load(tmp_path / "x\x1b[2J", tmp_path)
    assert str(error.value).isprintable()
    note("cannot read a\x1b[31m.txt\nand more")
    assert capsys.readouterr().err == "hdp: cannot read a\\x1b[31m.txt\nand more\n"
    assert printable("caf\u00e9 \U0001f600") == "caf\u00e9 \U0001f600"


def test_modules_of_the_current_folder_are_not_run(tmp_path):
    """Workers are new processes; a json.py where they start is not the library's."""
    for module in ("json", "pickle", "signal", "numpy"):
        write(tmp_path, {f"work/{module}.py": "import os; os.write(2, b'run from here')\n"})
    write(tmp_path, {"data.jsonl": lines(*[{"text": "a a"}] * 400)})
    write(
        tmp_path,
        {
            "bin/run.py": "import sys\n"
            f"sys.path.append({str(Path(__file__).parents[2])!r})\n"
            "from hdp.data import open_dataset\n"
            "import hdp.data.prepare.build as build\n"
            "build._MIN_SHARD_BYTES = 1000\n"
            "print(len(open_dataset(sys.argv[1], tokenizer='bytes', cache_dir=sys.argv[2],"
            " num_workers=2)))\n"
        },
    )
    command = [sys.executable, tmp_path / "bin/run.py", tmp_path / "data.jsonl", tmp_path / "cache"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path / "work",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "400\n", done.stderr
    assert "run from here" not in done.stderr


# -- long documents and many --


def test_a_long_text_has_the_ids_of_one_call(monkeypatch):
    pytest.importorskip("tokenizers")
    text = Path(__file__).read_text(encoding="utf-8") * 3
    bpe = train_bpe([text], 500)
    whole = bpe.encode_texts([text])[0]
    turns = [{"role": "user", "content": text[:9000]}, {"role": "assistant", "content": text}]
    chat = bpe.encode_chats([Document(messages=turns)])[0]
    monkeypatch.setattr("hdp.data.prepare.tokenizer._PIECE_CHARACTERS", 700)
    calls = []
    real = BpeTokenizer._pieces
    monkeypatch.setattr(
        BpeTokenizer, "_pieces", lambda s, t: iter(calls.append(t) or [*real(s, t)])
    )
    short, long = bpe.encode_texts(["short", text])
    assert (long == whole).all() and bpe.decode(short) == "short" and len(calls) == 1
    cut = bpe.encode_chats([Document(messages=turns)])[0]
    for a, b in zip(chat, cut, strict=True):
        np.testing.assert_array_equal(a, b)


def test_tokenizers_with_another_split_are_not_cut():
    pytest.importorskip("tokenizers")
    bpe = train_bpe(["a b"], 300)
    state = json.loads(bpe._json)
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\S+\s*|\s+"
    other = BpeTokenizer(json.dumps(state))
    assert bpe._can_cut and not other._can_cut
    assert list(other._pieces("a b " * 50_000)) == ["a b " * 50_000]
