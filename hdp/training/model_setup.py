"""Prepare a model for training: build or load it, estimate costs, swap in kernels, shard.

All that is known here of the data is its tokenizer, so a reference model or a critic is set
up by the same call as the policy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from hdp.attention.kernels import Choice, choose_kernel
from hdp.config import DEMO_MODEL, TrainConfig
from hdp.data.prepare.tokenizer import ByteTokenizer, load_tokenizer
from hdp.distributed.agree import agree_on_values, on_all_ranks
from hdp.distributed.fsdp import shard
from hdp.distributed.mesh import HDPMesh
from hdp.models.causal_lm import CausalLM, transformer_shape
from hdp.models.compiled import compile_layers
from hdp.models.huggingface import classifier_from_config
from hdp.models.liger import use_liger
from hdp.models.loading import build_model, load_model
from hdp.models.loading import check_model as check_loadable
from hdp.models.lora import LoRA, add_lora
from hdp.models.scalar_head import ScalarHeadLM
from hdp.offloading.engine import OffloadEngine, open_engine
from hdp.offloading.memory import host_bytes_per_rank
from hdp.offloading.per_microbatch import PerMicrobatchOffload
from hdp.scheduler import CostModel
from hdp.scheduler.costs.activation_plan import decoder_classes, scaled
from hdp.scheduler.costs.estimate import HOST_BYTES_PER_S, estimate_cost

_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
_HOST_SHARE = 0.9  # share of the offload pool that plans may fill: layers differ in size


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSetup:
    """A sharded model and the choices made while setting it up."""

    model: CausalLM | ScalarHeadLM
    dtype: torch.dtype  # compute dtype
    cost: CostModel
    offload: PerMicrobatchOffload | None  # executes the plans' offload ratios; None: no host memory
    layers: str  # which kernels the layers use, for the log
    attention: Choice  # the block kernel, and why
    notes: tuple[str, ...] = ()  # further lines for the log


def set_up_model(
    config: TrainConfig, mesh: HDPMesh, *, vocab_size: int, seed: int | None = None
) -> ModelSetup:
    """Build or load the model that `config` names and shard it over the mesh. Collective.

    vocab_size: upper bound on token ids. seed: for random weights; None: the config's. Raises
    ValueError for a model or options that cannot be trained.
    """
    dtype = compute_dtype(config, mesh.device)
    shape = check_model(config, mesh, vocab_size=vocab_size)
    cost = open_cost(config, mesh, shape, dtype)
    misfit = _cost_misfit(config, cost, shape)
    seed = config.seed if seed is None else seed
    causal = on_all_ranks(
        partial(_open_model, config, mesh, dtype, vocab_size, seed), mesh.hdp_group
    )
    offload: PerMicrobatchOffload | None = None
    if config.offload_gib:
        offload = _open_offload(config, causal, mesh, dtype, cost)
        cost = offload.cost
    layers = use_liger(
        causal.model, config.liger, device=mesh.device, dtype=dtype, compiled=config.compile
    )
    model = on_all_ranks(partial(_fit_out, causal, config, seed), mesh.hdp_group)
    if config.compile:
        compile_layers(model.layers)
    shard(
        model,
        mesh.device_mesh,
        param_dtype=dtype if dtype == torch.bfloat16 else None,
        activation_checkpointing=config.activation_checkpointing,
    )
    return ModelSetup(
        model=model,
        dtype=dtype,
        cost=cost,
        offload=offload,
        layers=layers + ("; under torch.compile" if config.compile else ""),
        attention=choose_kernel(mesh.device, dtype, config.attention, head_dim=shape["head_dim"]),
        notes=(misfit,) if misfit else (),
    )


def _fit_out(causal: CausalLM, config: TrainConfig, seed: int) -> CausalLM | ScalarHeadLM:
    """The model with the head and the adapters that the objective and the options ask for."""
    model: CausalLM | ScalarHeadLM = causal
    if config.objective == "reward":
        if config.export_hf or config.export_ema:  # now, not after the last step
            with torch.device("meta"):
                classifier_from_config(causal.config, 1, dtype=torch.float32)
        model = ScalarHeadLM.from_causal_lm(causal, seed=seed)
    if config.lora_rank:
        targets: tuple[str, ...] | str = config.lora_targets
        if targets != "all-linear":
            targets = tuple(name.strip() for name in config.lora_targets.split(","))
        add_lora(
            model,
            LoRA(rank=config.lora_rank, alpha=config.lora_alpha, targets=targets),
            seed=seed,
        )
    return model


def set_up_reference(config: TrainConfig, mesh: HDPMesh, *, vocab_size: int) -> CausalLM:
    """The model that the run started from, sharded and frozen. Collective.

    Raises ValueError as `set_up_model`.
    """
    dtype = compute_dtype(config, mesh.device)
    model = on_all_ranks(
        partial(_open_model, config, mesh, dtype, vocab_size, config.seed), mesh.hdp_group
    )
    use_liger(model.model, config.liger, device=mesh.device, dtype=dtype, compiled=config.compile)
    model.requires_grad_(False)
    shard(model, mesh.device_mesh, param_dtype=dtype if dtype == torch.bfloat16 else None)
    return model


def check_model(
    config: TrainConfig, mesh: HDPMesh, *, vocab_size: int | None = None
) -> dict[str, int]:
    """The shape of the model that `config` names, if it can be trained. Collective.

    Reads no weights: call it before the data is tokenized, then again with the vocab_size that the
    tokenizer has. Raises ValueError on all ranks for a model that cannot be trained, for weights
    that cannot be loaded (rank 0 alone needs them), and for a tokenizer with too many ids.
    """
    weights = mesh.hdp_rank == 0
    check = partial(checked_shape, config, vocab_size=vocab_size, weights=weights)
    return on_all_ranks(check, mesh.hdp_group)


def checked_shape(
    config: TrainConfig, *, vocab_size: int | None = None, weights: bool = True
) -> dict[str, int]:
    """`check_model` for one process. weights: whether it needs them, unread as they are."""
    check_tokenizer(config)
    entries: Any = config.model
    random_init = config.random_init or config.model == "demo"
    if config.model == "demo":
        entries = {**DEMO_MODEL, "vocab_size": vocab_size or 4096}
    overrides = config.model_entries
    shape = check_loadable(
        entries, random_init=random_init, weights=weights, config_overrides=overrides
    )
    if vocab_size is not None and vocab_size > shape["vocab_size"]:
        raise ValueError(
            f"the tokenizer produces ids up to {vocab_size - 1}, but model {config.model!r} has "
            f"a vocabulary of {shape['vocab_size']}; use the model's own tokenizer"
        )
    return shape


def check_tokenizer(config: TrainConfig) -> None:
    """Raise ValueError for pretrained weights with a tokenizer that they were not trained with.

    A new byte-pair tokenizer never fits; bytes fit if the model's own tokenizer is that one.
    """
    kind = config.tokenizer.partition(":")[0]
    if config.model == "demo" or config.random_init or kind not in ("bytes", "bpe"):
        return
    try:
        own = "bytes" if isinstance(load_tokenizer(config.model), ByteTokenizer) else "another"
    except ValueError:
        own = "none"
    if kind != own:
        raise ValueError(
            f"--tokenizer {config.tokenizer} does not fit the pretrained weights of --model "
            f"{config.model}, in which each id has its meaning; drop --tokenizer to use the "
            "model's own, or pass --random-init"
        )


def _cost_misfit(config: TrainConfig, cost: CostModel, shape: dict[str, int]) -> str:
    """How the cost model from --cost contradicts the model; "" if it does not.

    Estimated times are then off by a factor, which plans survive, and so does offloaded memory,
    which they do not: raises ValueError with --offload-gib.
    """
    problem = ""
    num_layers = shape["num_layers"]
    kv_bytes = [
        2 * num_layers * shape["num_kv_heads"] * shape["head_dim"] * (2 * width + 4)
        for width in (2, 4, 8)  # in transfer: keys and values twice, their gradients in fp32
    ]
    if cost.num_layers != num_layers:
        problem = f"{cost.num_layers} layers, and the model has {num_layers}"
    elif cost.kv_bytes_per_token and cost.kv_bytes_per_token not in kv_bytes:
        problem = (
            f"{cost.kv_bytes_per_token:,.0f} bytes of keys and values per token, and the model has "
            f"{kv_bytes[0]:,}"
        )
    if not (config.cost and problem):
        return ""
    told = (
        f"--cost {config.cost} ({cost.name or 'unnamed'}) is for {problem}: predictions and plans "
        "are those of another model"
    )
    remedy = f"drop --cost, or measure this model: hdp profile --model {config.model}"
    if config.offload_gib:
        raise ValueError(f"--offload-gib {config.offload_gib}: {told}; {remedy}")
    return f"{told}; {remedy}"


def open_cost(
    config: TrainConfig, mesh: HDPMesh, shape: dict[str, Any], dtype: torch.dtype
) -> CostModel:
    """The cost model from `--cost`, else one estimated from the model's shape. Collective.

    Raises ValueError on all ranks if any rank cannot read its file, or if its cost model differs
    from rank 0's, since the ranks would then plan different steps.
    """

    def read() -> CostModel:
        if config.cost:
            return CostModel.find(config.cost)
        return estimate_cost(shape, device_type=mesh.device.type, bytes_per_element=dtype.itemsize)

    cost = on_all_ranks(read, mesh.hdp_group)
    agree_on_values(
        asdict(cost),
        mesh.hdp_group,
        problem="ranks have different cost models",
        remedy="copy one file to all nodes and pass it to all of them with --cost",
    )
    return cost


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward: that of --dtype, or by device."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[config.dtype]


def _open_model(
    config: TrainConfig, mesh: HDPMesh, dtype: torch.dtype, vocab_size: int, seed: int
) -> CausalLM:
    """The model with fp32 (fp64) weights on rank 0; other ranks get theirs during sharding."""
    options: dict[str, Any] = {
        "dtype": torch.float64 if dtype == torch.float64 else torch.float32,
        "skeleton": mesh.hdp_rank != 0,
        "attn_backend": config.attention,
        "config_overrides": config.model_entries,
    }
    if config.model == "demo":
        shape = {**DEMO_MODEL, "vocab_size": vocab_size}
        return build_model(shape, seed=seed, **options)
    if config.random_init:
        return build_model(config.model, seed=seed, **options)
    return load_model(config.model, **options)


def _open_offload(
    config: TrainConfig, model: CausalLM, mesh: HDPMesh, dtype: torch.dtype, cost: CostModel
) -> PerMicrobatchOffload:
    """Open the engine that executes the plan's offload ratios. Collective.

    Its `cost` is the given one with unmeasured fields filled in: the host link, and the bytes that
    the model saves. Raises ValueError on all ranks if any rank lacks host memory.
    """
    shape: dict[str, Any] = transformer_shape(model)
    host_bytes = int(config.offload_gib * 2**30)
    classes = decoder_classes(cost, **shape, bytes_per_element=dtype.itemsize)
    if config.cost and cost.activation_bytes_per_token:
        classes = scaled(classes, cost.activation_bytes_per_token)
    cost = replace(
        cost,
        activation_bytes_per_token=sum(c.bytes_per_token for c in classes),
        host_bytes_per_s=cost.host_bytes_per_s or HOST_BYTES_PER_S[mesh.device.type],
        host_memory_bytes=_HOST_SHARE * host_bytes,
    )
    if not cost.offloadable:
        raise ValueError(
            f"--offload-gib {config.offload_gib}: nothing can be offloaded, because two layers "
            f"always stay on the device and the model has {cost.num_layers}; drop the flag"
        )

    def open_it() -> OffloadEngine:
        most = host_bytes_per_rank()
        if host_bytes > most:
            raise ValueError(
                f"--offload-gib {config.offload_gib}: each rank's share of this machine's free "
                f"memory is {most / 2**30:.1f} GiB; ask for less, or start fewer ranks on it"
            )
        is_cuda = mesh.device.type == "cuda"
        return open_engine(mesh.device, max_bytes=host_bytes, prefill=is_cuda)

    engine = on_all_ranks(open_it, mesh.hdp_group)
    min_bytes = 1 << (20 if mesh.device.type == "cuda" else 12)
    return PerMicrobatchOffload(engine, cost=cost, classes=classes, min_bytes=min_bytes)
