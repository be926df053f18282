"""torch.compile for decoder layers (`--compile`), with the attention between them left out.

torch.compile stops where causal_lm.py says that a ring begins, and goes on behind it. So norms,
projections and RoPE before it are graphs, and the output projection, residuals, norm and MLP behind
it, whatever the model calls them. The layers share the graphs, and so do all lengths:
tests/models/test_compiled_layers.py counts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def compile_layers(layers: Iterable[nn.Module], backend: Any = "inductor") -> None:
    """Let each layer's forward be compiled when it is first called.

    Before `parallel.shard`: its hooks, and activation checkpointing, stay outside of the graphs.
    backend: torch.compile's.
    """
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)
