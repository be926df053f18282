"""Which Hugging Face models ring attention computes exactly; all others are rejected.

There are three lines of defense, because a model that slips through trains and is silently wrong:

1. `SUPPORTED_MODELS` lists the model types whose values and gradients a test compares with the
   plain model (test_equals_plain_model). Any other type is rejected: an unknown layer may mix
   tokens in a way that no attribute reveals, and a head may scale its logits.
2. Every layer is checked for features that the config of a supported type can turn on: sliding
   window, sinks, soft-capping, non-causal attention, dropout and other randomness of any kind,
   mixture of experts, and RoPE whose frequencies depend on the longest sequence of a batch.
3. At run time, `causal_lm.hdp_attention` rejects keywords that request such a feature.

Messages name the command-line flag, `--config-overrides`; in Python it is an argument of
`build_model` and `load_model`.

This file inspects models through their attributes and does not import transformers. At the end it
has a check of saved tokenizers, and a shortener for transformers' errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

SUPPORTED_MODELS = frozenset(
    {
        "arcee",
        "ernie4_5",
        "glm4",
        "gpt_neox",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
        "starcoder2",
    }
)

_EXPERTS = ("Moe", "MoE", "Experts", "Router")

# Config entries that make a layer random: dropout, layerdrop, stochastic depth, router noise.
_RANDOM_ENTRY = re.compile(
    r"dropout|pdrop|layer_?drop|drop_path|drop_rate|stochastic_depth|jitter|router_noise|noise_std"
)
# What huggingface_hub's strict configs and torch's allocator put before the message proper.
_WRAPPED = re.compile(
    r"(Class v|V)alidation error for (field|validator) '\w+': \w+: "
    r"|\[enforce fail at [^]]*\] .*?\. "
)
_NO_YARN = ("phi3",)  # transformers reads its "yarn" as the former name of longrope
_UNUSED_ENTRY = re.compile(r"classifier|summary|score|_head_")  # heads of other tasks

LFS_POINTER = b"version https://git-lfs"  # start of a file that stands for one not yet fetched

Problem = tuple[str, str]  # (kind of feature, message: layer, feature, what to do)


def check_supported(model: Any) -> None:
    """Raise ValueError if ring attention would change what `model`, a `*ForCausalLM`, computes.

    The message has one line per feature: the first layer that has it, the feature, the remedy.
    """
    problems: dict[str, str] = {}
    for kind, text in _problems(model):
        problems.setdefault(kind, text)
    if problems:
        listed = "".join(f"\n  * {text}" for text in problems.values())
        raise ValueError(f"{type(model).__name__} cannot run under ring attention:{listed}")


def _problems(model: Any) -> Iterator[Problem]:
    config = model.config
    prefix = getattr(model, "base_model_prefix", "model")
    if getattr(config, "is_encoder_decoder", False):
        yield "type", f"{prefix}: encoder-decoder model; use a decoder-only one"
        return
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        problem = f"{prefix}: no list of decoder layers named 'layers'"
        yield "type", f"{problem} (model type {config.model_type!r}); {_use_supported()}"
        return
    head = model.get_output_embeddings()
    if head is None:
        yield "head", "the model has no LM head; load it as a causal LM"
    yield from _head_problems(config)
    yield from _shape_problems(config, prefix)
    yield from _random_problems(model, prefix)
    yield from _rope_problems(config, f"{prefix}.rotary_emb")
    for index, layer in enumerate(layers):
        yield from _layer_problems(layer, config, f"{prefix}.layers.{index}", index)


def _layer_problems(layer: nn.Module, config: Any, name: str, index: int) -> Iterator[Problem]:
    attentions = {
        f"{name}.{child}": module
        for child, module in layer.named_modules()
        if type(module).__name__.endswith("Attention")
    }
    if not attentions:
        yield "unknown", f"{name} has no attention module; {_use_supported()}"
    for where, module in attentions.items():
        if config.model_type not in SUPPORTED_MODELS:
            kind = type(module).__name__
            yield (
                "unknown",
                (
                    f"{where}: unknown attention class {kind} (model type {config.model_type!r}); "
                    f"{_use_supported()}"
                ),
            )
        yield from _attention_problems(module, config, where, index)
    for child, module in layer.named_modules():
        if any(part in type(module).__name__ for part in _EXPERTS):
            yield "experts", f"{name}.{child}: mixture of experts; use a dense model"


def _attention_problems(
    module: nn.Module, config: Any, where: str, index: int
) -> Iterator[Problem]:
    if not getattr(module, "is_causal", True) or not getattr(config, "is_causal", True):
        yield "causal", f"{where}: non-causal attention; ring attention is causal only"
    window = _active_window(module, config, index)
    if window is not None:
        off = '"use_sliding_window": false'
        if not hasattr(config, "use_sliding_window"):
            off = '"sliding_window": null'
        yield (
            "window",
            (
                f"{where}: sliding window of {window} tokens; if no sequence is longer, it has no "
                f"effect: pass --config-overrides '{{{off}}}'"
            ),
        )
    if any(getattr(module, sink, None) is not None for sink in ("sinks", "sink")):
        yield "sinks", f"{where}: attention sinks; use a model without them"
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None:
        yield (
            "softcap",
            (f"{where}: soft-capping of attention scores at {softcap}; use a model without it"),
        )


def _active_window(module: nn.Module, config: Any, index: int) -> int | None:
    """Tokens of this layer's sliding (or chunked) window, or None."""
    kind = (getattr(config, "layer_types", None) or {index: "?"})[index]
    if kind == "chunked_attention":
        return getattr(config, "attention_chunk_size", None)
    if kind == "full_attention":
        return None
    return getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)


def _head_problems(config: Any) -> Iterator[Problem]:
    """Heads that transform their logits; CausalLM only computes hidden @ weight.T + bias."""
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        value = getattr(config, name, None)
        if value is not None and value != 1:
            yield name, f"lm_head: {name}={value}; use a model with a plain LM head"


def _shape_problems(config: Any, prefix: str) -> Iterator[Problem]:
    heads, kv_heads = (
        getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")
    )
    if heads and kv_heads and heads % kv_heads:
        yield (
            "heads",
            f"{prefix}: num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={kv_heads}; correct the config",
        )


def _random_problems(model: Any, prefix: str) -> Iterator[Problem]:
    """Dropout and its relatives: what a token computes would depend on where it is packed."""
    entries = {
        name: value
        for name, value in vars(model.config).items()
        if _RANDOM_ENTRY.search(name)
        and not _UNUSED_ENTRY.search(name)
        and isinstance(value, (int, float))
        and value > 0
    }
    if entries:
        listed = ", ".join(f"{name.replace('_', ' ')} of {x}" for name, x in entries.items())
        off = json.dumps(dict.fromkeys(entries, 0.0))
        yield (
            "dropout",
            f"{prefix}: {listed}; ranks share no random numbers, so results would depend on the "
            f"plan: pass --config-overrides '{off}'",
        )
        return
    for name, module in model.named_modules():
        rate = getattr(module, "drop_prob", None)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rate = module.p
        if isinstance(rate, (int, float)) and rate > 0:
            yield "dropout", f"{name}: dropout of {rate} that no config entry turns off"


def _rope_problems(config: Any, where: str) -> Iterator[Problem]:
    """RoPE whose frequencies depend on the longest position of a batch.

    That position differs between the ranks of a ring, and between the microbatches a sequence may
    be packed into, so the result would depend on the plan.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    per_layer_type = {name: entry for name, entry in rope.items() if isinstance(entry, dict)}
    for name, parameters in (per_layer_type or {"": rope}).items():
        kind = str(parameters.get("rope_type", parameters.get("type", "default")))
        if kind == "longrope" or "dynamic" in kind:
            kinds: list[dict[str, Any]] = [{"rope_type": "default"}]
            if config.model_type not in _NO_YARN:
                kinds.insert(0, {"rope_type": "yarn", **_yarn_of(config, parameters)})
            remedies = [
                f"{wanted['rope_type']!r} (--config-overrides "
                f"'{json.dumps({'rope_parameters': {name: wanted} if name else wanted})}')"
                for wanted in kinds
            ]
            yield (
                "rope",
                f"{where}: RoPE type {kind!r} depends on the longest sequence of a batch; use "
                f"{', or '.join(remedies)}, which does not scale",
            )


def _yarn_of(config: Any, parameters: Any) -> dict[str, Any]:
    """Parameters of YaRN that reach as far as the model's own scaling."""
    longest = getattr(config, "max_position_embeddings", None)
    original = parameters.get("original_max_position_embeddings") or longest
    factor = parameters.get("factor")
    if factor is None and longest and original:
        factor = longest / original
    yarn = {"factor": float(factor or 1.0), "original_max_position_embeddings": original}
    return {name: value for name, value in yarn.items() if value is not None}


def _use_supported() -> str:
    return f"supported model types: {', '.join(sorted(SUPPORTED_MODELS))}"


# ---- tokenizers, messages ----


def names_generic_tokenizer(folder: Path) -> bool:
    """Whether the tokenizer in `folder` is its tokenizer.json alone, not a model-specific class.

    Raises ValueError, with the file, if one of its files is damaged.
    """
    config, tokenizer = (
        _read_object(folder / name) for name in ("tokenizer_config.json", "tokenizer.json")
    )
    if config is None or tokenizer is None:
        return False
    return config.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no file. Raises ValueError if it is damaged."""
    if not path.is_file():
        return None
    text = path.read_bytes()
    if text.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer; run: git lfs pull")
    try:
        value = json.loads(text)
        problem = None if isinstance(value, dict) else "not an object"
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        raise ValueError(f"{path} is damaged ({problem}); download or copy it again")
    return value


def first_line(error: BaseException) -> str:
    """The first line of the error's message, plus the second if the first ends with a colon.

    The error's type is part of it where the message is only a value, as in KeyError.
    """
    lines = str(error).strip().splitlines() or [""]
    text = " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])
    text, is_plain = _WRAPPED.sub("", text), bool(_WRAPPED.match(text))
    if is_plain:
        return text
    if isinstance(error, (ValueError, OSError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
