"""All use of transformers: no other file imports it, and this one only inside functions."""

from __future__ import annotations

import copy
import difflib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from .hub import fetch_checkpoint, is_offline, local_path
from .overrides import check_rope_type, merge_overrides
from .support import first_line, names_generic_tokenizer
from .weight_files import check_weights, find_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


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
    from transformers import PreTrainedConfig

    overrides = dict(overrides or {})
    where = ""
    if isinstance(config, PreTrainedConfig):
        if not overrides:
            return copy.deepcopy(config)
        entries, config_class = config.to_dict(), type(config)
    else:
        where = "config" if isinstance(config, Mapping) else f"{str(config)!r}: config.json"
        entries = dict(config) if isinstance(config, Mapping) else _read_config(config)
        config_class = _config_class({**entries, **overrides}, where)
    base = _make_config(config_class, entries)
    if not overrides:
        return base
    merged = merge_overrides(
        entries,
        overrides,
        known={*base.to_dict(), *config_class().to_dict()},
        rope=getattr(base, "rope_parameters", None),
    )
    try:
        return _make_config(config_class, merged)
    except ValueError as error:
        given = json.dumps(overrides, default=str)
        raise ValueError(f"{error} (with --config-overrides {given!r})") from error


def _read_config(path: Any) -> dict[str, Any]:
    """The entries of config.json at `path`, a file, a folder or a hub name."""
    from transformers import PreTrainedConfig

    problem = f"{str(path)!r} is neither a folder with a valid config.json nor a hub model"
    try:
        local = local_path(path)
    except ValueError as error:
        raise ValueError(f"{problem}: {error}") from error
    problem = f"cannot read the config of {str(path)!r}"
    try:
        if local is not None and local.is_dir() and not (local / "config.json").is_file():
            raise ValueError("the folder has no config.json")
        entries, _ = PreTrainedConfig.get_config_dict(
            path if local is None else local,
            local_files_only=local is not None or is_offline(str(path)),
        )
    except Exception as error:  # the hub's client raises classes of several libraries
        raise ValueError(f"{problem}: {first_line(error)}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{problem}: config.json holds {entries!r}, not an object")
    return entries


def _config_class(entries: Mapping[str, Any], where: str) -> Any:
    """The config class for `entries`. Code that comes with a model is never run."""
    from transformers import CONFIG_MAPPING

    model_type = entries.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f'{where} has no model_type; it needs an entry "model_type": "llama", ...')
    try:
        return CONFIG_MAPPING[model_type]
    except KeyError:
        pass
    if "auto_map" in entries:
        raise ValueError(
            f"{where}: model type {model_type!r} is defined by Python code that comes with the "
            "model (auto_map), which is not run; use a model of a type that transformers knows"
        )
    near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()))
    raise ValueError(
        f"{where}: unknown model_type {model_type!r}; close matches: {', '.join(near) or 'none'} "
        "(a newer transformers may know it)"
    )


def _make_config(config_class: Any, entries: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        config = config_class.from_dict(copy.deepcopy(dict(entries)))
    except Exception as error:  # config validation raises classes of its own
        raise ValueError(f"invalid config entries: {first_line(error)}") from error
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [x for x in rope.values() if isinstance(x, dict)] or [rope]:
        check_rope_type(parameters.get("rope_type"), config.model_type)
    return config


def model_from_config(
    config: PreTrainedConfig, *, dtype: torch.dtype | None, attention: str | None = None
) -> PreTrainedModel:
    """A `*ForCausalLM` with random weights on the current default device.

    Raises ValueError, in one line, for a config that no model can be built from.
    """
    from transformers import AutoModelForCausalLM

    _keep_bars_out_of_logs()  # also those of an export
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if attention is not None:
        options["attn_implementation"] = attention
    config = copy.deepcopy(config)
    quantization = config.__dict__.pop("quantization_config", None)
    try:
        model = AutoModelForCausalLM.from_config(config, **options)
    except Exception as error:  # layers raise whatever the entry at fault leads to
        raise ValueError(
            f"cannot build a causal LM of model type {config.model_type!r}: {first_line(error)}"
        ) from error
    if quantization is not None:
        model.config.quantization_config = quantization
    return model


def classifier_from_config(
    config: PreTrainedConfig, num_labels: int, *, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The `*ForSequenceClassification` of a causal LM's config, with random weights.

    Raises ValueError if transformers has none for the model type.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(config)
    config.num_labels = num_labels
    try:
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    except Exception as error:
        raise ValueError(
            f"transformers cannot hold a reward model of type {config.model_type!r}: "
            f"{first_line(error)}"
        ) from error


def check_checkpoint(
    path: str | os.PathLike, skeleton: PreTrainedModel
) -> tuple[Path, torch.dtype]:
    """The folder that holds the weights of `path`, and the dtype that most are stored in.

    Reads headers only. skeleton: the model that will hold the weights, on the meta device. Raises
    ValueError for files that are missing, damaged, quantized, or do not fit the skeleton.
    """
    try:
        local = local_path(path)
        folder = fetch_checkpoint(str(path)) if local is None else local
        files = find_weights(folder)
    except (OSError, ValueError) as error:
        problem = f"cannot load weights from {str(path)!r}: {first_line(error)}"
        raise ValueError(f"{problem}; pass --random-init to start from random weights") from error
    config = skeleton.config
    return folder, check_weights(str(path), files, skeleton, tie=bool(config.tie_word_embeddings))


def check_unquantized(path: str | os.PathLike, config: PreTrainedConfig) -> None:
    """Raise ValueError if the config says that the weights at `path` are quantized."""
    for name in ("quantization_config", "compression_config"):
        entry = getattr(config, name, None)
        if entry:
            entries = entry if isinstance(entry, dict) else vars(entry)
            method = entries.get("quant_method") or entries.get("quantization_method") or "unknown"
            raise ValueError(
                f"checkpoint {str(path)!r} is quantized ({name}: {method}), and quantized weights "
                "cannot be trained; use the original model in bf16, fp16 or fp32"
            )


def _keep_bars_out_of_logs() -> None:
    """Switch off transformers' progress bars unless stderr is a terminal, which can redraw them."""
    from transformers.utils import logging

    if sys.stderr is None or not sys.stderr.isatty():
        logging.disable_progress_bar()


def model_from_checkpoint(
    folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """The `*ForCausalLM` saved in `folder`. Raises ValueError if its weights cannot be read."""
    from transformers import AutoModelForCausalLM

    _keep_bars_out_of_logs()
    try:
        model, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # of safetensors, torch or transformers
        raise ValueError(f"cannot load weights from {folder}: {first_line(error)}") from error
    broken = sorted(info["missing_keys"]) + sorted(map(str, info.get("mismatched_keys", ())))
    if broken:
        raise ValueError(
            f"checkpoint {folder} lacks {len(broken)} weights of {type(model).__name__}, "
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
        local = local_path(path)
        if local is not None and names_generic_tokenizer(local):
            return PreTrainedTokenizerFast.from_pretrained(local, local_files_only=True)
        return _as_in_file(auto_tokenizer(path), path)
    except Exception as error:  # the libraries raise plain Exception for an unusable file
        raise ValueError(
            f"no tokenizer at {str(path)!r}: {_reason(path, error)}; pass a folder with a "
            "tokenizer.json, a hub name, or --tokenizer bytes or bpe:SIZE, which need neither"
        ) from error


def _reason(path: str | os.PathLike, error: Exception) -> str:
    """Why there is no tokenizer at `path`, where transformers does not say it well."""
    folder = Path(path).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return f"the folder has no {' or '.join(_TOKENIZER_FILES)}"
    if not isinstance(error, (ValueError, OSError)) and (folder / "tokenizer.json").is_file():
        return f"{folder / 'tokenizer.json'} is not a tokenizer ({first_line(error)})"
    return first_line(error)


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
    """The tokenizer that transformers' AutoTokenizer loads from `path`, without running its code.

    Raises whatever transformers raises.
    """
    from transformers import AutoTokenizer

    local = local_path(path)
    return AutoTokenizer.from_pretrained(
        path if local is None else local,
        trust_remote_code=False,
        local_files_only=local is not None or is_offline(str(path)),
    )
