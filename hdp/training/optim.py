"""AdamW on sharded parameters.

AdamW (Loshchilov and Hutter, arXiv 1711.05101): weight decay is decoupled from the gradient and
scaled by the learning rate. Matrices decay; norms, biases and other vectors do not. The update is
elementwise, so each rank updates its own shards without communication.

Three implementations of the same update share one state dict, so a run may switch between them:

    adamw               torch's fused kernel where the device has one, else its foreach loops
    apex                the multi-tensor kernel of apex's FusedAdam
    transformer_engine  the multi-tensor kernel of Transformer Engine's FusedAdam

The last two raise an error if the library is not installed.

    optimizer = build_optimizer(model, lr=3e-4, weight_decay=0.1)
    set_learning_rate(optimizer, learning_rate(config, step))          # hdp/training/schedule.py
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hdp.attention.kernels.transformer_engine import load_adam as _load_transformer_engine

# Applies one launch's update in place; for its arguments see KernelAdamW._step_group.
AdamKernel = Callable[..., None]


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    backend: Literal["adamw", "apex", "transformer_engine"] = "adamw",
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, in a decaying and a non-decaying group.

    Call it after sharding, which replaces the parameters.

    Raises ValueError for values out of range, a model without trainable parameters, or a back end
    whose library or CUDA device is missing.
    """
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"weight_decay={weight_decay} must be finite and 0 or more")
    groups = decay_groups(model, weight_decay)
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
    if backend in _LIBRARIES:
        return KernelAdamW(groups, library=backend, **options)
    if backend != "adamw":
        known = ", ".join(map(repr, ("adamw", *_LIBRARIES)))
        raise ValueError(f"optimizer {backend!r} is unknown; choose one of {known}")
    device = groups[0]["params"][0].device
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(groups, **options, fused=fused, foreach=not fused)
    optimizer.register_load_state_dict_pre_hook(_keep_options)
    return optimizer


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """The implementation in use, for the start-up report."""
    if isinstance(optimizer, KernelAdamW):
        return f"AdamW ({optimizer.library})"
    kind = "fused" if optimizer.defaults.get("fused") else "foreach"
    return f"AdamW (torch, {kind})"


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; norms, biases and other vectors do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no trainable parameters")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """What decays and what does not, for the start-up report."""
    parts = []
    for group in optimizer.param_groups:
        params = group["params"]
        decay = f"{group['weight_decay']:g}" if group["weight_decay"] else "none"
        parts.append(f"{decay} for {len(params)} tensors, {sum(p.numel() for p in params):,}")
    return f"weight decay: {'; '.join(parts)} parameters"


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from the next step on, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class KernelAdamW(torch.optim.AdamW):
    """torch's AdamW state and groups, updated by a library's multi-tensor kernel.

    The libraries' own FusedAdam classes store their step counts elsewhere, and apex's cannot update
    DTensors. This class passes local shards to the kernel and keeps state in the layout that
    checkpoints know how to reshard.
    """

    def __init__(self, params: Any, *, library: str, **options: Any) -> None:
        self._kernel = _LIBRARIES[library]()
        self.library = library
        super().__init__(params, **options, fused=False, foreach=False)
        device = self.param_groups[0]["params"][0].device
        if device.type != "cuda":
            raise ValueError(
                f"optimizer {library!r} needs parameters on cuda, but they are on {device}; "
                "move them, or use 'adamw'"
            )
        self._overflow = torch.zeros(1, dtype=torch.int32, device=device)
        self.register_load_state_dict_pre_hook(_keep_options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        columns: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        self._init_group(group, *columns)
        params, grads, averages, squares, _, steps = columns
        by_step: dict[int, list[int]] = defaultdict(list)
        for i, step in enumerate(steps):  # CPU tensors: no synchronization with the GPU
            step += 1
            # Shards may be empty. apex's launcher drops its pending work if the last one is.
            if _local(params[i]).numel():
                by_step[int(step.item())].append(i)
        beta1, beta2 = group["betas"]
        for count, members in by_step.items():
            lists = [
                [_local(tensors[i]) for i in members]
                for tensors in (grads, params, averages, squares)
            ]
            self._kernel(
                self._overflow,
                lists,
                float(group["lr"]),
                beta1,
                beta2,
                group["eps"],
                count,
                1,  # decoupled decay
                1,  # bias correction
                group["weight_decay"],
            )


def _keep_options(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Keep this run's options and kernel when loading a state: only the state itself is restored.

    Otherwise a run resumed with another weight decay or beta would silently keep the old one.
    """
    groups = [
        {**saved, **{key: value for key, value in ours.items() if key != "params"}}
        for saved, ours in zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state_dict, "param_groups": groups}


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _load_apex() -> AdamKernel:
    try:
        import amp_C  # apex's compiled extension
        from apex.multi_tensor_apply import multi_tensor_applier
    except ImportError as error:
        raise ValueError(
            f"optimizer 'apex' needs apex, which cannot be imported ({error}); build it with its "
            "C++ and CUDA extensions (github.com/NVIDIA/apex), or use 'adamw'"
        ) from error
    return partial(multi_tensor_applier, amp_C.multi_tensor_adam)


_LIBRARIES: dict[str, Callable[[], AdamKernel]] = {
    "apex": _load_apex,
    "transformer_engine": _load_transformer_engine,
}
