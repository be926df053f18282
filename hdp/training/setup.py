"""Run: the parts of a training run, built from its configuration and connected."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from hdp import console
from hdp.attention.comm import RingComm
from hdp.attention.gather import gather_pays
from hdp.attention.kernels import choose_kernel
from hdp.attention.layout import RingLayout
from hdp.config import DEMO_MODEL, TrainConfig
from hdp.data import Sampler, TokenDataset, open_dataset
from hdp.distributed.agree import on_all_ranks
from hdp.distributed.fsdp import shard
from hdp.distributed.mesh import HDPMesh
from hdp.distributed.rng import seed_rng
from hdp.distributed.watchdog import Watchdog
from hdp.models.causal_lm import CausalLM, transformer_shape
from hdp.models.compiled import compile_layers
from hdp.models.liger import use_liger
from hdp.models.loading import build_model, load_model
from hdp.offloading.context import open_engine
from hdp.offloading.engine import OffloadEngine
from hdp.offloading.memory import host_bytes_per_rank
from hdp.offloading.planned import PlannedOffload
from hdp.ops.native import describe
from hdp.scheduler import CostModel, StepPlan, plan
from hdp.scheduler.costs.activation_plan import decoder_classes, scaled
from hdp.scheduler.policies.memory import shard_capacity

from .optim import build_optimizer
from .recorder import StepRecorder
from .step import StepContext, keep_everything

_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}

# What one rank sustains, where nothing was measured: it makes the first plans reasonable. Relative
# sizes matter, as they decide how wide rings get. On a CPU: one thread of a server core, gloo over
# loopback, and 1.5 ms for each of a ring step's three transfers per layer.
_CPU_FLOPS_PER_S = 30e9
_CPU_BYTES_PER_S = 1e9
_CPU_TRANSFER_S = 1.5e-3
_GPU_FLOPS_PER_S = 400e12
_HOST_BYTES_PER_S = {"cuda": 50e9, "cpu": 5e9}  # PCIe 5 x16, both directions at once; memcpy
_HOST_SHARE = 0.9  # of the offload pool that plans count on: layers are not all the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What stays the same from step to step."""

    config: TrainConfig
    mesh: HDPMesh
    watchdog: Watchdog
    dataset: TokenDataset
    sampler: Sampler
    cost: CostModel
    model: CausalLM
    context: StepContext

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.mesh.hdp_rank == 0

    def plan(self, seqlens: np.ndarray) -> StepPlan:
        """The plan of a batch: a pure function of its lengths and the configuration."""
        return plan(
            seqlens,
            hdp_size=self.mesh.hdp_size,
            max_tokens_per_rank=self.config.max_tokens_per_rank,
            cost=self.cost,
            policy=self.config.policy,
            cp_size=self.config.cp_size,
            ranks_per_node=self.mesh.ranks_per_node,
            offload=self.config.offload_gib > 0,
        )

    @property
    def offload(self) -> PlannedOffload | None:
        """What executes the plans' offload ratios, if the run has host memory for it."""
        offload = self.context.offload
        return offload if isinstance(offload, PlannedOffload) else None

    @property
    def host_bytes(self) -> int:
        """Most host memory that this rank's offloaded activations have taken at once."""
        return self.offload.engine.stats().peak_in_use_bytes if self.offload else 0

    def close(self) -> None:
        """Give back what outlives its objects: host memory of the offload engine."""
        if self.offload:
            self.offload.close()

    def say(self, message: str) -> None:
        """One line for people, once."""
        if self.is_main:
            for line in message.splitlines():
                console.note(line)


def set_up(config: TrainConfig, mesh: HDPMesh, watchdog: Watchdog) -> Run:
    """Open the data, build and shard the model, make the optimizer. Collective.

    Raises ValueError for data, a model or options that cannot be trained.
    """
    seed_rng(config.seed, rank=mesh.hdp_rank)
    dtype = _compute_dtype(config, mesh.device)
    dataset = _open_data(config)
    if not config.offload_gib:  # else lengths, costs and memory say together what fits
        dataset.check_fits(hdp_size=mesh.hdp_size, max_tokens_per_rank=config.max_tokens_per_rank)
    model = _open_model(config, dataset, mesh, dtype)
    cost = CostModel.load(config.cost) if config.cost else estimate_cost(model, mesh.device, dtype)
    offload: PlannedOffload | None = None
    if config.offload_gib:
        offload = open_offload(config, model, mesh, dtype, cost)
        cost = offload.cost
        capacity = shard_capacity(
            dataset.seqlens, max_tokens_per_rank=config.max_tokens_per_rank, cost=cost
        )
        dataset.check_fits(hdp_size=mesh.hdp_size, max_tokens_per_rank=capacity)
    layers = use_liger(
        model.model, config.liger, device=mesh.device, dtype=dtype, compiled=config.compile
    )
    if config.compile:
        compile_layers(model.layers)
    shard(
        model,
        mesh.device_mesh,
        param_dtype=dtype if dtype == torch.bfloat16 else None,
        activation_checkpointing=config.activation_checkpointing,
    )
    context = _make_context(config, mesh, watchdog, model, cost, offload)
    run = Run(
        config=config,
        mesh=mesh,
        watchdog=watchdog,
        dataset=dataset,
        sampler=Sampler(dataset.seqlens, batch_tokens=config.batch_tokens, seed=config.seed),
        cost=cost,
        model=model,
        context=context,
    )
    longest = run.plan(dataset.seqlens.max()[None])  # a ring that cannot hold it is found out now
    _introduce(run, dtype, layers)
    if run.offload:
        _introduce_offload(run, run.offload, longest)
    return run


def _make_context(
    config: TrainConfig,
    mesh: HDPMesh,
    watchdog: Watchdog,
    model: CausalLM,
    cost: CostModel,
    offload: PlannedOffload | None,
) -> StepContext:
    """What executes a step, around a model that is sharded."""
    comm = RingComm(
        mesh.hdp_group,
        mesh.device,
        on_exchange=watchdog.touch,
        gathers=partial(gather_pays, cost=cost, ranks_per_node=mesh.ranks_per_node),
    )
    return StepContext(
        mesh=mesh,
        model=model,
        optimizer=build_optimizer(
            model,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            backend=config.optimizer,
        ),
        comm=comm,
        recorder=StepRecorder(mesh.hdp_rank, comm),
        watchdog=watchdog,
        grad_clip=config.grad_clip,
        overlap_reduce=mesh.device.type == "cuda",
        offload=offload or keep_everything,
    )


def estimate_cost(model: CausalLM, device: torch.device, dtype: torch.dtype) -> CostModel:
    """A cost model from the model's shape alone; `--cost FILE` replaces it by a measured one."""
    shape = transformer_shape(model)
    if device.type == "cuda":
        return CostModel.from_transformer(
            **shape, flops_per_s=_GPU_FLOPS_PER_S, bytes_per_element=dtype.itemsize
        )
    return CostModel.from_transformer(
        **shape,
        flops_per_s=_CPU_FLOPS_PER_S,
        intra_node_bytes_per_s=_CPU_BYTES_PER_S,
        inter_node_bytes_per_s=_CPU_BYTES_PER_S,
        bytes_per_element=dtype.itemsize,
        ring_step_s=3 * _CPU_TRANSFER_S * shape["num_layers"],
    )


def open_offload(
    config: TrainConfig, model: CausalLM, mesh: HDPMesh, dtype: torch.dtype, cost: CostModel
) -> PlannedOffload:
    """The engine that executes the plan's offload ratios. Collective.

    Its `cost` is the given one with what was not measured: the host link, and the bytes that the
    model saves. Raises ValueError on all ranks if host memory is missing on any.
    """
    shape: dict[str, Any] = transformer_shape(model)
    host_bytes = int(config.offload_gib * 2**30)
    classes = decoder_classes(cost, **shape, bytes_per_element=dtype.itemsize)
    if config.cost and cost.activation_bytes_per_token:
        classes = scaled(classes, cost.activation_bytes_per_token)
    cost = replace(
        cost,
        activation_bytes_per_token=sum(c.bytes_per_token for c in classes),
        host_bytes_per_s=cost.host_bytes_per_s or _HOST_BYTES_PER_S[mesh.device.type],
        host_memory_bytes=_HOST_SHARE * host_bytes,
    )
    if not cost.offloadable:
        raise ValueError(
            f"--offload-gib {config.offload_gib}: two layers are always at work, and the model has "
            f"{cost.num_layers}: nothing could be offloaded"
        )

    def open_it() -> OffloadEngine:
        most = host_bytes_per_rank()
        if host_bytes > most:
            raise ValueError(
                f"--offload-gib {config.offload_gib}: a rank's part of this machine's memory is "
                f"{most / 2**30:.1f} GiB; give less, or start fewer ranks on it"
            )
        is_cuda = mesh.device.type == "cuda"
        return open_engine(mesh.device, max_bytes=host_bytes, prefill=is_cuda)

    engine = on_all_ranks(open_it, mesh.hdp_group)
    min_bytes = 1 << (20 if mesh.device.type == "cuda" else 12)
    return PlannedOffload(engine, cost=cost, classes=classes, min_bytes=min_bytes)


def _compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[config.dtype]


def _open_data(config: TrainConfig) -> TokenDataset:
    tokenizer = config.tokenizer
    if tokenizer == "auto":
        tokenizer = "bpe:4096" if config.model == "demo" else config.model
    return open_dataset(
        config.data,
        tokenizer=tokenizer,
        text_column=config.text_column,
        pattern=config.pattern,
        subset=config.subset,
        split=config.split,
        max_length=config.max_length,
        overlong=config.overlong,
        strict=config.strict,
        cache_dir=config.cache_dir,
    )


def _open_model(
    config: TrainConfig, dataset: TokenDataset, mesh: HDPMesh, dtype: torch.dtype
) -> CausalLM:
    """The model with fp32 (fp64) weights on rank 0; others get theirs when it is sharded."""
    options: dict[str, Any] = {
        "dtype": torch.float64 if dtype == torch.float64 else torch.float32,
        "skeleton": mesh.hdp_rank != 0,
        "attn_backend": config.attention,
        "config_overrides": config.model_entries,
    }
    if config.model == "demo":
        shape = {**DEMO_MODEL, "vocab_size": dataset.vocab_size}
        return build_model(shape, seed=config.seed, **options)
    if config.random_init:
        model = build_model(config.model, seed=config.seed, **options)
    else:
        model = load_model(config.model, **options)
    if dataset.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer makes ids up to {dataset.vocab_size - 1}, model {config.model!r} has "
            f"a vocabulary of {model.config.vocab_size}; use the model's own tokenizer"
        )
    return model


def _introduce(run: Run, dtype: torch.dtype, layers: str) -> None:
    """Say once what runs where: fallbacks are announced, never silent."""
    mesh, config = run.mesh, run.config
    head_dim = transformer_shape(run.model)["head_dim"]
    attention = choose_kernel(mesh.device, dtype, config.attention, head_dim=head_dim)
    parameters = sum(p.numel() for p in run.model.parameters())
    run.say(f"{mesh.hdp_size} ranks on {mesh.device.type}, {mesh.ranks_per_node} per node")
    run.say(
        f"model {config.model}: {parameters / 1e6:,.1f}M parameters, compute in "
        f"{str(dtype).removeprefix('torch.')}; attention: {attention.kernel.name}"
    )
    run.say("ops: {} ({})".format(*describe(mesh.device.type)))
    run.say(f"layers: {layers}" + ("; under torch.compile" if config.compile else ""))
    if attention.passed_over:
        run.say(f"attention: {attention.why}")
    run.say(str(run.dataset.report))
    longest, positions = run.dataset.report.longest_tokens, _num_positions(run.model)
    if longest > positions:
        run.say(
            f"sequences of up to {longest:,} tokens for a model of {positions:,} positions "
            "(max_position_embeddings): it extrapolates there; --max-length limits the data, "
            "--config-overrides can scale RoPE"
        )
    source = config.cost or "estimated from the model's shape"
    cp_size = f" with cp_size {config.cp_size}" if config.cp_size else ""
    run.say(
        f"plan: {config.policy}{cp_size}, at most {config.max_tokens_per_rank:,} tokens per rank "
        f"and microbatch; costs: {source}"
    )


def _introduce_offload(run: Run, offload: PlannedOffload, longest: StepPlan) -> None:
    """Which host memory, and what becomes of what the longest sequence saves."""
    is_cpu = run.mesh.device.type == "cpu"
    rate = run.cost.host_bytes_per_s / run.cost.ranks_per_host_link
    run.say(
        f"offload: up to {run.config.offload_gib:g} GiB of host memory per rank over a link of "
        f"{rate / 1e9:.0f} GB/s ({offload.engine.link.name})"
        + ("; on a CPU it exercises the engine and saves nothing" if is_cpu else "")
    )
    tokens, degree = int(longest.seqlens[0]), int(longest.degrees[0])
    microbatch = longest.microbatches(0)[0]
    made = offload.plan(RingLayout.from_microbatch(microbatch, 0), microbatch.offload_ratio)
    where = "1 rank" if degree == 1 else f"{degree} ranks, each"
    run.say(f"the longest sequence, {tokens:,} tokens, on {where}:\n{made.table()}")


def _num_positions(model: CausalLM) -> float:
    return getattr(model.config, "max_position_embeddings", None) or math.inf
