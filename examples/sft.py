"""Fine-tune on long-tailed data with Hybrid Data Parallelism.

    torchrun --standalone --nproc-per-node 4 examples/sft.py

trains a small Llama on the source code of Python's standard library; it downloads nothing and runs
on a CPU. On a GPU node, with your own model and conversations:

    torchrun --standalone --nproc-per-node 8 examples/sft.py --model Qwen/Qwen3-0.6B \\
        --data chats.jsonl --max-tokens-per-rank 16384 --max-length None --overlong error \\
        --batch-tokens 1048576 --lr 1e-5 --export-hf out

Every sequence gets exactly as many ranks as it needs. For comparison, `--policy static --cp-size 4`
trains the same batches with every sequence on four ranks. `--help` lists all flags.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Literal

from hdp.cli import parse_config, run_training
from hdp.config import TrainConfig

LONGEST = 8192  # tokens; fixed, so that batches are the same on any number of ranks


def _tokens_per_rank() -> int:
    """2048, or more on fewer than four ranks, so that together they hold LONGEST."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return max(2048, -(-LONGEST // ranks))


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTConfig(TrainConfig):
    """TrainConfig with defaults for the demo: four ranks on a CPU, or any number of GPUs."""

    steps: int = 60
    max_length: int | None = LONGEST
    overlong: Literal["error", "drop", "truncate", "split"] = "split"
    max_tokens_per_rank: int | Literal["auto"] = field(default_factory=_tokens_per_rank)
    """Maximum tokens per microbatch on one rank: as many as its activation memory holds."""
    batch_tokens: int = 16384
    lr: float = 1e-3
    run_dir: str = "runs/sft"
    trace_step: int | None = 3


if __name__ == "__main__":
    sys.exit(run_training(parse_config(SFTConfig, prog="sft.py", description=__doc__)))
