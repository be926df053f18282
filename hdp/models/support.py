"""Which Hugging Face models ring attention computes exactly; all others are rejected.

There are three lines of defense, because a model that slips through trains and is silently wrong:

1. `SUPPORTED_MODELS` lists the model types whose values and gradients a test compares with the
   plain model (test_equals_plain_model). Any other type is rejected: an unknown layer may mix
   tokens in a way that no attribute reveals, and a head may scale its logits.
2. Every layer is checked for features that the config of a supported type can turn on: sliding
   window, sinks, soft-capping, non-causal attention, attention dropout, mixture of experts, and
   RoPE whose frequencies depend on the longest sequence of a batch.
3. At run time, `causal_lm.hdp_attention` rejects keywords that request such a feature.

Messages name the command-line flag, `--config-overrides`; in Python it is an argument of
`build_model` and `load_model`.

This file inspects models through their attributes and does not import transformers. At the end it
has checks of config entries and saved tokenizers, and a shortener for transformers' errors.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
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
        yield "type", f"{prefix}: no list of decoder layers named 'layers'; {_use_supported()}"
        return
    head = model.get_output_embeddings()
    if head is None:
        yield "head", "the model has no LM head; load it as a causal LM"
    yield from _head_problems(config)
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
    dropout = getattr(module, "attention_dropout", 0.0)
    dropout = getattr(dropout, "p", dropout)  # some models keep a Dropout module
    if isinstance(dropout, float) and dropout > 0:
        yield (
            "dropout",
            (
                f"{where}: attention dropout of {dropout}; ranks of a ring share no random numbers:"
                " pass --config-overrides '{\"attention_dropout\": 0.0}'"
            ),
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


def _rope_problems(config: Any, where: str) -> Iterator[Problem]:
    """RoPE whose frequencies depend on the longest position of a batch.

    That position differs between the ranks of a ring, and between the microbatches a sequence may
    be packed into, so the result would depend on the plan.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    per_layer_type = [entry for entry in rope.values() if isinstance(entry, dict)]
    for parameters in per_layer_type or [rope]:
        kind = str(parameters.get("rope_type", parameters.get("type", "default")))
        if kind == "longrope" or "dynamic" in kind:
            yield (
                "rope",
                (
                    f"{where}: RoPE type {kind!r} depends on the longest sequence of a batch; use "
                    "'default', 'linear', 'llama3' or 'yarn' "
                    '(--config-overrides \'{"rope_parameters": {"rope_type": "yarn", ...}}\')'
                ),
            )


def _use_supported() -> str:
    return f"supported model types: {', '.join(sorted(SUPPORTED_MODELS))}"


# ---- configs, tokenizers, messages ----


def check_entries(names: Iterable[str], known: Iterable[str], model_type: str) -> None:
    """Raise ValueError for the first of `names` that is not a `known` entry of the config.

    transformers silently drops such entries, so a misspelled one would have no effect.
    """
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, cutoff=0.4)
            raise ValueError(
                f"--config-overrides: configs of model type {model_type!r} have no entry {name!r}; "
                f"close matches: {', '.join(near) or 'none'}"
            )


def names_generic_tokenizer(folder: Path) -> bool:
    """Whether the tokenizer in `folder` is its tokenizer.json alone, not a model-specific class."""
    path = folder / "tokenizer_config.json"
    if not path.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    name = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    return name in ("PreTrainedTokenizerFast", "TokenizersBackend")


def first_line(error: BaseException) -> str:
    """The first line of the error's message, plus the second if the first ends with a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])
