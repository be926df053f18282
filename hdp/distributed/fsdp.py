"""FSDP2 over the HDP axis, for ranks that run different numbers of microbatches.

Parameters, gradients and optimizer state are sharded over all ranks of the axis (fp32 master
weights); computation is in `param_dtype` and reduction in fp32. Two things differ from plain FSDP2:

Gradients are summed, not averaged. A step's loss is a sum over tokens divided by a count that is
known before the first forward, so the result does not depend on how the batch was split. FSDP2 sums
only if each of its modules is configured to, one by one, and a module that was missed is silently
off by a factor of the world size. `shard` configures all of them and `unshard_all` checks.

Collectives run at only two points in a step. In between, ranks walk different lists of microbatches
and meet in rings on the same communicator, so a collective that some ranks cannot reach next would
deadlock: each side would wait for the other. Hence:

    unshard_all(model)                          # 1. all-gather on all ranks, before the first one
    for i, batch in enumerate(batches):         #    any number of microbatches, rings included
        set_microbatch(model, reduce=overlap and i == len(batches) - 1)
        loss(model(batch, comm)).backward()     # 2. the last backward: reduce-scatters, reshards
    if not overlap:
        reduce_gradients(model)                 # 2. or after it, if overlapping could deadlock
    norm = clip_grad_norm(model, 1.0)           # 3. one all-reduce
    optimizer.step()

`overlap` is a property of the plan. A rank that reduces while its last microbatch is on a ring
waits for its neighbors' reduce-scatter; if the neighbors have other microbatches to run first, they
wait for its part of the ring: a deadlock. So reduction may overlap with backward only if every
ring's microbatch is the last one on all of its ranks or on none: `StepPlan.ends_together`.

The cost: between 1 and 2 a rank holds all parameters in `param_dtype` and, if it has more than one
microbatch, all gradients in fp32.

Invariants (each has a test of the same name in tests/distributed/test_fsdp.py or
test_shards.py):

* gradients_are_dense_sums       on any number of ranks and microbatches, rings included
* no_collective_in_between       only ring transfers run between 1 and the last backward
* every_module_sums              a module without SUM reduction is detected
* rank0_weights_count            all ranks train rank 0's weights, whatever they built themselves
* non_finite_is_seen_by_all      clip_grad_norm raises on every rank or on none
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from hdp.errors import NonFiniteError

# ---- wrapping ----


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    activation_checkpointing: bool = False,
    layers: Sequence[nn.Module] | None = None,
) -> nn.Module:
    """Shard `model` in place over the 1-D `mesh`: one unit per layer, plus one for the rest.

    All ranks get rank 0's weights; the other ranks may hold a model on the meta device. Weights are
    moved to the mesh's device, broadcast and sharded layer by layer, so no rank except rank 0 ever
    holds more than one whole layer. Collective.

    Args:
        model: its forward is the root of each step's computation (hdp.models.causal_lm.CausalLM).
        param_dtype: of parameters and activations in forward and backward; None: the dtype of the
            weights. The weights themselves keep their dtype (fp32 master weights).
        reduce_dtype: for summing gradients over microbatches and ranks; None: the dtype of the
            weights.
        activation_checkpointing: keep only each layer's input, and rerun the layer in backward.
        layers: the units; None: `model.layers`.

    Returns:
        `model`. Its parameters are now DTensors, so create the optimizer after this call.

    Raises:
        ValueError: a mesh with more than one axis; ranks that built different models; rank 0
            without weights; a model without layers. Raised on all ranks.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh {mesh} has {mesh.ndim} axes; pass the 1-D mesh of the HDP axis")
    layers = list(layers if layers is not None else cast(nn.ModuleList, model.layers))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers to shard; pass layers=[...]")
    _check_same_model(model, mesh.get_group())
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype or next(model.parameters()).dtype,
        # A layer's inputs already have the right dtype, and casting them would rebuild every
        # dataclass among its arguments.
        cast_forward_inputs=False,
    )
    for module in [*layers, model]:
        _take_weights_of_rank0(module, mesh)
        if activation_checkpointing and module is not model:
            # Inside FSDP's hooks, so that they run once although the layer runs twice.
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for fsdp_module in _fsdp_modules(model):
        fsdp_module.set_gradient_divide_factor(1.0)  # neither call is recursive
        fsdp_module.set_force_sum_reduction_for_comms(True)
    check_sharded(model)
    return model


def check_sharded(model: nn.Module) -> None:
    """Assert that every parameter is sharded and that every FSDP module sums its gradients."""
    for name, group in _param_groups(model):
        factor, summing = group.gradient_divide_factor, group.force_sum_reduction_for_comms
        assert factor == 1.0 and summing, (
            f"FSDP module {name!r} does not sum gradients (divide factor {factor}, SUM {summing}): "
            "only hdp.distributed.fsdp.shard may wrap modules"
        )
        assert group.post_forward_mesh_info is None, (
            f"FSDP module {name!r} reshards after forward, so its backward would all-gather again"
        )
    sharded = sum(len(group.fsdp_params) for _, group in _param_groups(model))
    total = sum(1 for _ in model.parameters())
    assert sharded == total, f"{total - sharded} of {total} parameters are not sharded"


def _check_same_model(model: nn.Module, group: dist.ProcessGroup) -> None:
    entries = [
        f"{name} {tuple(x.shape)} {x.dtype} {x.requires_grad}"
        for name, x in [*model.named_parameters(), *model.named_buffers()]
    ]
    digest = hashlib.sha256("\n".join(entries).encode()).hexdigest()
    no_weights = [name for name, x in model.named_parameters() if x.is_meta]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, (digest, no_weights[:1]), group=group)
    others = [rank for rank, (other, _) in enumerate(gathered) if other != gathered[0][0]]
    if others:
        raise ValueError(
            f"ranks {others} built a different model from rank 0 (names, shapes or dtypes differ); "
            "use the same config and dtype on all ranks"
        )
    if gathered[0][1]:
        raise ValueError(
            f"rank 0 has no weights ({gathered[0][1][0]} is on the meta device); "
            "build or load its model with skeleton=False"
        )


def _take_weights_of_rank0(module: nn.Module, mesh: DeviceMesh) -> None:
    """Move what is not sharded yet to the mesh's device, with rank 0's values on all ranks."""
    group = mesh.get_group()
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())

    def take(x: Tensor) -> Tensor:
        x = torch.empty_like(x, device=device) if x.is_meta else x.detach().to(device)
        x = x.contiguous()
        dist.broadcast(x, group=group, group_src=0)
        return x

    # One entry per parameter keeps tied parameters tied, and keeps their ids from being reused.
    taken: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for child in _own_modules(module):
        for name, parameter in child._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in taken:
                ours = nn.Parameter(take(parameter), requires_grad=parameter.requires_grad)
                taken[id(parameter)] = (parameter, ours)
            child._parameters[name] = taken[id(parameter)][1]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = take(buffer)


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and its descendants, except those that are already sharded."""
    yield module
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own_modules(child)


# ---- a step ----


def unshard_all(model: nn.Module) -> None:
    """All-gather every parameter, before the first microbatch of a step. Collective.

    Gathering one unit overlaps with copying the previous one into place.
    """
    check_sharded(model)
    _root_state(model)._lazy_init()
    waiting = None
    for module in _fsdp_modules(model):
        handle = module.unshard(async_op=True)
        if waiting is not None:
            waiting.wait()
        waiting = handle
    if waiting is not None:
        waiting.wait()


def reshard_all(model: nn.Module) -> None:
    """Free the gathered parameters after a phase without a backward (which would do it itself)."""
    for module in _fsdp_modules(model):
        module.reshard()


def discard_gradients(model: nn.Module) -> None:
    """Forget all gradients, those of a step that was not finished, too.

    Microbatches add up in the gathered parameters until the reduction; `zero_grad` sees only what
    was reduced.
    """
    for _, group in _param_groups(model):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None
    reshard_all(model)
    for parameter in model.parameters():
        parameter.grad = None


def set_microbatch(model: nn.Module, *, reduce: bool) -> None:
    """Prepare for one microbatch.

    reduce: its backward reduces the gradients of all microbatches so far, layer by layer, and
        reshards. Set it for a rank's last microbatch, on all ranks or on none.

    Raises RuntimeError if the parameters have not been gathered: the forward would then gather them
    itself, at a point that other ranks may never reach.
    """
    sharded = [name for name, group in _param_groups(model) if not group.is_unsharded]
    if sharded:
        raise RuntimeError(
            f"{len(sharded)} FSDP modules are sharded (first {sharded[0]!r}): call "
            "unshard_all(model) before the first microbatch of a step"
        )
    root: Any = model
    root.set_requires_gradient_sync(reduce)
    root.set_reshard_after_backward(reduce)


def reduce_gradients(model: nn.Module) -> None:
    """Reduce the gradients of all microbatches and reshard, after the last backward. Collective.

    For steps in which no backward did so. The reduction does not overlap with compute, but it
    cannot deadlock, whatever the order of the microbatches.
    """
    set_microbatch(model, reduce=True)
    # FSDP2 calls this after a backward, for units whose own hook did not fire: here, all of them.
    _root_state(model)._root_post_backward_final_callback()


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float | None) -> float:
    """Scale all gradients so that their global norm is at most `max_norm`. Collective.

    Costs one all-reduce.

    Args:
        max_norm: None measures the norm without scaling.

    Returns:
        The global norm before scaling, the same number on all ranks.

    Raises:
        NonFiniteError: a gradient is inf or nan. Raised on all ranks; the message names the
            parameters and the ranks that hold the non-finite shards.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive, or None for no clipping")
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    group = next((g.device_mesh.get_group() for _, g in named if isinstance(g, DTensor)), None)
    local = [g.to_local() if isinstance(g, DTensor) else g for _, g in named]
    norms = torch.stack([x.double() for x in torch._foreach_norm(local)]) if local else None
    total = norms.square().sum() if norms is not None else torch.zeros((), dtype=torch.float64)
    if group is not None:
        dist.all_reduce(total, group=group)
    norm = math.sqrt(total.item())
    if not math.isfinite(norm):
        bad = []
        if norms is not None:
            finite = norms.isfinite().tolist()
            bad = [name for (name, _), ok in zip(named, finite, strict=True) if not ok]
        raise NonFiniteError(_describe_non_finite(norm, bad, group))
    if max_norm is not None and local and norm > max_norm:
        torch._foreach_mul_(local, max_norm / norm)
    return norm


def _describe_non_finite(norm: float, bad: list[str], group: dist.ProcessGroup | None) -> str:
    """Collective over `group`: the same text on all ranks."""
    by_rank: list[Any] = [bad]
    if group is not None:
        by_rank = [None] * group.size()
        dist.all_gather_object(by_rank, bad, group=group)
    ranks = [rank for rank, names in enumerate(by_rank) if names]
    names = list(dict.fromkeys(name for names in by_rank for name in names))
    if not names:
        return f"gradient norm is {norm}: all gradients are finite, but their norm overflows"
    return f"gradient norm is {norm}: {len(names)} parameters on ranks {ranks}, first {names[0]}"


# ---- reading ----


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Full tensors by name, on rank 0's CPU; {} on the other ranks. Collective.

    The device holds only one full parameter at a time. Non-persistent buffers are left out, as in
    `state_dict`.
    """
    result = {}
    for name, x in model.state_dict().items():
        rank = 0
        if isinstance(x, DTensor):
            rank, x = x.device_mesh.get_local_rank(), x.full_tensor()
        elif dist.is_initialized():
            rank = dist.get_rank()
        if rank == 0:
            result[name] = x.detach().cpu()
    return result


# ---- FSDP2 internals, all in one place ----


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _root_state(model: nn.Module) -> Any:
    assert isinstance(model, FSDPModule), "call hdp.distributed.fsdp.shard(model, ...) first"
    return model._get_fsdp_state()


def _param_groups(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(module name, FSDPParamGroup) of every FSDP module that owns parameters."""
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # since torch 2.13; one before
            if groups is None:
                groups = [state._fsdp_param_group] if state._fsdp_param_group else []
            for group in groups:
                yield name, group
