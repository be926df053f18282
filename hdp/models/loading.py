"""Build models for the HDP path, with random weights or from a checkpoint.

model = load_model("Qwen/Qwen3-0.6B")             # or build_model({"model_type": "llama", ...})
logprobs = model(batch, comm)                     # (total_tokens,)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .causal_lm import ATTENTION, CausalLM, register
from .huggingface import model_from_checkpoint, model_from_config, resolve_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
    register()
    resolved = resolve_config(config, config_overrides)
    with torch.random.fork_rng(devices=[]), torch.device("meta" if skeleton else "cpu"):
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
    if skeleton:
        return build_model(
            path,
            dtype=dtype,
            skeleton=True,
            attn_backend=attn_backend,
            config_overrides=config_overrides,
        )
    register()
    config = resolve_config(path, config_overrides)
    model = model_from_checkpoint(path, config, dtype=dtype, attention=ATTENTION)
    return CausalLM(model.train(), attn_backend=attn_backend)
