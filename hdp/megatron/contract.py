"""What the plug-in relies on in megatron-core: the only file that imports it.

Megatron's interfaces change from version to version. Everything that the plug-in calls, subclasses
or is called with stands in `RELIED_ON`; `check_contract` compares it with the installed version
when `hdp.megatron` is imported, so a change is an error that names what changed, and not a wrong
number in some layer. Run with megatron-core 0.16.1; versions up to 0.19 have the same table.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from .microbatch import Rows

_BATCH = ("forward_step_func", "data_iterator", "model", "num_microbatches", "forward_only")
# "module:object" of megatron.core -> its parameters, or the fields of a dataclass
RELIED_ON: dict[str, tuple[str, ...]] = {
    "packed_seq_params:PackedSeqParams": (
        *("qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"),
    ),
    # HDPAttention is built and called as this one is
    "transformer.dot_product_attention:DotProductAttention.__init__": (
        *("config", "layer_number", "attn_mask_type", "attention_type", "softmax_scale"),
        *("cp_comm_type", "pg_collection"),
    ),
    "transformer.dot_product_attention:DotProductAttention.forward": (
        *("query", "key", "value", "attention_mask", "attn_mask_type", "attention_bias"),
        "packed_seq_params",
    ),
    "transformer.attention:SelfAttentionSubmodules": ("core_attention",),
    "transformer.multi_latent_attention:MLASelfAttentionSubmodules": ("core_attention",),
    "transformer.spec_utils:ModuleSpec": ("module", "submodules"),
    "transformer.transformer_block:TransformerBlockSubmodules": ("layer_specs",),
    "transformer.transformer_config:TransformerConfig": (
        *("attention_dropout", "calculate_per_token_loss", "context_parallel_size"),
        *("variable_seq_lengths", "window_size", "mtp_num_layers", "apply_rope_fusion"),
    ),
    # SpanRotary stands in for these
    "models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.forward": ("max_seq_len",),
    "models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.get_emb": (
        *("max_seq_len", "offset"),
    ),
    "models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.get_rotary_seq_len": (
        *("inference_context", "transformer", "transformer_input", "transformer_config"),
        "packed_seq_params",
    ),
    "models.common.embeddings.yarn_rotary_pos_embedding:YarnRotaryEmbedding.get_emb": (
        *("max_seq_len", "offset"),
    ),
    "pipeline_parallel.schedules:get_forward_backward_func": (),
    "pipeline_parallel.schedules:forward_backward_no_pipelining": _BATCH,
    "pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving": _BATCH,
    "pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving": _BATCH,
    "distributed:DistributedDataParallel.start_param_sync": ("force_sync",),
    "distributed:DistributedDataParallelConfig": ("overlap_param_gather", "overlap_grad_reduce"),
    "models.gpt.gpt_layer_specs:get_gpt_decoder_block_spec": (
        *("config", "use_transformer_engine", "normalization", "vp_stage"),
    ),
    "parallel_state:get_data_parallel_group": ("with_context_parallel",),
    "parallel_state:get_data_parallel_rank": ("with_context_parallel",),
    "parallel_state:get_data_parallel_world_size": ("with_context_parallel",),
    "parallel_state:get_tensor_model_parallel_world_size": (),
    "parallel_state:get_pipeline_model_parallel_world_size": (),
    "parallel_state:get_virtual_pipeline_model_parallel_world_size": (),
    "parallel_state:get_expert_model_parallel_world_size": (),
    "utils:get_model_config": ("model",),
}


def check_contract(relied_on: Mapping[str, tuple[str, ...]] = RELIED_ON) -> None:
    """Raise ImportError naming what the installed megatron-core lacks; nothing if there is none."""
    try:
        core = import_module("megatron.core")
    except ImportError:
        return  # the functions of the plug-in say so when they are called
    if changes := list(_changes(relied_on)):
        raise ImportError(
            f"megatron-core {core.__version__} changed what hdp.megatron relies on: "
            f"{'; '.join(changes)}. Install megatron-core 0.16 to 0.19, or a newer hdp"
        )


def _changes(relied_on: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    for where, names in relied_on.items():
        try:
            found = core_object(where)
        except (ImportError, AttributeError) as error:
            yield f"{where} is gone ({error})"
            continue
        if dataclasses.is_dataclass(found):
            has = {field.name for field in dataclasses.fields(found)}
        else:
            has = set(inspect.signature(found).parameters)
        if missing := [name for name in names if name not in has]:
            yield f"{where} has no {', '.join(missing)}"


def core_object(where: str) -> Any:
    """The object "module:name" of megatron.core, "" for the package itself."""
    module, _, path = where.partition(":")
    found: Any = import_module(f"megatron.core.{module}")
    for name in path.split("."):
        found = getattr(found, name)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """This rank's place in Megatron's grid. An HDP rank is a whole replica: tp_size * pp_size."""

    hdp_group: dist.ProcessGroup
    hdp_rank: int
    hdp_size: int
    tp_size: int
    pp_size: int
    vpp_size: int  # chunks of the model on each stage
    ep_size: int

    @classmethod
    def current(cls) -> Ranks:
        """Read from megatron.core.parallel_state, which must be initialized."""
        state = import_module("megatron.core.parallel_state")
        return cls(
            hdp_group=state.get_data_parallel_group(with_context_parallel=True),
            hdp_rank=state.get_data_parallel_rank(with_context_parallel=True),
            hdp_size=state.get_data_parallel_world_size(with_context_parallel=True),
            tp_size=state.get_tensor_model_parallel_world_size(),
            pp_size=state.get_pipeline_model_parallel_world_size(),
            vpp_size=state.get_virtual_pipeline_model_parallel_world_size() or 1,
            ep_size=state.get_expert_model_parallel_world_size(),
        )


@cache
def packed_seq_params_type() -> type:
    """Megatron's PackedSeqParams with one more field, which travels through recompute and PP."""
    base = core_object("packed_seq_params:PackedSeqParams")

    @dataclasses.dataclass
    class HDPPackedSeqParams(base):  # type: ignore[misc, valid-type]
        rows: Rows | None = None

    return HDPPackedSeqParams
