"""Export a trained model to a folder that `from_pretrained` loads.

The folder holds what a stranger needs and nothing else: each weight once (a tied LM head is the
embedding and is not written again), in one dtype, and a config without traces of where the model
came from, such as a quantization that the weights no longer have, or a reference to code.
export_folder.py looks after the folder itself.
"""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .causal_lm import CausalLM
from .export_folder import check_target, new_export
from .huggingface import (
    auto_tokenizer,
    classifier_from_config,
    load_tokenizer,
    model_from_config,
)
from .scalar_head import ScalarHeadLM
from .support import first_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NOT_EXPORTED = ("quantization_config", "compression_config", "auto_map")


def loader_of(model: CausalLM | ScalarHeadLM) -> str:
    """The class of transformers that loads an export of `model`."""
    is_scalar = isinstance(model, ScalarHeadLM)
    return "AutoModelForSequenceClassification" if is_scalar else "AutoModelForCausalLM"


def export_dtype(model: CausalLM | ScalarHeadLM, name: str) -> torch.dtype:
    """The dtype `name` ("fp32", "bf16", "fp16") of an export.

    "auto" is that of the checkpoint that the model was loaded from, and that of the weights
    themselves if it started from random ones.
    """
    if name == "auto":
        return model.stored_dtype or next(model.parameters()).dtype
    return DTYPES[name]


def export_model(
    model: CausalLM | ScalarHeadLM,
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

    Raises ValueError if weights are missing or do not fit into `dtype`, or if `path` holds anything
    other than an export, and OSError, with the folder and the remedy, if it cannot be written. An
    earlier export is then still there.
    """
    target = check_target(path)
    weights = {
        name.removeprefix("model."): _cast(name, x, dtype).detach().cpu()
        for name, x in state_dict.items()
    }
    config = copy.deepcopy(model.config)
    config._attn_implementation = None  # "hdp" here; whoever loads the model chooses its own
    for name in _NOT_EXPORTED:
        config.__dict__.pop(name, None)
    written_dtype = next(iter(weights.values())).dtype if weights else dtype
    with torch.device("meta"):
        if isinstance(model, ScalarHeadLM):
            skeleton = classifier_from_config(config, model.num_outputs, dtype=written_dtype)
            prefix = f"{skeleton.base_model_prefix}."
            weights = {n if n == "score.weight" else prefix + n: x for n, x in weights.items()}
        else:
            skeleton = model_from_config(config, dtype=written_dtype)
    _keep_one_of_each(weights, skeleton)
    kept = f"the earlier export in {target} is unchanged" if target.exists() else "nothing is left"
    try:
        _check_space(target, weights)
        with new_export(target) as folder:
            skeleton.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")
            if isinstance(model, CausalLM):
                # As it is: save_pretrained rejects combinations that from_pretrained accepts.
                model.model.generation_config.to_json_file(folder / "generation_config.json")
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
                _warn_if_misread(folder)
    except ValueError:
        raise
    except Exception as error:  # safetensors has a class of its own for a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OSError(
            f"cannot export to {target}: {reason}; {kept}. Free space there, or choose another "
            "folder; a training run that is started again only exports"
        ) from error


def _cast(name: str, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not x.is_floating_point():
        return x
    cast = x.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(cast).all() and torch.isfinite(x).all():
        raise ValueError(
            f"{name} has values up to {x.abs().max().item():.3g}, which fp16 cannot hold; export "
            "in bf16 (--export-dtype bf16)"
        )
    return cast


def _keep_one_of_each(weights: dict[str, Tensor], skeleton: Any) -> None:
    """Remove all but the first name of a tied weight. Raises ValueError for missing weights."""
    names: dict[int, list[str]] = {}
    for name, x in skeleton.state_dict(keep_vars=True).items():
        names.setdefault(id(x), []).append(name)
    missing = sorted(name for same in names.values() for name in same[:1] if name not in weights)
    if missing:
        raise ValueError(
            f"state_dict lacks {len(missing)} weights, first {missing[0]}; pass full_state_dict()"
        )
    for same in names.values():
        for name in same[1:]:
            weights.pop(name, None)


def _check_space(target: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise OSError before the disk is filled to the last byte."""
    parent = next(folder for folder in target.parents if folder.exists())
    needed = sum(x.numel() * x.element_size() for x in weights.values())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(
            f"no space left on device: the weights take {needed / 2**30:.3g} GiB and "
            f"{free / 2**30:.3g} GiB are free"
        )


def _warn_if_misread(folder: Path) -> None:
    """Warn if AutoTokenizer loads a different tokenizer from `folder` than the one written."""
    try:
        ours, auto = load_tokenizer(folder), auto_tokenizer(folder)
    except Exception as error:  # the weights are worth more than this check
        warnings.warn(f"the exported tokenizer cannot be loaded: {error}", stacklevel=3)
        return
    probe = "Hello, world! x1 = 2000 + 17\n\tif a_b: return 'yes'  # \u00e9\u4e2d"
    if ours.encode(probe) != auto.encode(probe):
        warnings.warn(
            f"transformers' AutoTokenizer loads a {type(auto).__name__} from this export, which "
            "encodes text differently; use PreTrainedTokenizerFast.from_pretrained or "
            "hdp.models.huggingface.load_tokenizer instead",
            stacklevel=3,
        )
