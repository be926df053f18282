"""Measure full training steps of one long sequence per rank: MFU, memory, cost model's error.

    python tools/bench_step.py --lengths 32768 131072
    torchrun --standalone --nproc-per-node 8 tools/bench_step.py --lengths 32768 131072

A step is a real training step: gather, forward, backward, reduce, clip, AdamW. The model has the
shape of LLaMA-3-8B with as many layers as memory holds (`--layers`), random weights and random
tokens. All flags of `hdp train` are accepted: `--activation-checkpointing`, `--compile`, `--cost
FILE`, ...

MFU counts the FLOPs that the model needs (hdp/training/metrics.py), relative to two peaks: the data
sheet's (or `--peak-tflops`), and the fastest matrix product on this device, measured first.

The prediction comes from a cost model fitted to steps of other lengths (`--fit-lengths`), so it has
not seen the lengths in the table; the last column is its error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from hdp import console
from hdp.attention.clock import Clock
from hdp.cli import parse_config
from hdp.config import TrainConfig
from hdp.data.feed import StepBatch
from hdp.data.pack import Sample, pack_rank
from hdp.distributed.mesh import HDPMesh
from hdp.distributed.watchdog import Watchdog
from hdp.scheduler import CostModel, StepPlan
from hdp.scheduler.costs.fit import Observation, fit_cost
from hdp.training.metrics import StepMetrics
from hdp.training.observe import Observer
from hdp.training.setup import Run, set_up
from hdp.training.step import train_step

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 1 << 20,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
# An fp32 weight, its gradient, AdamW's two averages, and the bf16 weight.
_BYTES_PER_WEIGHT = 4 + 4 + 8 + 2
_MEMORY_SHARE = 0.9  # of the device's memory, for what is counted here


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Medians over the steps of one length."""

    seqlen: int
    step_s: float
    metrics: StepMetrics
    flops_per_s: float  # of one rank


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """(our flags, those of `hdp train`)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="tokens per rank")
    parser.add_argument("--fit-lengths", type=int, nargs="*", help="default: around --lengths")
    parser.add_argument("--layers", type=int, help="default: as many as memory holds, 32 at most")
    parser.add_argument("--shape", default="{}", help="model config overrides, as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the rows to this file")
    return parser.parse_known_args()


def main() -> None:
    args, train_flags = parse_args()
    if args.shape == "{}" and not torch.cuda.is_available():
        raise SystemExit("--lengths: an 8B model needs a GPU; pass --shape for a smaller model")
    args.fit_lengths = args.fit_lengths or lengths_around(args.lengths)
    longest = max(args.lengths + args.fit_lengths)
    flags = ["--data", "stdlib", "--tokenizer", "bytes", "--random-init", "--lr", "1e-30"]
    flags += ["--max-tokens-per-rank", str(longest), "--max-length", str(longest)]
    flags += ["--overlong", "truncate", *train_flags]
    asked = parse_config(TrainConfig, flags, prog="bench_step.py --lengths")
    device = None if asked.device == "auto" else asked.device
    with HDPMesh.create(device=device) as mesh, Watchdog.start(mesh, timeout_s=3600) as watchdog:
        shape = {**LLAMA_8B, **json.loads(args.shape)}
        recompute = asked.activation_checkpointing
        shape["num_hidden_layers"] = args.layers or layers_that_fit(
            shape, memory_bytes(mesh.device), longest, mesh.hdp_size, recompute=recompute
        )
        model = write_config(shape)
        config = parse_config(TrainConfig, ["--model", str(model), *flags])
        with watchdog.allow(3600, "loading the model"):
            run = set_up(config, mesh, watchdog)
        peak = matmul_flops_per_s(mesh.device, 8192 if mesh.device.type == "cuda" else 512)
        rows = {n: measure(run, n, args.repeats) for n in [*args.fit_lengths, *args.lengths]}
        if run.is_main:
            report(run, shape, args, rows, peak)
        run.close()


# ---- measuring ----


def lengths_around(lengths: Sequence[int]) -> list[int]:
    """Lengths to fit: 1/4 and 1/2 of the shortest length, 1/2 and 3/4 of the longest."""
    low, high = min(lengths), max(lengths)
    around = {low // 4, low // 2, high // 2, high * 3 // 4}
    return sorted(around - set(lengths))


def layers_that_fit(
    shape: dict[str, Any], memory_bytes: int, tokens: int, num_ranks: int, *, recompute: bool
) -> int:
    """Number of layers that fit when training on `tokens` per rank, from 1 to the shape's own.

    recompute: with activation checkpointing, which keeps only the inputs of layers.
    """
    hidden, inner, vocab = (
        shape[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    q_size, kv_size = heads * shape["head_dim"], kv_heads * shape["head_dim"]
    one_layer = CostModel.from_transformer(
        num_layers=1,
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=shape["head_dim"],
        vocab_size=vocab,
    )
    weights = hidden * (2 * q_size + 2 * kv_size + 3 * inner)
    sharded = _BYTES_PER_WEIGHT - 2  # the bf16 weights are gathered on every rank
    bytes_per_weight = sharded / num_ranks + 2
    kept = tokens * one_layer.activation_bytes_per_token
    layer = weights * bytes_per_weight + (tokens * hidden * 2 if recompute else kept)
    # Embedding and head, the head's fp32 gradient, two chunks of logits, and one layer's interior.
    fixed = 2 * vocab * hidden * bytes_per_weight + 4 * vocab * hidden + (1 << 30)
    fixed += tokens * one_layer.temporary_bytes_per_token + (kept if recompute else 0)
    fits = int((_MEMORY_SHARE * memory_bytes - fixed) // layer)
    return max(1, min(shape["num_hidden_layers"], fits))


def memory_bytes(device: torch.device) -> int:
    """Memory of the device; on a CPU, which is only for smoke tests, a small constant."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return 4 << 30


def write_config(shape: dict[str, Any]) -> Path:
    """Write the config to a folder shared by all ranks of a node; returns the folder."""
    text = json.dumps(shape)
    folder = (
        Path(tempfile.gettempdir())
        / f"hdp-bench-{os.getuid()}"
        / hashlib.sha256(text.encode()).hexdigest()[:12]
    )
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"config.{os.getpid()}"
    partial.write_text(text)
    partial.replace(folder / "config.json")
    return folder


def make_step(run: Run, seqlen: int) -> StepBatch:
    """One random sequence per rank; with `--offload-gib`, placed by the planner."""
    size, rank = run.mesh.hdp_size, run.mesh.hdp_rank
    if run.offload:
        plan = run.plan(np.full(size, seqlen))
    else:
        plan = StepPlan.from_lists(
            [seqlen] * size,
            [[i] for i in range(size)],
            [[[i]] for i in range(size)],
            max_tokens_per_rank=seqlen,
        ).validate()
    rng = np.random.default_rng(0)
    vocab_size = run.model.config.vocab_size
    samples = [Sample(input_ids=rng.integers(0, vocab_size, seqlen)) for _ in range(size)]
    return StepBatch(
        plan=plan,
        batches=pack_rank(plan, rank, samples),
        seq_ids=np.arange(size),
        num_loss_tokens=size * (seqlen - 1),
        next_position=(0, 0),
    )


def measure(run: Run, seqlen: int, repeats: int) -> Row:
    """Measure one length, after two warm-up steps to compile and allocate state. Collective."""
    device, step, observer = run.mesh.device, make_step(run, seqlen), Observer(run)
    for _ in range(2):
        train_step(run.context, step)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        result = train_step(run.context, step)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    step_s = median(seconds)
    metrics = observer.measure(1, step, result, lr=0.0, step_s=step_s, total_tokens=0)
    size = run.mesh.hdp_size
    flops = observer.flops.of([seqlen] * size, step.num_loss_tokens)
    return Row(seqlen=seqlen, step_s=step_s, metrics=metrics, flops_per_s=flops / step_s / size)


def matmul_flops_per_s(device: torch.device, size: int) -> float:
    """The best of 20 square matrix products, in bf16 on a GPU: a ceiling for everything else."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    clock, seconds = Clock(device), []
    for _ in range(20):
        start = clock.now()
        a @ b
        seconds.append(clock.seconds(start, clock.now()))
    return 2.0 * size**3 / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- reporting ----


def predict(
    base: CostModel, measured_s: dict[int, float], lengths: Sequence[int]
) -> dict[int, float | None]:
    """Predict step seconds for `lengths` from those of other lengths; None if the fit fails."""
    observations = [Observation(pieces=((n, 1),), seconds=s) for n, s in measured_s.items()]
    try:
        cost = fit_cost(observations, base, name="steps of other lengths").cost
    except ValueError as error:
        console.note(f"no prediction: {error}")
        return dict.fromkeys(lengths)
    return {n: float(cost.piece_s(n, 1)) + cost.fixed_s for n in lengths}


def report(
    run: Run, shape: dict[str, Any], args: argparse.Namespace, rows: dict[int, Row], peak: float
) -> None:
    """Print the table, and write the JSON if requested."""
    measured_s = {n: rows[n].step_s for n in args.fit_lengths}
    predicted = predict(run.cost, measured_s, args.lengths)
    table, records = [], []
    for n in args.lengths:
        row = rows[n]
        predicted_s = predicted[n]
        record = {
            "tokens": n,
            "step_s": row.step_s,
            "tokens_per_s_per_rank": row.metrics.tokens_per_s_per_rank,
            "flops_per_s": row.flops_per_s,
            "mfu": row.metrics.mfu,
            "of_matmul": row.flops_per_s / peak,
            "mem_bytes": row.metrics.mem_bytes,
            "predicted_s": predicted_s,
            "error": None if predicted_s is None else predicted_s / row.step_s - 1,
        }
        records.append(record)
        mfu = "-" if row.metrics.mfu is None else f"{row.metrics.mfu:.1%}"
        table.append(
            [
                f"{n:,}",
                f"{row.step_s:.3f}",
                f"{row.metrics.tokens_per_s_per_rank:,.0f}",
                f"{row.flops_per_s / 1e12:,.3g}",
                mfu,
                f"{record['of_matmul']:.1%}",
                f"{row.metrics.mem_bytes / 2**30:.1f}",
                "-" if predicted_s is None else f"{predicted_s:.3f}",
                "-" if predicted_s is None else f"{record['error']:+.1%}",
            ]
        )
    columns = ["tokens", "step s", "tok/s/rank", "TFLOP/s", "mfu", "of matmul", "mem GiB"]
    columns += ["fitted s", "error"]
    title = (
        f"{shape['num_hidden_layers']} layers of {shape['hidden_size']}, vocabulary "
        f"{shape['vocab_size']:,}, {run.mesh.hdp_size} ranks on {run.mesh.device.type}; largest "
        f"matrix product {peak / 1e12:,.3g} TFLOP/s; fitted to {args.fit_lengths} tokens"
    )
    console.print_table(columns, table, title=title)
    if args.json:
        content = {"title": title, "shape": shape, "matmul_flops_per_s": peak, "rows": records}
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n")
