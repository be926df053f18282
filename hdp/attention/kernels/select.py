"""Select the block kernel: the fastest installed one that can run, or one requested by name.

The order is by measured speed (docs/gpu.md) and otherwise prefers kernels that need no compiling.
It depends only on the GPU generation, so all ranks of a homogeneous cluster make the same choice.
`cudnn` is never selected automatically: it builds a graph per shape (cudnn.py).

    choose_kernel(device, dtype, head_dim=128)      # .kernel, and .why for logs and `hdp doctor`
    select_kernel(device, dtype, "torch-flash")     # just the kernel
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .base import BlockKernel, Need
from .cpu_flash import CPUFlashKernel
from .cudnn import CudnnKernel
from .flash_attn import FlashAttn2Kernel, FlashAttn3Kernel, FlashAttn4Kernel
from .reference import ReferenceKernel
from .torch_flash import TorchFlashKernel
from .transformer_engine import TransformerEngineKernel

KERNELS: dict[str, type[BlockKernel]] = {
    kernel.name: kernel
    for kernel in (
        FlashAttn4Kernel,
        FlashAttn3Kernel,
        FlashAttn2Kernel,
        TransformerEngineKernel,
        CudnnKernel,
        TorchFlashKernel,
        CPUFlashKernel,
        ReferenceKernel,
    )
}

# GPU generation (major compute capability) -> kernels, best first.
_ORDER: dict[int, tuple[type[BlockKernel], ...]] = {
    8: (FlashAttn2Kernel, TorchFlashKernel, TransformerEngineKernel),
    9: (
        *(FlashAttn4Kernel, FlashAttn3Kernel, TransformerEngineKernel),
        *(FlashAttn2Kernel, TorchFlashKernel),
    ),
    10: (FlashAttn4Kernel, TransformerEngineKernel, FlashAttn2Kernel, TorchFlashKernel),
}
_OTHER_GPUS: tuple[type[BlockKernel], ...] = (TorchFlashKernel, FlashAttn2Kernel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A kernel, and why it was chosen."""

    kernel: BlockKernel
    summary: str  # what the kernel is
    passed_over: tuple[tuple[str, str], ...] = ()  # (name, reason) of better kernels

    @property
    def why(self) -> str:
        """One line for logs."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over)
        return f"{self.summary} ({reasons})" if reasons else self.summary


def choose_kernel(
    device: torch.device,
    dtype: torch.dtype,
    name: str | None = None,
    *,
    head_dim: int | None = None,
) -> Choice:
    """The kernel called `name`, or the best one for this device, dtype and head size.

    head_dim: elements per head; None: not known yet. Raises ValueError for an unknown name, or for
    a kernel that cannot run here, with the reason and the kernel that would be chosen.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    need = Need(device_type=device.type, dtype=dtype, capability=capability, head_dim=head_dim)
    return _choose(need, name)


def select_kernel(
    device: torch.device,
    dtype: torch.dtype,
    name: str | None = None,
    *,
    head_dim: int | None = None,
) -> BlockKernel:
    """`choose_kernel` without the reasons."""
    return choose_kernel(device, dtype, name, head_dim=head_dim).kernel


class KernelPicker:
    """`select_kernel` for one model's queries, cached by device, dtype and head size.

    name: the kernel's name; None: the best one.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self._picked: dict[tuple[torch.device, torch.dtype, int], BlockKernel] = {}

    def __call__(self, q: torch.Tensor) -> BlockKernel:
        """The kernel for queries like `q`, (total_tokens, num_heads, head_dim)."""
        key = (q.device, q.dtype, q.shape[-1])
        kernel = self._picked.get(key)
        if kernel is None:
            kernel = select_kernel(q.device, q.dtype, self.name, head_dim=q.shape[-1])
            self._picked[key] = kernel
        return kernel


@lru_cache  # try imports only once: installed packages do not change during a run
def _choose(need: Need, name: str | None) -> Choice:
    if name is not None and name not in KERNELS:
        raise ValueError(f"attention back end {name!r} is unknown; choose one of {sorted(KERNELS)}")
    if name is not None:
        reason = KERNELS[name].refusal(need)
        if reason is not None:
            raise ValueError(
                f"attention back end {name!r} cannot run here: {reason}; or name none, and "
                f"{_choose(need, None).kernel.name!r} is chosen"
            )
        return _chosen(KERNELS[name])
    refused: list[tuple[str, str]] = []
    for candidate in _candidates(need):
        reason = candidate.refusal(need)
        if reason is None:
            return _chosen(candidate, tuple(refused))
        refused.append((candidate.name, reason))
    return _chosen(ReferenceKernel, tuple(refused))


def _candidates(need: Need) -> tuple[type[BlockKernel], ...]:
    if need.capability is None:
        return (CPUFlashKernel,) if need.device_type == "cpu" else ()
    return _ORDER.get(need.capability[0], _OTHER_GPUS)


def _chosen(kernel: type[BlockKernel], passed_over: tuple[tuple[str, str], ...] = ()) -> Choice:
    summary = (kernel.__doc__ or kernel.name).partition("\n")[0].rstrip(".")
    return Choice(kernel=kernel(), summary=summary, passed_over=passed_over)
