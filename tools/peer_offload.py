"""Activation offload as other libraries offer it: what tools/bench_offload.py compares with.

Each peer makes a context for one step of a model. What is not installed is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

StepContext = Callable[[], AbstractContextManager[Any]]


def peer_offloads(model: nn.Module, device: torch.device) -> dict[str, StepContext]:
    """Contexts around forward and backward, by name."""
    found: dict[str, StepContext] = {}
    pinned = device.type == "cuda"
    trl = _trl(model) if pinned else None  # it takes only what is on an accelerator
    if trl is not None:
        found["TRL OffloadActivations"] = lambda: trl
    found["torch save_on_cpu"] = lambda: save_on_cpu(pin_memory=pinned)
    return found


def _trl(model: nn.Module) -> AbstractContextManager[Any] | None:
    """One for all steps, as its trainers have it: streams, pinned memory, no parameters."""
    try:
        from trl.models.activation_offloading import OffloadActivations
    except Exception:  # not installed, or something that it imports fails
        return None
    context = OffloadActivations(use_pin_memory=True, use_streams=True)
    if hasattr(context, "update_model_params"):
        context.update_model_params(model)
    return context


def pinned_bytes(device: torch.device) -> tuple[int | None, int | None]:
    """(held, most in use at once) by torch's pinned allocator, which both peers use; or None."""
    if device.type != "cuda" or not hasattr(torch.cuda, "host_memory_stats"):
        return None, None
    stats = torch.cuda.host_memory_stats()
    return stats.get("allocated_bytes.current"), stats.get("active_bytes.peak")
