"""Build models for the HDP path, with random weights or from a checkpoint.

model = load_model("Qwen/Qwen3-0.6B")             # or build_model({"model_type": "llama", ...})
logprobs = model(batch, comm)                     # (total_tokens,)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .causal_lm import ATTENTION, CausalLM, register, transformer_shape
from .huggingface import (
    check_checkpoint,
    check_unquantized,
    model_from_checkpoint,
    model_from_config,
    resolve_config,
)
from .support import check_supported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def build_model(
    config: Mapping[str, Any] | str | os.PathLike | PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    skeleton: bool = False,
    attn_backend: str | None = None,
    config_overrides: Mapping[str, Any] | None = None,
) -> CausalLM:
    """A model with random weights, in training mode, on the CPU.

    Args:
        config: {"model_type": "llama", "hidden_size": ...}, a folder or hub name, or a config.
        dtype: of the weights (fp32 masters); `fsdp.shard` sets the dtype that layers compute in.
        seed: of the weights. The same seed gives the same weights on any number of ranks.
        skeleton: no weights (meta device), for ranks that receive them from rank 0 in `shard`.
        attn_backend: name of a block kernel; None picks the best one for device and dtype.
        config_overrides: config entries to change, for example {"sliding_window": None}.

    Raises ValueError for an unknown model type or path, and for a model that the ring cannot run.
    """
    resolved, checked = _check(config, config_overrides, dtype)
    if skeleton:
        return CausalLM(checked.train(), attn_backend=attn_backend)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = model_from_config(resolved, dtype=dtype, attention=ATTENTION)
    return CausalLM(model.train(), attn_backend=attn_backend)


def load_model(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    skeleton: bool = False,
    attn_backend: str | None = None,
    config_overrides: Mapping[str, Any] | None = None,
) -> CausalLM:
    """The model saved in a folder or on the hub; arguments as in `build_model`.

    Raises ValueError as `build_model` does, and for a checkpoint with missing weights.
    """
    config, checked = _check(path, config_overrides, dtype)
    check_unquantized(path, config)
    if skeleton:
        return CausalLM(checked.train(), attn_backend=attn_backend)
    folder, stored_dtype = check_checkpoint(path, checked)
    model = model_from_checkpoint(folder, config, dtype=dtype, attention=ATTENTION)
    return CausalLM(model.train(), attn_backend=attn_backend, stored_dtype=stored_dtype)


def check_model(
    path: Any,
    *,
    random_init: bool = False,
    weights: bool = True,
    config_overrides: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """The shape (`transformer_shape`) of the model at `path` (or its config), if it can be trained.

    Takes seconds and allocates nothing, whatever the model's size: no weights are built, and of
    files only the headers are read. weights: also check the files of the weights, which need to
    exist on rank 0 alone. Raises ValueError as `build_model` (random_init) or `load_model` would.
    """
    config, checked = _check(path, config_overrides, torch.float32)
    if not random_init:
        check_unquantized(path, config)
        if weights:
            check_checkpoint(path, checked)
    return transformer_shape(checked)


def _check(
    config: Any, overrides: Mapping[str, Any] | None, dtype: torch.dtype
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The config, and its model on the meta device: everything in them that can be refused is."""
    register()
    resolved = resolve_config(config, overrides)
    try:
        with torch.device("meta"):
            model = model_from_config(resolved, dtype=dtype, attention=ATTENTION)
    except ValueError as error:
        if not overrides:
            raise
        given = json.dumps(dict(overrides), default=str)
        raise ValueError(f"{error} (with --config-overrides {given!r})") from error
    check_supported(model)
    return resolved, model
