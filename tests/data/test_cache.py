"""open_dataset(): the same tokens for any way of building them, and no partial caches."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hdp.data.dataset import TokenDataset
from hdp.data.prepare.cache import _texts, open_dataset
from hdp.data.prepare.documents import Document
from hdp.data.prepare.tokenizer import ByteTokenizer
from tests.patience import patience, wait_for

NUM_FILES = 12
FILES = ("tokens.bin", "seqlens.npy", "offsets.npy", "num_loss_tokens.npy", "rows.npy")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Files of 0.5 to 70 KB in shards of 10 KB, so shards contain one or several files."""
    monkeypatch.setattr("hdp.data.prepare.build._MIN_SHARD_BYTES", 10_000)
    path = tmp_path / "docs"
    path.mkdir()
    for i in range(NUM_FILES):
        text = f"def f{i}(x):\n    return x + {i}  # \u00e4\n" * (20 + 2000 * (i == 5) + 20 * i)
        (path / f"{i:02}.py").write_text(text)
    return path


def load(folder, tmp_path, name: str = "cache", **options) -> TokenDataset:
    options = {"tokenizer": "bytes", **options}
    return open_dataset(str(folder), cache_dir=tmp_path / name, show_progress=False, **options)


def contents(dataset: TokenDataset) -> dict[str, bytes]:
    path = Path(dataset.report.cache_path)
    return {name: (path / name).read_bytes() for name in FILES}


def test_tokens_match_the_files(folder, tmp_path):
    dataset = load(folder, tmp_path)
    assert len(dataset) == NUM_FILES
    for i, sample in enumerate(dataset):
        text = (folder / f"{i:02}.py").read_text()
        assert dataset.tokenizer.decode(sample.input_ids) == text + "<|endoftext|>"
        assert dataset.name(i) == str(folder / f"{i:02}.py")
        assert dataset.seqlens[i] == len(sample.input_ids) == dataset.num_loss_tokens[i] + 1
    plain = load(folder, tmp_path, append_eos=False)
    assert (plain.seqlens == dataset.seqlens - 1).all()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:400"])
def test_workers_change_nothing(folder, tmp_path, tokenizer):
    """The files are the same for any number of workers."""
    pytest.importorskip("tokenizers")
    one = load(folder, tmp_path, "one", tokenizer=tokenizer, num_workers=1)
    three = load(folder, tmp_path, "three", tokenizer=tokenizer, num_workers=3)
    assert contents(one) == contents(three)
    assert one.fingerprint == three.fingerprint


def test_smallest_dtype(folder, tmp_path):
    pytest.importorskip("tokenizers")
    assert load(folder, tmp_path)[0].input_ids.dtype == np.uint8
    assert load(folder, tmp_path, tokenizer="bpe:400")[0].input_ids.dtype == np.uint16

    class Wide(ByteTokenizer):
        vocab_size = 65537

        def fingerprint(self) -> str:
            return "wide"

    assert load(folder, tmp_path, tokenizer=Wide())[0].input_ids.dtype == np.uint32


def test_reopening_builds_nothing(folder, tmp_path, monkeypatch):
    first = load(folder, tmp_path)
    monkeypatch.setattr("hdp.data.prepare.cache.build", None)
    again = load(folder, tmp_path)
    assert again.fingerprint == first.fingerprint
    assert load(folder, tmp_path, max_length=50, overlong="split").fingerprint != first.fingerprint


def test_changes_are_detected(folder, tmp_path):
    pytest.importorskip("tokenizers")
    seen = [load(folder, tmp_path)]
    seen.append(load(folder, tmp_path, tokenizer="bpe:400"))
    seen.append(load(folder, tmp_path, append_eos=False))
    (folder / "00.py").write_text("changed")
    seen.append(load(folder, tmp_path))
    assert len({dataset.report.cache_path for dataset in seen}) == 4
    assert seen[-1].tokenizer.decode(seen[-1][0].input_ids) == "changed<|endoftext|>"


@pytest.mark.parametrize("damage", ["truncate", "remove", "seal"])
def test_damaged_cache_is_rebuilt(folder, tmp_path, damage):
    first = load(folder, tmp_path)
    whole, path = contents(first), Path(first.report.cache_path)
    if damage == "truncate":
        os.truncate(path / "tokens.bin", 1000)
    elif damage == "remove":
        (path / "offsets.npy").unlink()
    else:
        (path / "meta.json").write_text("{")
    assert contents(load(folder, tmp_path)) == whole


# -- several processes --

CHILD = """
import os, sys
from hdp.data import open_dataset
folder, cache, tokenizer, workers = sys.argv[1:]
dataset = open_dataset(folder, cache_dir=cache, tokenizer=tokenizer, num_workers=int(workers))
path = dataset.report.cache_path
print(os.stat(path + "/tokens.bin").st_ino, dataset.fingerprint, flush=True)
"""


def start(folder, cache, tokenizer="bpe:400", workers=1, **options) -> subprocess.Popen:
    arguments = [sys.executable, "-c", CHILD, folder, cache, tokenizer, workers]
    return subprocess.Popen(list(map(str, arguments)), stdout=subprocess.PIPE, text=True, **options)


def test_ranks_that_start_together_build_once(folder, tmp_path):
    pytest.importorskip("tokenizers")
    ranks = [start(folder, tmp_path / "cache", stderr=subprocess.DEVNULL) for _ in range(4)]
    answers = {rank.communicate(timeout=patience(120))[0] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0] * 4
    assert len(answers) == 1  # one inode, one fingerprint
    names = sorted(p.name.split("-")[0] for p in (tmp_path / "cache").iterdir())
    assert names == ["tokenizer", "tokenizer", "tokens", "tokens"]  # folders and their locks


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.3])
def test_kill_during_build(folder, tmp_path, delay_s):
    """After kill -9 of a builder, nothing opens, no worker stays, and the next build succeeds."""
    for i in range(30):
        (folder / f"more{i}.py").write_text("x = 1\n" * 200_000)
    cache = tmp_path / "cache"
    victim = start(folder, cache, "bytes", workers=2, stderr=subprocess.DEVNULL)
    wait_for(lambda: victim.poll() is not None or list(cache.glob("tokens-*.tmp-*/shard-*")))
    time.sleep(delay_s)
    victim.kill()
    victim.wait()
    wait_for(lambda: not workers_of(cache))
    rebuilt = load(folder, tmp_path)
    assert contents(rebuilt) == contents(load(folder, tmp_path, "other"))
    assert not list(cache.glob("*.tmp-*"))


def workers_of(cache: Path) -> list[str]:
    """File descriptors of other processes that are open below `cache`."""
    found = []
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(fd).startswith(str(cache)):
                found.append(str(fd))
        except OSError:
            continue
    return [fd for fd in found if not fd.startswith(f"/proc/{os.getpid()}/")]


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk(folder, tmp_path, workers):
    """A failed write ends the build with its error and leaves no folder behind."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    cache = tmp_path / "cache"
    child = start(folder, cache, "bytes", workers, stderr=subprocess.PIPE, preexec_fn=limit)
    _, stderr = child.communicate(timeout=patience(60))
    assert child.returncode == 1 and "File too large" in stderr
    assert [p.suffix for p in cache.iterdir()] == [".lock"]
    assert len(load(folder, tmp_path)) == NUM_FILES


def test_killed_worker_is_an_error(folder, tmp_path):
    """The kernel may kill a worker when memory runs out."""
    with pytest.raises(RuntimeError, match="SIGKILL"):
        load(folder, tmp_path, tokenizer=Deadly(), num_workers=2)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


class Deadly(ByteTokenizer):
    def fingerprint(self) -> str:
        return "deadly"

    def encode_texts(self, texts):
        os.kill(os.getpid(), 9)
        return super().encode_texts(texts)


# -- bad input --


def test_strict_at_build_and_from_the_cache(folder, tmp_path):
    (folder / "bad.py").write_bytes(b"\xff")
    message = (
        r"bad.py is not UTF-8 \(byte 0: invalid start byte\); "
        r"fix it, or turn off strict to skip it"
    )
    with pytest.raises(ValueError, match=message):
        load(folder, tmp_path, strict=True)
    assert not list((tmp_path / "cache").glob("tokens-*/"))
    assert len(load(folder, tmp_path)) == NUM_FILES
    with pytest.raises(ValueError, match=message):
        load(folder, tmp_path, strict=True)


def test_strict_names_the_first_row(tmp_path, monkeypatch):
    monkeypatch.setattr("hdp.data.prepare.build._MIN_SHARD_BYTES", 50_000)
    rows = ['{"text": "a"}'] * 9_999 + ["not json", '{"text": 3}'] + ['{"text": "b"}'] * 9_999
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    for workers in (1, 3):
        with pytest.raises(ValueError, match=r"a\.jsonl:10000 is malformed \(not JSON"):
            load(tmp_path / "a.jsonl", tmp_path, strict=True, num_workers=workers)


def test_empty_documents_are_not_damage(folder, tmp_path):
    (folder / "empty.py").write_text("")
    dataset = load(folder, tmp_path, strict=True)
    assert dataset.report.num_rejected == {"empty": 1}


def test_file_names_that_are_not_text(tmp_path):
    """File names may contain any bytes; the report can still be printed."""
    folder = os.fsencode(tmp_path / "docs")
    os.mkdir(folder)
    for name, content in ((b"a\xff.txt", b"ok"), (b"b\xff.txt", b"\xff")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    dataset = load(tmp_path / "docs", tmp_path)
    assert dataset.name(0).endswith("a\ufffd.txt")
    assert "b\ufffd.txt" in str(dataset.report).encode().decode()


def test_no_documents(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a").write_text("")
    (folder / "b").write_bytes(b"\xff")
    with pytest.raises(
        ValueError, match=r"no documents in .*docs: of 2 rows, 1 empty, first .*a; 1 not"
    ):
        load(folder, tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    with pytest.raises(ValueError, match=r"1 without an assistant turn, first .*a.jsonl:1"):
        load(tmp_path / "a.jsonl", tmp_path)
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    with pytest.raises(ValueError, match="no column 'text'; its columns are"):
        load(tmp_path / "a.jsonl", tmp_path)


def test_source_that_changes_during_the_build(folder, tmp_path):
    class Changing(ByteTokenizer):
        def encode_texts(self, texts):
            (folder / "late.py").write_text("late")
            os.utime(folder / "00.py", ns=(1, 1))
            return super().encode_texts(texts)

    with pytest.raises(ValueError, match="changed while it was being read"):
        load(folder, tmp_path, tokenizer=Changing(), num_workers=1)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [("bpe:many", "bpe:4096"), ("bpe:100", "need 259"), ("./no/such", "no tokenizer")],
)
def test_bad_tokenizers(folder, tmp_path, tokenizer, message):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=message):
        load(folder, tmp_path, tokenizer=tokenizer)


def test_chats_with_a_trained_tokenizer(tmp_path):
    """Byte pairs are trained on the messages; loss masks are cached with the tokens."""
    pytest.importorskip("tokenizers")
    chat = [{"role": "user", "content": "hello hello"}, {"role": "assistant", "content": "bye bye"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for _ in range(50)))
    dataset = load(tmp_path / "a.jsonl", tmp_path, tokenizer="bpe:300")
    assert dataset.is_chat and len(dataset) == 50
    for sample in dataset:
        assert sample.loss_mask.dtype == bool
        learned = sample.input_ids[sample.loss_mask]
        assert dataset.tokenizer.decode(learned).strip() == "bye bye<|im_end|>"
    assert (dataset.num_loss_tokens == np.count_nonzero(dataset[0].loss_mask)).all()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_workers_with_hugging_face_objects(tmp_path, monkeypatch, kind):
    """Tokenizers of transformers and rows of datasets work in worker processes."""
    pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr("hdp.data.prepare.build._MIN_SHARD_BYTES", 5_000)
    from hdp.data.prepare.tokenizer import HFTokenizer
    from hdp.models.huggingface import load_tokenizer

    ByteTokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = HFTokenizer(load_tokenizer(tmp_path / "tokenizer"))
    turns = [("user", "hello"), ("assistant", "bye"), ("user", "again"), ("assistant", "no")]
    chat = [{"role": role, "content": content} for role, content in turns]
    rows = [{"messages": chat[: 2 + 2 * (i % 2)]} for i in range(200)]
    path = tmp_path / f"chats.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    ours = load(path, tmp_path, "ours", num_workers=1)
    theirs = load(path, tmp_path, "theirs", tokenizer=tokenizer, num_workers=2)
    assert contents(ours) == contents(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.loss_mask, b.loss_mask)


def test_import_needs_no_torch_and_no_datasets(folder, tmp_path):
    code = (
        "import sys; from hdp.data import open_dataset, Sampler; "
        f"d = open_dataset({str(folder)!r}, tokenizer='bytes', cache_dir={str(tmp_path)!r}); "
        "Sampler(d.seqlens, batch_tokens=100).batch_at((0, 0)); d.name(0); "
        "print([m for m in ('torch', 'datasets', 'transformers', 'rich') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_a_tokenizer_is_trained_on_lists_of_parts():
    parts = [{"type": "text", "text": "one"}, "two", {"type": "image_url"}]
    chat = Document(messages=[{"role": "user", "content": parts}, {"role": "x", "content": "y"}])
    assert list(_texts(chat)) == ["one", "two", "y"]
