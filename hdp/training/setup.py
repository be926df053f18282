"""Run: the parts of a training run, built and connected according to its configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from hdp import console
from hdp.attention.layout import RingLayout
from hdp.config import TrainConfig
from hdp.data import MixtureSampler, Sampler
from hdp.data.feed import StepFeed
from hdp.data.pairs import PairDataset
from hdp.distributed.mesh import HDPMesh
from hdp.distributed.rng import seed_rng
from hdp.distributed.watchdog import Watchdog
from hdp.models.causal_lm import CausalLM
from hdp.models.lora import describe_lora
from hdp.objectives import Objective, cross_entropy, pair_units
from hdp.offloading.per_microbatch import PerMicrobatchOffload
from hdp.ops.native import describe
from hdp.scheduler import CostModel, StepPlan, plan

from .capacity import fit_tokens_per_rank
from .cores import shared_cores_note, shares_cores
from .data_setup import (
    Dataset,
    RunData,
    agree_on_data,
    check_data_fits,
    describe_data,
    limit_demo_data,
    open_run_data,
)
from .ema import EMA, describe_average
from .model_setup import ModelSetup, check_model, set_up_model, set_up_reference
from .optim import build_optimizer, describe_groups, optimizer_name
from .reference import KTOBaseline, Reference
from .step import StepContext, keep_everything
from .task import build_objective, is_paired, needs_reference

LONG_S = 3600.0  # time limit for loading, saving and exporting before a rank counts as hung


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What stays the same across steps in addition to the StepContext: data, planning, logging."""

    config: TrainConfig  # with the number of steps, also where epochs were asked for
    data: RunData
    cost: CostModel
    context: StepContext
    ema: EMA | None = None  # the average of the weights, with --ema-decay
    epochs: float | None = None  # asked for instead of steps
    objective: Objective = cross_entropy
    # Adds what the objective compares the policy with to a step.
    reference: Reference | KTOBaseline | None = None

    @property
    def dataset(self) -> Dataset:
        """What the run trains on."""
        return self.data.training

    @property
    def sampler(self) -> Sampler | MixtureSampler:
        """The order of `dataset`, and the position of the next batch in it."""
        return self.data.sampler

    @property
    def mesh(self) -> HDPMesh:
        """The ranks, and this rank's place among them."""
        return self.context.mesh

    @property
    def model(self) -> CausalLM:
        """The sharded model; the transformers model is `run.model.model`."""
        return cast(CausalLM, self.context.model)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the sharded parameters."""
        assert self.context.optimizer is not None
        return self.context.optimizer

    @property
    def offload(self) -> PerMicrobatchOffload | None:
        """Executes the plans' offload ratios; None if the run has no host memory for it."""
        offload = self.context.offload
        return offload if isinstance(offload, PerMicrobatchOffload) else None

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes files for all."""
        return self.mesh.hdp_rank == 0

    def plan(self, seqlens: np.ndarray) -> StepPlan:
        """The plan for a batch: a pure function of its lengths and the configuration."""
        return plan(
            seqlens,
            hdp_size=self.mesh.hdp_size,
            max_tokens_per_rank=self.config.tokens_per_rank,
            cost=self.cost,
            policy=self.config.policy,
            cp_size=self.config.cp_size,
            ranks_per_node=self.mesh.ranks_per_node,
            offload=self.config.offload_gib > 0,
            units=pair_units(len(seqlens)) if is_paired(self.config) else None,
        )

    def until_epochs(self, step: int) -> Run:
        """This run with as many steps as its epochs take after `step`, from the sampler's position.

        They change if the batch size does. Without --epochs, the run itself.
        """
        if self.epochs is None:
            return self
        steps = step + self.sampler.steps_left(self.epochs)
        return replace(self, config=replace(self.config, steps=steps))

    def feed(self) -> StepFeed:
        """Steps from the sampler's position on, planned and packed one step ahead of training."""
        return StepFeed(
            self.dataset,
            self.sampler,
            self.plan,
            rank=self.mesh.hdp_rank,
            position=self.sampler.position,
            device=self.mesh.device,
            on_wait=lambda: self.context.watchdog.allow(LONG_S, "waiting for the plan and tokens"),
        )

    @property
    def host_bytes(self) -> int:
        """Peak host memory of this rank's offloaded activations."""
        return self.offload.engine.stats().peak_in_use_bytes if self.offload else 0

    def close(self) -> None:
        """Release the offload engine's host memory, which outlives its Python objects."""
        if self.offload:
            self.offload.close()

    def say(self, message: str) -> None:
        """Log a message on rank 0 only."""
        if self.is_main:
            for line in message.splitlines():
                console.note(line)


def set_up(config: TrainConfig, mesh: HDPMesh, watchdog: Watchdog) -> Run:
    """Open the data, set up the model, build the optimizer. Collective.

    Raises ValueError for data, a model or options that cannot be trained.
    """
    seed_rng(config.seed, rank=mesh.hdp_rank)
    check_model(config, mesh)  # seconds; tokenizing may take hours
    config = limit_demo_data(config, mesh.hdp_size, say=mesh.hdp_rank == 0)
    data = open_run_data(config)
    epochs, dataset = config.epochs, data.training
    if epochs is not None:
        config = replace(config, steps=data.sampler.num_steps(epochs), epochs=None)
    if config.max_tokens_per_rank == "auto":
        config = fit_tokens_per_rank(config, mesh, vocab_size=dataset.vocab_size)
    if not config.offload_gib:  # with offload, what fits also depends on costs: checked below
        check_data_fits(config, data, hdp_size=mesh.hdp_size)
    agree_on_data(dataset, mesh)
    if data.evaluation is not None:
        agree_on_data(data.evaluation, mesh)
    made = set_up_model(config, mesh, vocab_size=dataset.vocab_size)
    if made.offload is not None:
        check_data_fits(config, data, hdp_size=mesh.hdp_size, cost=made.cost)
    optimizer = build_optimizer(
        made.model,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        backend=config.optimizer,
    )
    context = StepContext.create(
        mesh,
        made.model,
        optimizer,
        watchdog=watchdog,
        grad_clip=config.grad_clip,
        offload=made.offload or keep_everything,
    )
    run = Run(
        config=config,
        data=data,
        epochs=epochs,
        cost=made.cost,
        context=context,
        ema=EMA(made.model, config.ema_decay) if config.ema_decay else None,
        objective=build_objective(config, context.comm),
        reference=_open_reference(config, context, dataset.vocab_size),
    )
    run = _with_baseline(run)
    longest = run.plan(longest_batch(dataset))  # fail now if no ring can hold it
    if data.evaluation is not None:
        run.plan(data.evaluation.seqlens.max()[None])
    _introduce(run, made)
    if run.offload:
        _introduce_offload(run, run.offload, longest)
    return run


def _open_reference(config: TrainConfig, context: StepContext, vocab_size: int) -> Reference | None:
    """What the objective compares the policy with; None if it does not. Collective."""
    if not needs_reference(config):
        return None
    if config.lora_rank:
        return Reference.adapter_off(context)
    return Reference.copy(context, set_up_reference(config, context.mesh, vocab_size=vocab_size))


def _with_baseline(run: Run) -> Run:
    """The run with what KTO needs on top of a reference, which is planned by the run itself."""
    if run.config.objective != "kto":
        return run
    assert isinstance(run.reference, Reference)
    baseline = KTOBaseline(
        reference=run.reference,
        dataset=run.dataset,
        plan=run.plan,
        max_length=run.mesh.hdp_size * run.config.tokens_per_rank,
    )
    return replace(run, reference=baseline)


def longest_batch(dataset: Dataset) -> np.ndarray:
    """(1,) the longest sequence, or the (2,) lengths of the longest pair."""
    if isinstance(dataset, PairDataset):
        longest = int(dataset.pair_lengths.argmax())
        return dataset.seqlens[2 * longest : 2 * longest + 2]
    return dataset.seqlens.max()[None]


def _introduce(run: Run, made: ModelSetup) -> None:
    """Log once what runs where: fallbacks are announced, never silent."""
    mesh, config, attention = run.mesh, run.config, made.attention
    parameters = sum(p.numel() for p in run.model.parameters())
    if config.objective != "sft":
        beside = "" if run.reference is None else "; reference: the model that the run starts from"
        if run.reference is not None:
            beside += ", adapters off" if config.lora_rank else ", a frozen copy"
        run.say(f"objective: {config.objective}{beside}")
    if adapters := describe_lora(run.model):
        run.say(adapters)
    ranks = console.count(mesh.hdp_size, "rank")
    run.say(f"{ranks} on {mesh.device.type}, {mesh.ranks_per_node} per node")
    if shares_cores(mesh):
        run.say(shared_cores_note(mesh))
    run.say(
        f"model {config.model}: {parameters / 1e6:,.1f}M parameters, compute in "
        f"{str(made.dtype).removeprefix('torch.')}; attention: {attention.kernel.name}"
    )
    run.say("ops: {} ({})".format(*describe(mesh.device.type)))
    run.say(f"layers: {made.layers}; optimizer: {optimizer_name(run.optimizer)}")
    run.say(describe_groups(run.optimizer) + describe_average(run.ema))
    if attention.passed_over:
        run.say(f"attention: {attention.why}")
    for line in describe_data(config, run.data, epochs=run.epochs) if run.is_main else ():
        run.say(line)
    longest, positions = int(run.dataset.seqlens.max()), _num_positions(run.model)
    if longest > positions:
        run.say(
            f"the longest sequence has {longest:,} tokens but the model was built for "
            f"{positions:,} (max_position_embeddings) and will extrapolate beyond that; limit "
            "lengths with --max-length, or scale RoPE with --config-overrides"
        )
    for note in made.notes:
        run.say(note)
    source = config.cost or "estimated from the model's shape"
    cp_size = f" with cp_size {config.cp_size}" if config.cp_size else ""
    run.say(
        f"plan: {config.policy}{cp_size}, at most {config.tokens_per_rank:,} tokens per rank "
        f"and microbatch; costs: {source}"
    )


def _introduce_offload(run: Run, offload: PerMicrobatchOffload, longest: StepPlan) -> None:
    """Log the host memory in use and how the longest sequence's activations are handled."""
    is_cpu = run.mesh.device.type == "cpu"
    rate = run.cost.host_bytes_per_s / run.cost.ranks_per_host_link
    run.say(
        f"offload: up to {run.config.offload_gib:g} GiB of host memory per rank over a link of "
        f"{rate / 1e9:.0f} GB/s"
        + ("; on a CPU this only exercises the engine and saves no memory" if is_cpu else "")
    )
    tokens, degree = int(longest.seqlens[0]), int(longest.degrees[0])
    microbatch = longest.microbatches(0)[0]
    made = offload.plan(RingLayout.from_microbatch(microbatch, 0), microbatch.offload_ratio)
    where = console.count(degree, "rank") + (", each" if degree > 1 else "")
    run.say(f"the longest sequence, {console.count(tokens, 'token')}, on {where}:\n{made.table()}")


def _num_positions(model: CausalLM) -> float:
    return getattr(model.config, "max_position_embeddings", None) or math.inf
