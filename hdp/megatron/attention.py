"""The core attention of the layer spec: ring attention over the layout in PackedSeqParams.

Megatron hands (tokens, heads, head_dim) queries, keys and values of all rows of the microbatch and
takes (tokens, heads * head_dim). The layout says which rows are shards of a sequence on a ring, and
which are whole local sequences, and the communicator reaches every rank of the DP x CP group.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from hdp.attention.ring import ring_attn_varlen_func

from .contract import core_object
from .microbatch import Rows
from .refusals import check_config


class HDPAttention(torch.nn.Module):
    """`core_attention` of a layer spec. It has no parameters, so checkpoints do not change.

    Raises ValueError for a configuration that it does not compute (refusals.py).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        softmax_scale: float | None = None,
        **_: Any,  # groups and transport of Megatron's context parallelism, which is off
    ) -> None:
        super().__init__()
        check_config(config)
        if attention_type != "self" or "causal" not in attn_mask_type.name:
            raise ValueError(
                f"layer {layer_number} has {attention_type} attention with mask "
                f"{attn_mask_type.name}; hdp.megatron is for causal self-attention"
            )
        self.config, self.layer_number, self.softmax_scale = config, layer_number, softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **others: Any,
    ) -> Tensor:
        """(tokens, heads * head_dim). Raises ValueError for a batch that get_batch did not make."""
        rows = getattr(packed_seq_params, "rows", None)
        if not isinstance(rows, Rows):
            raise ValueError(
                "HDPAttention needs the packed_seq_params of hdp.megatron.get_batch; use "
                "hdp.megatron.forward_step, or pass them to the model"
            )
        given = {"attention_bias": attention_bias, **others}
        if used := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"HDPAttention does not take {', '.join(used)}; leave it out")
        out = ring_attn_varlen_func(
            query, key, value, rows.layout, comm=rows.comm, softmax_scale=self.softmax_scale
        )
        return out.reshape(out.shape[0], -1)


def use_hdp_attention(spec: Any) -> Any:
    """A copy of a layer's, block's or model's spec in which each self-attention is ours.

    Raises ValueError if there is none in it.
    """
    spec = copy.deepcopy(spec)
    if not _replace_core_attention(spec):
        raise ValueError(
            f"{type(spec).__name__} has no self_attention with a core_attention; pass the spec of "
            "a transformer layer, or of a block or model that has some"
        )
    return spec


def _replace_core_attention(spec: Any) -> int:
    """Put HDPAttention wherever a spec has a core attention; returns in how many places."""
    if isinstance(spec, (list, tuple)):
        return sum(map(_replace_core_attention, spec))
    if not dataclasses.is_dataclass(spec) or isinstance(spec, type):
        return 0
    count = 0
    for field in dataclasses.fields(spec):
        if field.name == "core_attention":
            setattr(spec, field.name, HDPAttention)
            count += 1
        elif field.name != "cross_attention":
            count += _replace_core_attention(getattr(spec, field.name))
    return count


def layer_spec(config: Any, vp_stage: int | None = None, **_: Any) -> Any:
    """A GPT model's stock block with our core attention, for `--spec hdp.megatron layer_spec`.

    Layers are Transformer Engine's where config.transformer_impl says so. Raises ValueError where
    the configuration is refused.
    """
    config = getattr(config, "transformer", config)  # 0.18: a container of it
    check_config(config)
    block_spec = core_object("models.gpt.gpt_layer_specs:get_gpt_decoder_block_spec")
    spec = block_spec(
        config,
        use_transformer_engine=getattr(config, "transformer_impl", "local") == "transformer_engine",
        normalization=config.normalization,
        vp_stage=vp_stage,
    )
    return use_hdp_attention(spec)


def check_model(model: torch.nn.Module) -> None:
    """Raise ValueError if a built model has a core attention that is not ours, or layers that mix
    tokens in another way."""
    for name, module in model.named_modules():
        core = getattr(module, "core_attention", None)
        if core is not None and not isinstance(core, HDPAttention):
            raise ValueError(
                f"{name}.core_attention is {type(core).__name__}, which would attend across the "
                "sequences of a microbatch; use --spec hdp.megatron layer_spec and leave out "
                "--attention-backend local, which overwrites it"
            )
        if type(module).__name__ in ("MambaMixer", "GatedDeltaNet"):
            raise ValueError(
                f"{name} is a {type(module).__name__} layer, which cannot be split over a ring; "
                "use attention layers only"
            )
