"""Hugging Face models on the HDP path: the one file that imports transformers.

The model stays the ecosystem's and single-device (design.md, decision 9). Three seams are enough:

* attention: `hdp` is registered with transformers' AttentionInterface, and each attention layer
  calls `ring_attn_varlen_func` with the q, k, v that it made. What the ring needs beside them (the
  layout and the communicator) travels explicitly as a keyword of the model's forward, which every
  layer hands down: no ambient context.
* packing: a microbatch is one row of tokens, (1, total_tokens), with global position ids. No mask
  is ever built: the layout says who sees whom.
* the head: `CausalLM` asks the base model for hidden states and turns them into the labels'
  log-probabilities chunk by chunk (hdp/models/logprobs.py); the logits never exist.

What the ring cannot do is refused by the layer's name (support.py). For what is accepted, logprobs
and gradients equal those of the plain model run sequence by sequence (test_equals_plain_model).

    model = load_model("Qwen/Qwen3-0.6B")             # or build_model({"model_type": "llama", ...})
    logprobs = model(batch, comm)                     # (total_tokens,)
"""

from __future__ import annotations

import copy
import functools
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hdp.attention.kernels import select_kernel
from hdp.attention.ring import ring_attn_varlen_func

from .export_folder import check_target, partial_path, publish
from .logprobs import chunked_logprobs
from .support import check_entries, check_supported, first_line, names_generic_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hdp.attention.comm import RingComm
    from hdp.attention.layout import RingLayout
    from hdp.data.pack import PackedBatch

ATTENTION = "hdp"  # name in transformers' AttentionInterface

# Keywords by which a layer asks for what the ring cannot do.
_FEATURES = {
    "sliding_window": "sliding window",
    "softcap": "soft-capping of attention scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
}


class AttnInputs:
    """What attention needs beside q, k and v; the same object for all layers of one forward.

    A plain class on purpose: FSDP's hooks look for tensors inside of the arguments of every layer,
    and walk (or even rebuild) dataclasses, lists and dicts to find them.
    """

    __slots__ = ("backend", "comm", "layout")

    def __init__(self, layout: RingLayout, comm: RingComm | None, backend: str | None) -> None:
        self.layout, self.comm, self.backend = layout, comm, backend


class CausalLM(nn.Module):
    """A Hugging Face causal LM whose forward gives log-probabilities of a packed microbatch.

    It is FSDP2's root: all parameters, the LM head's too, are used inside of this one forward.

    model: a supported `*ForCausalLM`. attn_backend: block kernel by name; None: the best one.
    chunk_tokens: tokens whose logits exist at once; None: see `chunked_logprobs`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attn_backend: str | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        check_supported(model)
        register_attention()
        model.set_attn_implementation(ATTENTION)
        self.model = model
        self.attn_backend = attn_backend
        self.chunk_tokens = chunk_tokens

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers: FSDP2's units."""
        return cast(nn.ModuleList, self.model.base_model.layers)

    def forward(self, batch: PackedBatch, comm: RingComm | None = None) -> Tensor:
        """(total_tokens,) logprobs of batch.labels, fp32 (fp64 for fp64 weights); 0 without label.

        batch: on the model's device. comm: needed when batch.layout has a ring.
        """
        head = self.model.get_output_embeddings()
        hidden = self.model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,  # a cache makes transformers ignore document boundaries
            hdp_batch=AttnInputs(batch.layout, comm, self.attn_backend),
        ).last_hidden_state[0]
        return chunked_logprobs(
            hidden,
            head.weight,
            batch.labels,
            bias=getattr(head, "bias", None),
            chunk_tokens=self.chunk_tokens,
        )


# ---- making, loading, writing ----


def build_model(
    config: Mapping[str, Any] | str | os.PathLike | PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    skeleton: bool = False,
    attn_backend: str | None = None,
    config_overrides: Mapping[str, Any] | None = None,
) -> CausalLM:
    """A model with random weights, in training mode, on the CPU.

    Args:
        config: {"model_type": "llama", "hidden_size": ...}, a folder or hub name, or a config.
        dtype: of the weights (fp32 masters); `parallel.shard` sets what the layers compute in.
        seed: of the weights. The same seed gives the same weights whatever the number of ranks.
        skeleton: no weights (meta device): for ranks that get them from rank 0 in `shard`.
        attn_backend: block kernel by name; None: the best one for device and dtype.
        config_overrides: entries of the config to change, for example {"sliding_window": None}.

    Raises ValueError for no such model type or path, and for a model that the ring cannot run.
    """
    from transformers import AutoModelForCausalLM

    register_attention()
    resolved = _resolve_config(config, config_overrides)
    with torch.random.fork_rng(devices=[]), torch.device("meta" if skeleton else "cpu"):
        torch.default_generator.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(
                resolved, dtype=dtype, attn_implementation=ATTENTION
            )
        except ValueError as error:
            raise ValueError(
                f"no causal LM can be made for model type {resolved.model_type!r}: "
                f"{first_line(error)}"
            ) from error
    return CausalLM(model.train(), attn_backend=attn_backend)


def load_model(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    skeleton: bool = False,
    attn_backend: str | None = None,
    config_overrides: Mapping[str, Any] | None = None,
) -> CausalLM:
    """The model saved in a folder, or on the hub; arguments as in `build_model`.

    Raises ValueError where `build_model` does, and for a checkpoint that lacks weights.
    """
    if skeleton:
        return build_model(
            path,
            dtype=dtype,
            skeleton=True,
            attn_backend=attn_backend,
            config_overrides=config_overrides,
        )
    from transformers import AutoModelForCausalLM

    register_attention()
    config = _resolve_config(path, config_overrides)
    try:
        if Path(path).is_file():
            raise ValueError("a config has no weights")
        model, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION,
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
    return CausalLM(model.train(), attn_backend=attn_backend)


def load_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer saved in a folder, or on the hub (a transformers fast tokenizer).

    A folder whose tokenizer_config.json names a generic class means its tokenizer.json literally.
    AutoTokenizer instead replaces the class by that of the model type for some types (qwen2 is
    one), and with it the pre-tokenizer: a tokenizer of one's own would silently encode otherwise.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if names_generic_tokenizer(Path(path)):
            return PreTrainedTokenizerFast.from_pretrained(path)
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer in {str(path)!r}, a folder with tokenizer.json or a name on the hub: "
            f"{first_line(error)}; --tokenizer bytes, or bpe:SIZE, needs none"
        ) from error


def export_model(
    model: CausalLM,
    path: str | os.PathLike,
    state_dict: Mapping[str, Tensor],
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = torch.bfloat16,
) -> None:
    """Write what `from_pretrained` loads: config, safetensors, tokenizer. One process calls it.

    Args:
        model: for its config and names; its weights are not read (they may be sharded).
        path: a folder. It appears when it is complete; an earlier export there is replaced.
        state_dict: full tensors under the names of `model.state_dict()` (`full_state_dict`).
        tokenizer: anything with `save_pretrained(folder)`, or None.
        dtype: of the written weights; None: as they are.

    Raises ValueError if weights are missing, or if `path` holds anything but an export.
    """
    from transformers import AutoModelForCausalLM

    target = check_target(path)
    weights = {
        name.removeprefix("model."): (x if dtype is None else x.to(dtype)).detach().cpu()
        for name, x in state_dict.items()
    }
    config = copy.deepcopy(model.config)
    config._attn_implementation = None  # ours; the loading side chooses its own
    written_dtype = next(iter(weights.values())).dtype if weights else dtype
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=written_dtype)
    skeleton.generation_config = model.model.generation_config
    missing = sorted(skeleton.state_dict().keys() - weights.keys())
    if missing:
        raise ValueError(f"state_dict lacks {len(missing)} weights, first {missing[0]}")
    partial = partial_path(target)
    shutil.rmtree(partial, ignore_errors=True)
    skeleton.save_pretrained(partial, state_dict=weights, max_shard_size="5GB")
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
        _warn_if_misread(partial)
    publish(target)


def transformer_shape(model: CausalLM | PreTrainedModel) -> dict[str, int]:
    """The numbers that a cost model and an MFU estimate need."""
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


def register_attention() -> None:
    """Make `attn_implementation="hdp"` known to transformers; again and again does no harm.

    No mask function beside it: then transformers builds no mask, and does not search the position
    ids for document boundaries either (which would wait for the GPU).
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _uncompiled_attention())


@functools.cache  # one object: graphs are guarded by it
def _uncompiled_attention() -> Any:
    """What torch.compile makes of a layer stops at the ring and goes on behind it."""
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
    """transformers' attention function: query (1, num_heads, total_tokens, head_dim), key and value
    (1, num_kv_heads, total_tokens, head_dim) -> (1, total_tokens, num_heads, head_dim).
    """
    where = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
    if hdp_batch is None:
        raise ValueError(
            f"{where}: 'hdp' attention runs inside of hdp.models.causal_lm.CausalLM, not alone"
        )
    asked = [text for name, text in _FEATURES.items() if features.get(name) is not None]
    if attention_mask is not None:
        asked.append("an attention mask")
    if dropout:
        asked.append(f"attention dropout {dropout}")
    if asked:
        raise ValueError(f"{where} asks for {', '.join(asked)}, which ring attention does not do")
    assert query.shape[0] == 1, f"{where}: a microbatch is one packed row, got {query.shape}"
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = ring_attn_varlen_func(
        q,
        k,
        v,
        hdp_batch.layout,
        comm=hdp_batch.comm,
        softmax_scale=scaling,
        kernel=select_kernel(q.device, q.dtype, hdp_batch.backend, head_dim=q.shape[-1]),
    )
    return out[None], None


def _resolve_config(config: Any, overrides: Mapping[str, Any] | None) -> PreTrainedConfig:
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


def _warn_if_misread(folder: Path) -> None:
    """Tell the user if AutoTokenizer reads another tokenizer out of `folder` than was written."""
    from transformers import AutoTokenizer

    ours, auto = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    probe = "Hello, world! x1 = 2000 + 17\n\tif a_b: return 'yes'  # \u00e9\u4e2d"
    if ours.encode(probe) != auto.encode(probe):
        warnings.warn(
            f"transformers' AutoTokenizer reads a {type(auto).__name__} from this export, which "
            "encodes text differently; load it with PreTrainedTokenizerFast.from_pretrained or "
            "hdp.models.causal_lm.load_tokenizer",
            stacklevel=3,
        )
