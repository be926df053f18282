"""hdp: Hybrid Data Parallelism for training on mixed-length sequences.

Importing this package, or `hdp.scheduler`, imports no torch: public names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    # planning
    "CostModel": "hdp.scheduler",
    "StepPlan": "hdp.scheduler",
    "plan": "hdp.scheduler",
    # ranks and models
    "HDPMesh": "hdp.distributed.mesh",
    "build_model": "hdp.models.loading",
    "load_model": "hdp.models.loading",
    "shard": "hdp.distributed.fsdp",
    "transformer_shape": "hdp.models.causal_lm",
    # tokens
    "PackedBatch": "hdp.data.pack",
    "Sample": "hdp.data.sample",
    "SampleList": "hdp.data.sample",
    "StepBatch": "hdp.data.feed",
    "StepFeed": "hdp.data.feed",
    "make_step": "hdp.data.feed",
    "pack_rank": "hdp.data.pack",
    # a step
    "Objective": "hdp.objectives",
    "StepContext": "hdp.training.step",
    "StepResult": "hdp.training.step",
    "forward_step": "hdp.training.step",
    "train_step": "hdp.training.step",
    # attention and memory
    "RingComm": "hdp.attention.comm",
    "RingLayout": "hdp.attention.layout",
    "ring_attn_varlen_func": "hdp.attention.ring",
    "offload": "hdp.offloading.context",
    # a run
    "TrainConfig": "hdp.config",
    "train": "hdp.training.loop",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'hdp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
