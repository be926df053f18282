"""What we ask of transformers: the one file that imports it, always inside functions."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from .support import check_entries, first_line, names_generic_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Make `attn_implementation=name` known to transformers. Calling it again does no harm.

    No mask function is registered with it: then transformers builds no mask, and does not search
    the position ids for document boundaries either (which would wait for the GPU).
    """
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)


def resolve_config(config: Any, overrides: Mapping[str, Any] | None) -> PreTrainedConfig:
    """The config that `config` names (entries, a folder, a hub name, or itself), with overrides.

    Raises ValueError for an unknown model type or path, and for entries that do not fit.
    """
    from transformers import AutoConfig, PreTrainedConfig

    overrides = dict(overrides or {})
    if isinstance(config, Mapping):
        entries = {**config, **overrides}
        model_type = entries.pop("model_type", None)
        if not isinstance(model_type, str):
            raise ValueError('a config needs its kind of model: {"model_type": "llama", ...}')
        try:
            resolved = AutoConfig.for_model(model_type, **entries)
            known = {*config, *type(resolved)().to_dict()}
        except Exception as error:  # it has its own classes of errors for values
            told = f"unknown model_type {model_type!r}, or entries that do not fit"
            raise ValueError(f"{told}: {first_line(error)}") from error
        check_entries(overrides, known, model_type)
        return resolved
    if isinstance(config, PreTrainedConfig):
        check_entries(overrides, config.to_dict(), config.model_type)
        config = copy.deepcopy(config)
        config.update(overrides)
        return config
    try:
        made, unused = AutoConfig.from_pretrained(config, return_unused_kwargs=True, **overrides)
    except Exception as error:
        told = f"{str(config)!r} is neither a folder with a config.json nor a model on the hub"
        raise ValueError(f"{told}, or has entries that do not fit: {first_line(error)}") from error
    check_entries(unused, made.to_dict(), made.model_type)
    return made


def model_from_config(
    config: PreTrainedConfig, *, dtype: torch.dtype | None, attention: str | None = None
) -> PreTrainedModel:
    """A `*ForCausalLM` with random weights on the current default device."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype}
    if attention is not None:
        options["attn_implementation"] = attention
    try:
        return AutoModelForCausalLM.from_config(config, **options)
    except ValueError as error:
        raise ValueError(
            f"no causal LM can be made for model type {config.model_type!r}: {first_line(error)}"
        ) from error


def model_from_checkpoint(
    path: str | os.PathLike, config: PreTrainedConfig, *, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """The `*ForCausalLM` saved at `path`. Raises ValueError if weights are missing."""
    from transformers import AutoModelForCausalLM

    try:
        if Path(path).is_file():
            raise ValueError("a config has no weights")
        model, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, LookupError) as error:
        told = f"no weights can be loaded from {str(path)!r}: {first_line(error)}"
        raise ValueError(f"{told}; --random-init starts from random ones") from error
    broken = sorted(info["missing_keys"]) + sorted(map(str, info.get("mismatched_keys", ())))
    if broken:
        raise ValueError(
            f"checkpoint {str(path)!r} lacks {len(broken)} weights of {type(model).__name__}, "
            f"first {broken[0]}: another kind of model, or incomplete"
        )
    return model


def load_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer saved in a folder, or on the hub (a transformers fast tokenizer).

    A folder whose tokenizer_config.json names a generic class means its tokenizer.json literally.
    AutoTokenizer instead replaces the class by that of the model type for some types (qwen2 is
    one), and with it the pre-tokenizer: a tokenizer of one's own would silently encode otherwise.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        if names_generic_tokenizer(Path(path)):
            return PreTrainedTokenizerFast.from_pretrained(path)
        return auto_tokenizer(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer in {str(path)!r}, a folder with tokenizer.json or a name on the hub: "
            f"{first_line(error)}; --tokenizer bytes, or bpe:SIZE, needs none"
        ) from error


def auto_tokenizer(path: str | os.PathLike) -> Any:
    """What transformers' AutoTokenizer makes of `path`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
