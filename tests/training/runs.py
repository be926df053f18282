"""Inputs and configuration of small whole runs, shared by the tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path

from hdp.config import TrainConfig
from tests.patience import patience

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def write_inputs(root: Path) -> Path:
    """A folder of long-tailed text files and a model's config, below `root`."""
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "ring", "rank", "plan", "\n"]
    (root / "text").mkdir()
    for i in range(60):
        length = min(700, int(rng.lognormvariate(4.0, 1.2)) + 1)
        text = " ".join(rng.choice(words) for _ in range(length))[:length]
        (root / "text" / f"{i:03}.txt").write_text(text)
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text(json.dumps(MODEL))
    return root


def config(inputs, run_dir, **options) -> TrainConfig:
    defaults = {
        "model": str(inputs / "model"),
        "random_init": True,
        "data": str(inputs / "text"),
        "tokenizer": "bytes",
        "cache_dir": str(inputs / "cache"),
        "device": "cpu",
        "steps": 30,
        "batch_tokens": 900,
        "max_tokens_per_rank": 704,
        "warmup_steps": 5,
        "lr": 1e-2,
        "run_dir": str(run_dir),
        "tensorboard": False,
        "timeout_s": patience(60),
    }
    return TrainConfig(**{**defaults, **options})


def train_and_listen(rank, world, options) -> str:
    """Train, and return what the rank said on stderr."""
    import contextlib
    import io

    from hdp.training.loop import train

    with contextlib.redirect_stderr(io.StringIO()) as said:
        train(options)
    return said.getvalue()
