"""Checks of configurations: the conditions that options must meet, each with its message."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig


def check_objective(config: TrainConfig) -> None:
    """Raise ValueError for options of the objective and of LoRA that do not go together."""
    require(config.beta > 0, "beta", config.beta, "above 0")
    require(config.rpo_alpha >= 0, "rpo_alpha", config.rpo_alpha, "0 or more")
    require(config.lora_rank >= 0, "lora_rank", config.lora_rank, "0 or more")
    alpha = config.lora_alpha
    require(alpha is None or alpha > 0, "lora_alpha", alpha, "above 0")
    if config.export_adapter is not None and not config.lora_rank:
        raise ValueError(
            f"--export-adapter {config.export_adapter} requires --lora-rank, such as 16: there "
            "is no adapter to export"
        )
    if config.export_adapter is not None and config.export_adapter in (
        config.export_hf,
        config.export_ema,
    ):
        raise ValueError(
            f"--export-adapter and another export are both {config.export_adapter}; choose two "
            "folders"
        )
    if config.lora_rank and config.offload_gib:
        raise ValueError(
            f"--offload-gib {config.offload_gib} cannot be combined with --lora-rank "
            f"{config.lora_rank}: what adapters save for backward is not in the offload's "
            "arithmetic; use --activation-checkpointing"
        )
    if config.objective == "sft":
        return
    ordinary: dict[str, Any] = {
        "curriculum": "none",
        "context_schedule": None,
        "mix_by": "tokens",
    }
    ordinary |= {"eval_data": None, "eval_share": None, "eval_every": 0}
    for name, value in ordinary.items():
        if getattr(config, name) != value:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} {getattr(config, name)} is for --objective sft, not for "
                f"{config.objective}; drop it"
            )
    if not isinstance(config.data, str):
        raise ValueError(
            f"--objective {config.objective} takes one data set, not {len(config.data)}: join them "
            "in one file or folder"
        )
    if config.overlong == "split":
        raise ValueError(
            f"--overlong split with --objective {config.objective} would compare parts of "
            "answers; choose error, drop or truncate"
        )
    if config.format != "auto" or config.data == "stdlib":
        raise ValueError(
            f"--objective {config.objective} needs answers to compare, and --data {config.data} "
            f"--format {config.format} has none: pass --data with the columns prompt, chosen and "
            "rejected (kto: or prompt, completion and label), without --format"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys come once each: json itself would take the last."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice} is given twice")
    return entries


def require(is_valid: bool, name: str, value: Any, expected: str) -> None:
    """Raise ValueError unless the value of option `name` is as expected."""
    if not is_valid:
        flag = name.replace("_", "-")
        raise ValueError(f"--{flag} must be {expected}, got {value}")


def parse_json(flag: str, value: str | None, example: str) -> Any:
    """The JSON in an option's value, {} for none. Raises ValueError, with an example."""
    try:
        return json.loads(value or "{}", object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"--{flag} {value!r} is not valid JSON ({error}); write it like '{example}'"
        ) from error
