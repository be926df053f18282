"""torch.compile for decoder layers (`--compile`), excluding the attention inside them.

causal_lm.py marks the ring as not compilable, so each layer compiles to two graphs, whatever its
modules are called: norms, projections and RoPE before the ring; output projection, residuals, norm
and MLP after it. All layers and all sequence lengths share the same graphs
(tests/models/test_compiled_layers.py counts them).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def compile_layers(layers: Iterable[nn.Module], backend: Any = "inductor") -> None:
    """Compile each layer's forward when it is first called.

    Call it before `fsdp.shard`, to keep FSDP's hooks and activation checkpointing out of the
    graphs. backend: as for torch.compile.
    """
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)
