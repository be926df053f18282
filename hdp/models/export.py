"""Export a trained model to a folder that `from_pretrained` loads.

An export is written next to its target and renamed once complete, so a killed export leaves the old
folder intact. Overwriting the wrong folder would be worse than failing (a run's folder has a
config.json too), so each export lists its own files in `hdp_export.json`, and only a folder that
contains exactly those files is ever replaced.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .causal_lm import CausalLM
from .huggingface import auto_tokenizer, load_tokenizer, model_from_config

MARK = "hdp_export.json"


def export_model(
    model: CausalLM,
    path: str | os.PathLike,
    state_dict: Mapping[str, Tensor],
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = torch.bfloat16,
) -> None:
    """Write config, safetensors and tokenizer for `from_pretrained`. Call it in one process only.

    Args:
        model: supplies config and parameter names; its weights are not read (they may be sharded).
        path: a folder. It appears only once complete, and replaces an earlier export.
        state_dict: full tensors under the names of `model.state_dict()` (see `full_state_dict`).
        tokenizer: any object with `save_pretrained(folder)`, or None.
        dtype: dtype of the written weights; None keeps each tensor's own.

    Raises ValueError if weights are missing, or if `path` holds anything other than an export.
    """
    target = check_target(path)
    weights = {
        name.removeprefix("model."): (x if dtype is None else x.to(dtype)).detach().cpu()
        for name, x in state_dict.items()
    }
    config = copy.deepcopy(model.config)
    config._attn_implementation = None  # "hdp" here; whoever loads the model chooses its own
    written_dtype = next(iter(weights.values())).dtype if weights else dtype
    with torch.device("meta"):
        skeleton = model_from_config(config, dtype=written_dtype)
    skeleton.generation_config = model.model.generation_config
    missing = sorted(skeleton.state_dict().keys() - weights.keys())
    if missing:
        raise ValueError(
            f"state_dict lacks {len(missing)} weights, first {missing[0]}; pass full_state_dict()"
        )
    partial = partial_path(target)
    shutil.rmtree(partial, ignore_errors=True)
    skeleton.save_pretrained(partial, state_dict=weights, max_shard_size="5GB")
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
        _warn_if_misread(partial)
    publish(target)


def _warn_if_misread(folder: Path) -> None:
    """Warn if AutoTokenizer loads a different tokenizer from `folder` than the one written."""
    ours, auto = load_tokenizer(folder), auto_tokenizer(folder)
    probe = "Hello, world! x1 = 2000 + 17\n\tif a_b: return 'yes'  # \u00e9\u4e2d"
    if ours.encode(probe) != auto.encode(probe):
        warnings.warn(
            f"transformers' AutoTokenizer loads a {type(auto).__name__} from this export, which "
            "encodes text differently; use PreTrainedTokenizerFast.from_pretrained or "
            "hdp.models.huggingface.load_tokenizer instead",
            stacklevel=3,
        )


# ---- the folder ----


def check_target(path: str | os.PathLike) -> Path:
    """Return `path` resolved, if a model may be exported there. Call it before training starts.

    Raises ValueError if `path` holds anything other than an export, or its parent is not writable.
    """
    target = Path(path).expanduser().resolve()
    parent = next(folder for folder in target.parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"{target}: cannot write to {parent}; choose another folder")
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"{target} is a file; choose a folder for the exported model")
    entries = sorted(entry.name for entry in target.iterdir())
    foreign = [name for name in entries if name not in _own_files(target)]
    if foreign:
        listed = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
        raise ValueError(
            f"{target} exists and holds files that no export wrote ({listed}); "
            "choose another folder"
        )
    return target


def partial_path(target: Path) -> Path:
    """Where an export lives while it is being written."""
    return target.with_name(target.name + ".partial")


def publish(target: Path) -> None:
    """Move the finished folder at `partial_path(target)` to `target`, replacing any old export."""
    partial, replaced = partial_path(target), target.with_name(target.name + ".replaced")
    files = sorted(entry.name for entry in partial.iterdir())
    (partial / MARK).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    check_target(target)  # again: hours may have passed since the first check
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def _own_files(target: Path) -> set[str]:
    try:
        files = json.loads((target / MARK).read_text(encoding="utf-8"))["files"]
        return {MARK, *files}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
