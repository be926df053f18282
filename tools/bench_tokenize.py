"""Tokenizing: tokens per second beside `datasets.map`, and the memory that a build takes.

    python tools/bench_tokenize.py --documents 20000             both readers, on the same rows
    python tools/bench_tokenize.py --memory                     1M documents, then one of 50M tokens
    python tools/bench_tokenize.py --memory --documents 10000 --long-tokens 1M

Each measurement runs in a process of its own, with one tokenizer process and one thread, so that
its peak resident memory and CPU time are its alone. `datasets.map` runs as users write it, batched,
from the same Parquet file with the same tokenizer through transformers; what both do is read rows,
tokenize, add an EOS, and write ids to disk. The ids are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hdp import console  # noqa: E402

_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
_MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--documents", type=_count, help="default: 20000, for memory 1M")
    parser.add_argument("--long-tokens", type=_count, default=50_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer", default="bpe:4096", help="for --memory; bytes or bpe:SIZE")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_CHILDREN[arguments.child[0]](*arguments.child[1:])))
        return
    with tempfile.TemporaryDirectory(prefix="bench-tokenize-") as folder:
        measure = _memory if arguments.memory else _speed
        measure(Path(folder), arguments)


def _count(text: str) -> int:
    scale = {"K": 10**3, "M": 10**6}.get(text[-1:].upper(), 1)
    return int(text[:-1] if scale > 1 else text) * scale


def _child(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    output = subprocess.check_output(command, env={**os.environ, **_ONE_THREAD}, text=True)
    return json.loads(output.splitlines()[-1])


# -- speed --


def _speed(folder: Path, arguments: argparse.Namespace) -> None:
    rows = _child("rows", folder, arguments.documents or 20_000)
    results: dict[str, list[dict[str, Any]]] = {"hdp": [], "datasets.map": []}
    for repeat in range(arguments.repeats):
        for name, measured in results.items():
            measured.append(_child(name, folder, repeat))
    digests = {result["ids"] for measured in results.values() for result in measured}
    assert len(digests) == 1, f"different ids: {results}"
    table = []
    for name, measured in results.items():
        median = sorted(measured, key=lambda result: result["cpu_s"])[len(measured) // 2]
        table.append(
            [
                name,
                int(median["tokens"] / median["wall_s"]),
                int(median["tokens"] / median["cpu_s"]),
                median["wall_s"],
                median["cpu_s"],
                int(median["peak_mib"]),
                median["disk_bytes"] / median["tokens"],
            ]
        )
    columns = ["reader", "tokens/s", "tokens/CPU s", "wall s", "CPU s", "peak MiB", "disk B/token"]
    size = rows["bytes"] / _MIB
    console.print_table(columns, table, title=f"{rows['rows']:,} rows, {size:.1f} MiB of text")


def _rows(folder: str, count: str) -> dict[str, Any]:
    """Functions and paragraphs of the standard library's sources as rows, and a tokenizer."""
    import datasets

    from hdp.data import open_source
    from hdp.data.prepare.documents import Document
    from hdp.data.prepare.tokenizer import train_bpe

    source = open_source("stdlib")
    texts: list[str] = []
    for shard in source.shards(1 << 20):
        for item in source.read(shard):
            if isinstance(item, Document) and item.text:
                texts += [part for part in item.text.split("\n\n\n") if part.strip()]
        if len(texts) >= int(count):
            break
    texts = (texts * (int(count) // len(texts) + 1))[: int(count)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(f"{folder}/rows.parquet")
    train_bpe(texts[:2000], 4096).save_pretrained(f"{folder}/tokenizer")
    config = json.loads(Path(folder, "tokenizer/tokenizer_config.json").read_text())
    del config["hdp"]  # so that both use the same class of transformers
    Path(folder, "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    return {"rows": len(texts), "bytes": sum(len(text.encode()) for text in texts)}


def _measured(folder: Path, work: Callable[[], Any]) -> dict[str, Any]:
    import hashlib

    import numpy as np

    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    digest, tokens = hashlib.sha256(), 0
    for ids in result:
        digest.update(np.asarray(ids, dtype=np.int64).tobytes())
        tokens += len(ids)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"tokens": tokens, "wall_s": wall, "cpu_s": cpu, "peak_mib": peak,
            "disk_bytes": size, "ids": digest.hexdigest()}  # fmt: skip


def _with_hdp(folder: str, repeat: str) -> dict[str, Any]:
    from hdp.data import open_dataset

    cache = Path(folder, f"hdp-{repeat}")

    def work() -> Any:
        dataset = open_dataset(
            f"{folder}/rows.parquet",
            tokenizer=f"{folder}/tokenizer",
            cache_dir=cache,
            num_workers=1,
        )
        return (sample.input_ids for sample in dataset)

    return _measured(cache, work)


def _with_datasets(folder: str, repeat: str) -> dict[str, Any]:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    cache = Path(folder, f"datasets-{repeat}")

    def work() -> Any:
        tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/tokenizer")

        def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
            ids = tokenizer(batch["text"], return_attention_mask=False)["input_ids"]
            return {"input_ids": [[*one, tokenizer.eos_token_id] for one in ids]}

        rows = datasets.load_dataset(
            "parquet", data_files=f"{folder}/rows.parquet", split="train", cache_dir=str(cache)
        )
        tokenized = rows.map(tokenize, batched=True, remove_columns=["text"])
        return (row["input_ids"] for row in tokenized)

    return _measured(cache, work)


# -- memory --


def _memory(folder: Path, arguments: argparse.Namespace) -> None:
    documents = arguments.documents or 1_000_000
    table = []
    sizes = [("documents", documents // 10), ("documents", documents)]
    sizes += [("long", arguments.long_tokens // 10), ("long", arguments.long_tokens)]
    for name, count in sizes:
        path = folder / f"{name}-{count}.jsonl"
        written = _child("write", path, name, count)
        result = _child("build", path, folder / f"cache-{name}-{count}", arguments.tokenizer)
        path.unlink()
        table.append(
            [
                "small documents" if name == "documents" else "one document",
                result["documents"],
                result["tokens"],
                written["bytes"] / _MIB,
                int(result["before_mib"]),
                int(result["peak_mib"]),
                (result["peak_mib"] - result["before_mib"]) * _MIB / written["bytes"],
                result["cpu_s"],
            ]
        )
    columns = [
        "data",
        "documents",
        "tokens",
        "MiB",
        "MiB before",
        "MiB at peak",
        "B per B",
        "CPU s",
    ]
    console.print_table(columns, table, title=f"peak memory of a build, {arguments.tokenizer}")


def _write(path: str, kind: str, count: str) -> dict[str, Any]:
    """`count` small documents, or one of about `count` tokens, as JSON lines."""
    sentences = [f"the plan of step {i} gives rank {i % 7} {i * i} tokens.\n" for i in range(997)]
    with open(path, "w", encoding="ascii") as file:
        if kind == "documents":
            for i in range(int(count)):
                text = "".join(sentences[(i + k) % 997] for k in range(1 + i % 4))
                file.write(json.dumps({"text": text}) + "\n")
        else:
            file.write('{"text": "')
            for i in range(int(count) // 12):  # about 12 tokens each
                file.write(sentences[i % 997].replace("\n", "\\n"))
            file.write('"}\n')
    return {"bytes": os.path.getsize(path)}


def _build(path: str, cache: str, tokenizer: str) -> dict[str, Any]:
    from hdp.data import open_dataset
    from hdp.data.prepare.tokenizer import BpeTokenizer, train_bpe

    trained: str | BpeTokenizer = tokenizer
    if tokenizer.startswith("bpe:"):
        with open(path, encoding="ascii") as file:
            trained = train_bpe([file.read(_MIB)], int(tokenizer.removeprefix("bpe:")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu = time.process_time()
    dataset = open_dataset(path, tokenizer=trained, cache_dir=cache, num_workers=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "documents": len(dataset),
        "tokens": int(dataset.seqlens.sum()),
        "before_mib": before,
        "peak_mib": peak,
        "cpu_s": time.process_time() - cpu,
    }


_CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "rows": _rows,
    "hdp": _with_hdp,
    "datasets.map": _with_datasets,
    "write": _write,
    "build": _build,
}

if __name__ == "__main__":
    main()
