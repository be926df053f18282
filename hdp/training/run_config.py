"""The configuration of a run folder: what changed since last time, kept once it is accepted.

A command that is refused leaves the folder as it was: config.json is written only when the data,
the model and the checkpoint have been accepted, just before the first step. If an earlier
configuration differs, each change is printed, and the earlier file is kept as
config-until-STEP.json, STEP being the last step that was trained with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdp.checkpoint.directory import committed
from hdp.config import TrainConfig
from hdp.config_file import differences

NAME = "config.json"

# What a change of these fields means for a run that goes on; others change neither the batches nor
# the updates (paths of output, logging, how the work is divided).
_ORDER = "changes which sequences come next"
_UPDATE = "changes the updates from here on"
EFFECTS = {
    **dict.fromkeys(
        ("data", "text_column", "pattern", "subset", "split", "tokenizer", "max_length"), _ORDER
    ),
    **dict.fromkeys(("format", "chat_template", "chat_template_kwargs", "eval_share"), _ORDER),
    **dict.fromkeys(("mix_by", "curriculum", "context_schedule", "epochs"), _ORDER),
    **dict.fromkeys(("overlong", "strict", "batch_tokens"), _ORDER),
    "seed": _ORDER,
    **dict.fromkeys(("lr", "min_lr_ratio", "warmup_steps", "schedule", "decay_share"), _UPDATE),
    **dict.fromkeys(("weight_decay", "beta1", "beta2", "grad_clip", "ema_decay"), _UPDATE),
    **dict.fromkeys(("model", "config_overrides"), "changes the model"),
    **dict.fromkeys(("dtype", "objective", "beta", "rpo_alpha"), _UPDATE),
}


def check_new_run(config: TrainConfig) -> None:
    """With --no-resume, raise ValueError if the folder already has a checkpoint.

    Called before anything is loaded or written.
    """
    if config.resume:
        return
    if found := committed(Path(config.run_dir) / "checkpoints"):
        raise ValueError(
            f"{found[-1]} exists but --no-resume was given: choose another --run-dir, or delete "
            f"the folder {found[-1].parent}"
        )


def describe_changes(old: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """One line for each value that differs from the earlier configuration."""
    new = json.loads(config.to_json())
    defaults = json.loads(TrainConfig().to_json())
    lines = []
    for name, was, now in differences({**defaults, **old}, new):  # old files lack new options
        effect = EFFECTS.get(name, "")
        if name == "steps" and config.schedule != "constant":
            effect = "changes the updates from here on: the schedule ends elsewhere"
        flag = name.replace("_", "-")
        lines.append(f"  --{flag}: {was} -> {now}" + (f"  ({effect})" if effect else ""))
    return lines


def accept(config: TrainConfig, *, step: int) -> list[str]:
    """Write config.json for a run whose `step` steps are done; return what to say of it.

    An earlier, different configuration is kept as config-until-STEP.json. On rank 0 only. Raises
    OSError.
    """
    path = Path(config.run_dir) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        text = None
    if text is not None:
        try:
            old = json.loads(text)
            if not isinstance(old, dict):
                raise ValueError("not an object")
            changes = describe_changes(old, config)
        except (ValueError, RecursionError):
            changes = [f"  {path} could not be read"]
        if changes:
            kept = _unused(path.with_name(f"config-until-{step}.json"))
            path.rename(kept)
            since = f"since step {step}" if step else "since the last start in this folder"
            lines = [f"changed {since} (the earlier configuration is {kept}):", *changes]
    partial = path.with_name(NAME + ".partial")
    partial.write_text(config.to_json() + "\n", encoding="utf-8")
    os.replace(partial, path)
    return lines


def _unused(path: Path) -> Path:
    """`path`, or with a number if it exists: no configuration is ever lost."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}.json")
    return candidate
