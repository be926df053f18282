"""CausalLM: an unmodified Hugging Face model on the HDP path.

The model is written for a single device and knows nothing about parallelism. It plugs in at three
points:

* attention: `hdp` is registered with transformers' AttentionInterface, so every attention layer
  calls `ring_attn_varlen_func` with its own q, k and v. The layout and the communicator, which the
  ring also needs, are passed explicitly as a keyword of the model's forward that every layer hands
  down. There is no ambient context.
* packing: a microbatch is one row of tokens, (1, total_tokens), with global position ids. No mask
  is ever built; the layout determines which tokens attend to which.
* the head: `CausalLM` asks the base model for hidden states and computes the labels'
  log-probabilities chunk by chunk (hdp/models/logprobs.py). The full logits never exist.

A model with a feature that the ring cannot compute is rejected with the name of the layer
(support.py). For accepted models, logprobs and gradients equal those of the plain model run one
sequence at a time (test_equals_plain_model).

    model = load_model("Qwen/Qwen3-0.6B")             # or build_model({"model_type": "llama", ...})
    logprobs = model(batch, comm)                     # (total_tokens,)
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hdp.attention.kernels import KernelPicker
from hdp.attention.ring import ring_attn_varlen_func

from .huggingface import register_attention
from .logprobs import TokenStats, chunked_logprobs, chunked_token_stats
from .support import check_supported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hdp.attention.comm import RingComm
    from hdp.attention.layout import RingLayout
    from hdp.data.pack import PackedBatch

ATTENTION = "hdp"  # name in transformers' AttentionInterface

# Keywords a layer passes to request a feature that the ring does not support.
_FEATURES = {
    "sliding_window": "sliding window",
    "softcap": "soft-capping of attention scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
}


class AttnInputs:
    """What attention needs besides q, k and v. All layers of one forward share the same object.

    A plain class on purpose: FSDP's hooks search every layer's arguments for tensors, and walk (or
    even rebuild) dataclasses, lists and dicts to find them.
    """

    __slots__ = ("comm", "kernels", "layout")

    def __init__(self, layout: RingLayout, comm: RingComm | None, kernels: KernelPicker) -> None:
        self.layout, self.comm, self.kernels = layout, comm, kernels


class CausalLM(nn.Module):
    """A Hugging Face causal LM whose forward returns log-probabilities for a packed microbatch.

    It is FSDP2's root module: all parameters, including the LM head's, are used in this forward.

    model: a supported `*ForCausalLM`. attn_backend: name of a block kernel, or None for the best
    one available. chunk_tokens: how many tokens' logits exist at once; None: see
    `chunked_logprobs`. stored_dtype: of the checkpoint that the weights come from, for exports.

    Attributes that may be set at any time: temperature divides the logits; with_entropy makes
    forward return `TokenStats`, with the entropy of each labeled token's distribution.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attn_backend: str | None = None,
        chunk_tokens: int | None = None,
        stored_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_supported(model)
        register()
        model.set_attn_implementation(ATTENTION)
        self.model = model
        self.kernels = KernelPicker(attn_backend)
        self.chunk_tokens = chunk_tokens
        self.stored_dtype = stored_dtype
        self.temperature, self.with_entropy = 1.0, False

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers: FSDP2's units."""
        return cast(nn.ModuleList, self.model.base_model.layers)

    def forward(self, batch: PackedBatch, comm: RingComm | None = None) -> Tensor | TokenStats:
        """(total_tokens,) logprobs of batch.labels, fp32 (fp64 for fp64 weights); 0 if unlabeled.

        batch: on the model's device. comm: required when batch.layout has a ring.
        """
        head = self.model.get_output_embeddings()
        hidden = last_hidden(
            self.model.base_model, batch, AttnInputs(batch.layout, comm, self.kernels)
        )
        head_function = chunked_token_stats if self.with_entropy else chunked_logprobs
        return head_function(
            hidden,
            head.weight,
            batch.labels,
            bias=getattr(head, "bias", None),
            chunk_tokens=self.chunk_tokens,
            temperature=self.temperature,
        )


def last_hidden(backbone: nn.Module, batch: PackedBatch, attention: AttnInputs) -> Tensor:
    """(total_tokens, hidden_size): what a transformers model without head makes of a microbatch."""
    return backbone(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,  # a cache makes transformers ignore document boundaries
        hdp_batch=attention,
    ).last_hidden_state[0]


def transformer_shape(model: Any) -> dict[str, int]:
    """The dimensions that a cost model and an MFU estimate need."""
    config = model.config
    heads = config.num_attention_heads
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
    }


# ---- attention ----


def register() -> None:
    """Register `attn_implementation="hdp"` with transformers. Safe to call more than once."""
    register_attention(ATTENTION, _uncompiled_attention())


@functools.cache  # one object: graphs are guarded by it
def _uncompiled_attention() -> Any:
    """A compiled layer breaks its graph here: it stops before the ring and resumes after it."""
    return torch.compiler.disable(hdp_attention, reason="rings are not compiled")


def hdp_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    hdp_batch: AttnInputs | None = None,
    **features: Any,
) -> tuple[Tensor, None]:
    """Ring attention with the signature of a transformers attention function.

    query (1, num_heads, total_tokens, head_dim), key and value (1, num_kv_heads, total_tokens,
    head_dim) -> (1, total_tokens, num_heads, head_dim). Raises ValueError for unsupported features.
    """
    where = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
    if hdp_batch is None:
        raise ValueError(
            f"{where}: 'hdp' attention needs hdp_batch; wrap the model in "
            "hdp.models.causal_lm.CausalLM"
        )
    unsupported = [text for name, text in _FEATURES.items() if features.get(name) is not None]
    if attention_mask is not None:
        unsupported.append("an attention mask")
    if dropout:
        unsupported.append(f"attention dropout {dropout}")
    if unsupported:
        raise ValueError(f"{where}: ring attention does not support {', '.join(unsupported)}")
    assert query.shape[0] == 1, f"{where}: a microbatch is one packed row, got {query.shape}"
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = ring_attn_varlen_func(
        q,
        k,
        v,
        hdp_batch.layout,
        comm=hdp_batch.comm,
        softmax_scale=scaling,
        kernel=hdp_batch.kernels(q),
    )
    return out[None], None
