"""hdp: Hybrid Data Parallelism for training on mixed-length sequences.

Importing this package, or `hdp.scheduler`, imports no torch: public names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "StepPlan": "hdp.scheduler",
    "CostModel": "hdp.scheduler",
    "plan": "hdp.scheduler",
    "HDPMesh": "hdp.distributed.mesh",
    "PackedBatch": "hdp.data.pack",
    "Sample": "hdp.data.pack",
    "pack_rank": "hdp.data.pack",
    "ring_attn_varlen_func": "hdp.attention.ring",
    "forward_step": "hdp.training.step",
    "train_step": "hdp.training.step",
    "offload": "hdp.offloading.context",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'hdp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
