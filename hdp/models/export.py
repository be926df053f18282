"""Exports: a trained model in a folder that `from_pretrained` loads.

An export ends by renaming a finished folder, so a killed one leaves what was there. What is there
may be anything that a path can name: a run's folder has a config.json too. So an export leaves a
list of its own files, `hdp_export.json`, and only a folder with such a list and nothing beside it
is replaced.
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
    """Write what `from_pretrained` loads: config, safetensors, tokenizer. One process calls it.

    Args:
        model: for its config and names; its weights are not read (they may be sharded).
        path: a folder. It appears when it is complete; an earlier export there is replaced.
        state_dict: full tensors under the names of `model.state_dict()` (`full_state_dict`).
        tokenizer: anything with `save_pretrained(folder)`, or None.
        dtype: of the written weights; None: as they are.

    Raises ValueError if weights are missing, or if `path` holds anything but an export.
    """
    target = check_target(path)
    weights = {
        name.removeprefix("model."): (x if dtype is None else x.to(dtype)).detach().cpu()
        for name, x in state_dict.items()
    }
    config = copy.deepcopy(model.config)
    config._attn_implementation = None  # ours; the loading side chooses its own
    written_dtype = next(iter(weights.values())).dtype if weights else dtype
    with torch.device("meta"):
        skeleton = model_from_config(config, dtype=written_dtype)
    skeleton.generation_config = model.model.generation_config
    missing = sorted(skeleton.state_dict().keys() - weights.keys())
    if missing:
        raise ValueError(f"state_dict lacks {len(missing)} weights, first {missing[0]}")
    partial = partial_path(target)
    shutil.rmtree(partial, ignore_errors=True)
    skeleton.save_pretrained(partial, state_dict=weights, max_shard_size="5GB")
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
        _warn_if_misread(partial)
    publish(target)


def _warn_if_misread(folder: Path) -> None:
    """Tell the user if AutoTokenizer reads another tokenizer out of `folder` than was written."""
    ours, auto = load_tokenizer(folder), auto_tokenizer(folder)
    probe = "Hello, world! x1 = 2000 + 17\n\tif a_b: return 'yes'  # \u00e9\u4e2d"
    if ours.encode(probe) != auto.encode(probe):
        warnings.warn(
            f"transformers' AutoTokenizer reads a {type(auto).__name__} from this export, which "
            "encodes text differently; load it with PreTrainedTokenizerFast.from_pretrained or "
            "hdp.models.huggingface.load_tokenizer",
            stacklevel=3,
        )


# ---- the folder ----


def check_target(path: str | os.PathLike) -> Path:
    """`path`, resolved, if a model may be exported there; call it before hours of training.

    Raises ValueError if something else is there, or if its parent cannot be written.
    """
    target = Path(path).expanduser().resolve()
    parent = next(folder for folder in target.parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"{target}: cannot write into {parent}; choose another folder")
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder for a model; choose another path")
    there = sorted(entry.name for entry in target.iterdir())
    strange = [name for name in there if name not in _own_files(target)]
    if strange:
        told = ", ".join(strange[:4]) + (", ..." if len(strange) > 4 else "")
        raise ValueError(
            f"{target} exists and is no exported model, or more than that: it holds {told}; "
            "choose another folder"
        )
    return target


def partial_path(target: Path) -> Path:
    """Where the export is while it is being written."""
    return target.with_name(target.name + ".partial")


def publish(target: Path) -> None:
    """Give the finished folder at `partial_path(target)` its name; an earlier export goes."""
    partial, replaced = partial_path(target), target.with_name(target.name + ".replaced")
    files = sorted(entry.name for entry in partial.iterdir())
    (partial / MARK).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    check_target(target)  # again: a run takes long
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
