"""All use of transformers: no other file imports it, and this one only inside functions."""

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
    """Register `attn_implementation=name` with transformers. Safe to call more than once.

    No mask function is registered along with it. transformers then builds no mask, and does not
    search the position ids for document boundaries either (which would wait for the GPU).
    """
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)


def resolve_config(config: Any, overrides: Mapping[str, Any] | None) -> PreTrainedConfig:
    """The config given as a mapping of entries, a folder, a hub name or a config, with overrides.

    Raises ValueError for an unknown model type or path, and for invalid entries.
    """
    from transformers import AutoConfig, PreTrainedConfig

    overrides = dict(overrides or {})
    if isinstance(config, Mapping):
        entries = {**config, **overrides}
        model_type = entries.pop("model_type", None)
        if not isinstance(model_type, str):
            raise ValueError('config has no model_type; pass {"model_type": "llama", ...}')
        try:
            resolved = AutoConfig.for_model(model_type, **entries)
            known = {*config, *type(resolved)().to_dict()}
        except Exception as error:  # config validation raises classes of its own
            problem = f"unknown model_type {model_type!r} or invalid config entries"
            raise ValueError(f"{problem}: {first_line(error)}") from error
        check_entries(overrides, known, model_type)
        return resolved
    if isinstance(config, PreTrainedConfig):
        check_entries(overrides, config.to_dict(), config.model_type)
        config = copy.deepcopy(config)
        config.update(overrides)
        return config
    try:
        loaded, unused = AutoConfig.from_pretrained(config, return_unused_kwargs=True, **overrides)
    except Exception as error:
        problem = f"{str(config)!r} is neither a folder with a valid config.json nor a hub model"
        raise ValueError(f"{problem}: {first_line(error)}") from error
    check_entries(unused, loaded.to_dict(), loaded.model_type)
    return loaded


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
            f"cannot build a causal LM of model type {config.model_type!r}: {first_line(error)}"
        ) from error


def model_from_checkpoint(
    path: str | os.PathLike, config: PreTrainedConfig, *, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """The `*ForCausalLM` saved at `path`. Raises ValueError if weights are missing."""
    from transformers import AutoModelForCausalLM

    try:
        if Path(path).is_file():
            raise ValueError("a config file has no weights")
        model, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, LookupError) as error:
        problem = f"cannot load weights from {str(path)!r}: {first_line(error)}"
        raise ValueError(f"{problem}; pass --random-init to start from random weights") from error
    broken = sorted(info["missing_keys"]) + sorted(map(str, info.get("mismatched_keys", ())))
    if broken:
        raise ValueError(
            f"checkpoint {str(path)!r} lacks {len(broken)} weights of {type(model).__name__}, "
            f"first {broken[0]}: it is incomplete, or holds another type of model"
        )
    return model


def load_tokenizer(path: str | os.PathLike) -> Any:
    """The transformers fast tokenizer saved in a folder, or on the hub.

    If tokenizer_config.json names a generic class, tokenizer.json is loaded exactly as saved. For
    some model types (qwen2 is one) AutoTokenizer would replace that class, and with it the
    pre-tokenizer, so a custom tokenizer would silently encode text differently.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        if names_generic_tokenizer(Path(path)):
            return PreTrainedTokenizerFast.from_pretrained(path)
        return _as_in_file(auto_tokenizer(path), path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer at {str(path)!r}: {first_line(error)}; pass a folder with a "
            "tokenizer.json, a hub name, or --tokenizer bytes or bpe:SIZE, which need neither"
        ) from error


# Scripts, digits, whitespace and code: where the pre-tokenizers of model classes differ.
_PROBE = (
    "Hello, world! It's 2000+17=2017, x1 = 3.14159e-10;\n\n\tif a_b:\r\n        return 'yes' # TO"
    " \u00e9\u4e2d\u6587 \u0440\u0443\u0441 \u0639\u0631\u0628\u064a \u0939\u093f\u0928"
    " \u0e44\u0e17\u0e22 \uac00\uac01 e\u0301 \U0001f600\u200d\U0001f680 \u00a0 12345678   \n  \n"
    "</x>{}[]"
)
_NAMED_TOKENS = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")


def _as_in_file(tokenizer: Any, path: str | os.PathLike) -> Any:
    """`tokenizer`, or what tokenizer.json says if transformers' class for it gives other ids.

    Some classes build their own pre-tokenizer, and the one in the file has no effect. The model was
    trained with the file. The attribute `hdp_note` says that it was loaded instead.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import cached_file

    file = cached_file(
        str(path),
        "tokenizer.json",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if file is None or backend is None:
        return tokenizer
    saved = type(backend).from_file(file)

    def ids(one: Any) -> list[int]:
        return one.encode(_PROBE, add_special_tokens=False).ids

    stated = any(name in tokenizer.init_kwargs for name in ("add_bos_token", "add_eos_token"))
    same_ends = stated or saved.encode("a").ids == backend.encode("a").ids
    if ids(saved) == ids(backend) and same_ends:
        return tokenizer
    plain: Any = PreTrainedTokenizerFast.from_pretrained(path)
    if ids(plain.backend_tokenizer) != ids(saved):
        raise ValueError("transformers does not encode text as its tokenizer.json does")
    for name in (f"{name}_token" for name in _NAMED_TOKENS):
        token = getattr(tokenizer, name, None)
        if token in plain.get_vocab() and getattr(plain, name, None) is None:
            setattr(plain, name, token)
    plain.hdp_note = (
        f"tokenizer {path}: transformers' {type(tokenizer).__name__} does not give the ids of "
        "tokenizer.json; used the file"
    )
    return plain


def auto_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer that transformers' AutoTokenizer loads from `path`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
