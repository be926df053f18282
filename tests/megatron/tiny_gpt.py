"""A tiny GPT on megatron-core, the same weights cut for TP, PP and EP, and its reference.

The reference is plain Megatron on one rank: its own attention, one sequence per microbatch. Import
this module only after `cuda_shim.install()`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

import hdp.megatron
from hdp.data.pack import Sample

VOCAB, HEADS, GROUPS, HIDDEN, FFN, EXPERTS = 128, 8, 4, 64, 96, 4
LENGTHS = [150, 97, 61, 40, 33, 21, 17, 11, 9, 7, 5, 3, 2, 1]


# aux loss off: it depends on how a batch is cut into microbatches
MOE: dict[str, Any] = {
    **{"num_moe_experts": EXPERTS, "moe_router_topk": 2, "moe_ffn_hidden_size": FFN},
    **{"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0},
}
MLA: dict[str, Any] = {
    **{"q_lora_rank": 32, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 8},
    **{"v_head_dim": 8, "multi_latent_attention": True, "num_query_groups": HEADS},
}


def start(tp: int = 1, pp: int = 1, vpp: int | None = None, ep: int = 1) -> None:
    """Megatron's groups over the default group."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
    )
    model_parallel_cuda_manual_seed(1)


def config(tp: int = 1, pp: int = 1, **more: Any) -> TransformerConfig:
    options: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "ffn_hidden_size": FFN,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "calculate_per_token_loss": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "pipeline_dtype": torch.float32,
        "variable_seq_lengths": pp > 1,
        "moe_token_dispatcher_type": "alltoall",
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    kind = MLATransformerConfig if more.get("multi_latent_attention") else TransformerConfig
    return kind(**{**options, **more})


class SequenceParallelNorm(torch.nn.RMSNorm):
    """Megatron's torch norm refuses sequence parallelism; apex and TE are not on a CPU."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class DenseAttention(torch.nn.Module):
    """Megatron's local attention does not take MLA's arguments."""

    def __init__(self, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query, key, value, *args, **kwargs):
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def build(cfg: TransformerConfig, *, hdp_attention: bool, vp_stage: int | None = None) -> GPTModel:
    spec = get_gpt_layer_local_spec(
        num_experts=cfg.num_moe_experts,
        moe_grouped_gemm=False,
        multi_latent_attention=cfg.multi_latent_attention,
        normalization="RMSNorm",
    )
    if hdp_attention:
        spec = hdp.megatron.use_hdp_attention(spec)
    elif cfg.multi_latent_attention:
        spec.submodules.self_attention.submodules.core_attention = DenseAttention
    if cfg.sequence_parallel:
        spec.submodules.input_layernorm = SequenceParallelNorm
        spec.submodules.pre_mlp_layernorm = SequenceParallelNorm
        count = cfg.num_layers // cfg.pipeline_model_parallel_size
        spec = TransformerBlockSubmodules(
            layer_specs=[spec] * count, layer_norm=SequenceParallelNorm
        )
    stage = {} if vp_stage is None else {"ignore_virtual": False, "vp_stage": vp_stage}
    return GPTModel(
        config=cfg,
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        max_sequence_length=4096,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        vp_stage=vp_stage,
    )


def wrap_ddp(cfg: TransformerConfig, chunks: list[GPTModel], **ddp: Any) -> list[Any]:
    wrapped = [
        DistributedDataParallel(cfg, DistributedDataParallelConfig(**ddp), chunk)
        for chunk in chunks
    ]
    cfg.finalize_model_grads_func = finalize_model_grads
    no_sync = [one.no_sync for one in wrapped]
    cfg.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def optimizer_of(cfg: TransformerConfig, wrapped: list[Any], **more: Any) -> Any:
    options = OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.0, adam_eps=1e-2, clip_grad=1.0, **more
    )
    return get_megatron_optimizer(options, wrapped)


def samples(lengths: list[int]) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(input_ids=rng.integers(0, VOCAB, n), loss_mask=rng.random(n) < 0.8) for n in lengths
    ]


def zero_grads(wrapped: list[Any], optimizer: Any) -> None:
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    if optimizer is not None:
        optimizer.zero_grad()  # its .grad is the buffer: left there, gradients count twice


def run(function: Any, step: Any, feed: Any, wrapped: list[Any], count: int) -> list[Any]:
    """One step of Megatron's schedule."""
    return function(
        forward_step_func=step,
        data_iterator=feed,
        model=wrapped,
        num_microbatches=count,
        seq_length=64,
        micro_batch_size=1,
        forward_only=False,
    )


def mean_loss(report: list[Any], group: Any = None) -> float:
    total = torch.stack([one["lm loss"].double() for one in report]).sum(0)
    if group is not None:
        dist.all_reduce(total, group=group)
    return float(total[0] / total[1])


# ---- which part of a whole tensor a rank has ----


def full_name(name: str, model: GPTModel) -> str:
    """A parameter's name here to its name in the model on one rank."""
    parts = name.split(".")
    if "layers" in parts:
        i = parts.index("layers") + 1
        parts[i] = str(model.decoder.layers[int(parts[i])].layer_number - 1)
    if "local_experts" in parts:
        i = parts.index("local_experts") + 1
        local = EXPERTS // parallel_state.get_expert_model_parallel_world_size()
        first = local * parallel_state.get_expert_model_parallel_rank()
        parts[i] = str(int(parts[i]) + first)
    return ".".join(parts)


def cut(name: str, full: torch.Tensor) -> torch.Tensor:
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    if size == 1 or "local_experts" in name:  # experts are cut by EP alone here
        return full
    if "linear_fc1" in name:  # gate and up are cut one by one
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    if "linear_proj" in name or "linear_fc2" in name:
        return full.chunk(size, dim=1)[rank]
    if any(part in name for part in ("linear_qkv", "word_embeddings", "output_layer")):
        return full.chunk(size)[rank]
    return full


def load(model: GPTModel, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(cut(name, weights[full_name(name, model)]))


# ---- the reference ----


def plain_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    sample = next(iterator)
    length = len(sample.input_ids)
    labels = torch.from_numpy(sample.labels(0, length))
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    output = model(
        torch.from_numpy(sample.input_ids)[None],
        torch.arange(length)[None],
        mask,
        labels=labels.clamp(min=0)[None],
    )
    return output, partial(hdp.megatron.loss_func, (labels >= 0).float())


def reference(steps: int, **more: Any) -> dict[str, Any]:
    """Weights, first gradients, losses and the weights after `steps` optimizer steps."""
    start()
    cfg = config(**more)
    torch.manual_seed(7)
    model = build(cfg, hdp_attention=False)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    data = samples(LENGTHS)
    wrapped = wrap_ddp(cfg, [model])
    optimizer = optimizer_of(cfg, wrapped) if steps else None
    losses, grads = [], {}
    for _ in range(max(1, steps)):
        zero_grads(wrapped, optimizer)
        report = run(get_forward_backward_func(), plain_step, iter(data), wrapped, len(data))
        losses.append(mean_loss(report))
        grads = grads or {n: p.main_grad.detach().clone() for n, p in model.named_parameters()}
        if optimizer is not None:
            optimizer.step()
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"weights": weights, "grads": grads, "losses": losses, "after": after}
