"""Teach a model to prefer right answers: a preference set, a warm-up, and DPO.

    python examples/dpo.py                                    # a minute on a CPU
    torchrun --standalone --nproc-per-node 4 examples/dpo.py --run-dir runs/dpo4
    python examples/dpo.py --objective rpo --lora-rank 16     # needs peft

The task is to sort eight digits. The data are made here: prompts, the sorted digits as the chosen
answer, and as the rejected one the same with one digit wrong, sorted as well. A short supervised
run on the chosen answers gives the model that DPO starts from, which is also its reference. DPO
sees every pair once, so the accuracy in the step line is that on pairs it was not trained on.

With a model and preferences of your own, `hdp train` alone will do:

    hdp train --objective dpo --model Qwen/Qwen3-0.6B --data pairs.jsonl --lr 1e-6
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hdp.cli import parse_config, run_training
from hdp.config import TrainConfig

NUM_PAIRS, NUM_DIGITS, WARMUP_STEPS = 6400, 8, 60
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 272,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DPOConfig(TrainConfig):
    """TrainConfig with defaults for the demo."""

    objective: Literal["sft", "dpo", "ipo", "rpo", "kto", "reward"] = "dpo"
    data: str = "sorting"
    """"sorting" (made here), or preference data of your own: with it, this is `hdp train`."""
    steps: int = 50
    batch_tokens: int = 128 * 2 * (2 * NUM_DIGITS + 2)  # 128 pairs
    lr: float = 1e-4
    tokenizer: str = "bytes"
    run_dir: str = "runs/dpo"
    log_every: int = 5


def make_inputs(folder: Path) -> None:
    """Write pairs.jsonl and the config of a model."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(NUM_PAIRS):
        digits = rng.integers(0, 10, NUM_DIGITS)
        other = digits.copy()
        other[0] = (other[0] + rng.integers(1, 10)) % 10
        prompt, right, wrong = (
            "".join(map(str, x)) for x in (digits, sorted(digits), sorted(other))
        )
        row = {"prompt": f"{prompt}>", "chosen": right, "rejected": wrong}
        lines.append(json.dumps(row) + "\n")
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    (folder / "pairs.jsonl").write_text("".join(lines))


def main() -> int:
    config = parse_config(DPOConfig, prog="dpo.py", description=__doc__)
    if config.data != "sorting":
        return run_training(config)
    folder = Path(config.run_dir)
    if os.environ.get("RANK", "0") == "0" and not (folder / "pairs.jsonl").exists():
        make_inputs(folder)  # the other ranks wait for this one before they read
    warmed = str(folder / "warmed-up")
    common: dict[str, Any] = {
        "data": str(folder / "pairs.jsonl"),
        "cache_dir": str(folder / "cache"),
    }
    warmup = replace(
        config,
        **common,
        objective="sft",
        format="chosen",
        model=str(folder / "model"),
        random_init=True,
        lora_rank=0,
        steps=WARMUP_STEPS,
        lr=1e-3,
        run_dir=str(folder / "warm-up"),
        export_hf=warmed,
        export_adapter=None,
    )
    return run_training(warmup) or run_training(replace(config, **common, model=warmed))


if __name__ == "__main__":
    sys.exit(main())
