"""Settings of Megatron that the plug-in does not run, each with what to change.

One table for what the model's configuration says, checked when a layer is built; one for what only
the command line says, checked by `check_arguments`. A setting that a version does not know is off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_Refusal = tuple[Callable[[Any], Any], str]


def _of(settings: Any, name: str, default: Any = None) -> Any:
    return getattr(settings, name, default)


def _is_set(name: str, *off: Any) -> Callable[[Any], bool]:
    """Whether a setting is none of None, False and `off`."""
    return lambda settings: _of(settings, name) not in (None, False, *off)


def _gathers_tokens(config: Any) -> bool:
    experts = _of(config, "num_moe_experts") or _of(config, "num_experts")
    return bool(experts and _of(config, "moe_token_dispatcher_type") == "allgather")


def _fused_yarn(config: Any) -> bool:
    mla = _of(config, "multi_latent_attention", False)
    return bool(mla and _of(config, "rope_type") == "yarn" and _of(config, "apply_rope_fusion"))


_OF_CONFIG: tuple[_Refusal, ...] = (
    (
        lambda config: not _of(config, "calculate_per_token_loss", False),
        "ranks have different numbers of tokens, so a mean of means is wrong: add "
        "--calculate-per-token-loss",
    ),
    (
        lambda config: _of(config, "context_parallel_size", 1) > 1,
        "sequences are split over data parallel ranks: set --context-parallel-size 1",
    ),
    (_is_set("attention_dropout", 0, 0.0), "no dropout in attention: set --attention-dropout 0"),
    (_is_set("window_size"), "no sliding windows: leave out --window-size"),
    (_is_set("softmax_type", "vanilla"), "no attention sinks: set --softmax-type vanilla"),
    (_is_set("mtp_num_layers", 0), "no multi-token prediction: leave out --mtp-num-layers"),
    (
        _is_set("experimental_attention_variant"),
        "no gated delta net or sparse attention: leave out --experimental-attention-variant",
    ),
    (
        _gathers_tokens,
        "ranks have different numbers of tokens: set --moe-token-dispatcher-type alltoall",
    ),
    (_fused_yarn, "fused RoPE of MLA with YaRN counts positions itself: add --no-rope-fusion"),
    (_is_set("enable_cuda_graph"), "shapes change: leave out --enable-cuda-graph"),
    (_is_set("external_cuda_graph"), "shapes change: leave out --external-cuda-graph"),
    (_is_set("cuda_graph_impl", "none"), "shapes change: set --cuda-graph-impl none"),
    (
        _is_set("overlap_moe_expert_parallel_comm"),
        "rings and experts would meet in different orders: leave out "
        "--overlap-moe-expert-parallel-comm",
    ),
)

_OF_ARGUMENTS: tuple[_Refusal, ...] = (
    (
        lambda args: _of(_of(args, "attention_backend"), "name", "") == "local",
        "it overwrites the core attention of the spec: leave out --attention-backend local",
    ),
    (_is_set("sft"), "evaluation would average over microbatches: leave out --sft"),
    (
        lambda args: _of(args, "dataloader_type") != "external",
        "the iterator gives whole steps: set --dataloader-type external",
    ),
    (_is_set("use_megatron_fsdp"), "Megatron-FSDP is untested: leave out --use-megatron-fsdp"),
    (_is_set("use_torch_fsdp2"), "FSDP2 gathers inside forward: leave out --use-torch-fsdp2"),
    (
        lambda args: set("MG") & set(_of(args, "hybrid_layer_pattern") or ""),
        "no Mamba or gated delta net layers: give a --hybrid-layer-pattern without M and G",
    ),
    (
        lambda args: set("MG") & set(_of(args, "hybrid_override_pattern") or ""),
        "no Mamba or gated delta net layers: give a --hybrid-override-pattern without M and G",
    ),
)


def check_config(config: Any) -> None:
    """Raise ValueError with all that a TransformerConfig has to change."""
    _refuse(config, _OF_CONFIG)


def check_arguments(args: Any) -> None:
    """Raise ValueError with all that Megatron's arguments have to change; call it at start."""
    _refuse(args, (*_OF_ARGUMENTS, *_OF_CONFIG))


def _refuse(settings: Any, table: tuple[_Refusal, ...]) -> None:
    if problems := [text for refused, text in table if refused(settings)]:
        raise ValueError("hdp.megatron: " + "; ".join(problems))
