"""hdp: Hybrid Data Parallelism for training on mixed-length sequences.

Importing this package or `hdp.scheduler` does not import torch: public names load on first use.
docs/api.md lists them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# For type checkers. `x as x` marks a name as re-exported; tests/test_public_api.py checks that
# this block and `_EXPORTS` match.
if TYPE_CHECKING:
    from hdp.attention.comm import RingComm as RingComm
    from hdp.attention.layout import RingLayout as RingLayout
    from hdp.attention.ring import ring_attn_varlen_func as ring_attn_varlen_func
    from hdp.attention.varlen import zigzag_ring_attn_varlen_func as zigzag_ring_attn_varlen_func
    from hdp.attention.varlen import zigzag_rows as zigzag_rows
    from hdp.config import TrainConfig as TrainConfig
    from hdp.data.feed import StepBatch as StepBatch
    from hdp.data.feed import StepFeed as StepFeed
    from hdp.data.feed import make_step as make_step
    from hdp.data.pack import PackedBatch as PackedBatch
    from hdp.data.pack import pack_rank as pack_rank
    from hdp.data.sample import Sample as Sample
    from hdp.data.sample import SampleList as SampleList
    from hdp.data.sample import SampleSource as SampleSource
    from hdp.distributed.fsdp import shard as shard
    from hdp.distributed.mesh import HDPMesh as HDPMesh
    from hdp.errors import ChatTemplateError as ChatTemplateError
    from hdp.errors import CheckpointError as CheckpointError
    from hdp.errors import HDPError as HDPError
    from hdp.errors import NonFiniteError as NonFiniteError
    from hdp.errors import OffloadFreedError as OffloadFreedError
    from hdp.errors import OffloadMemoryError as OffloadMemoryError
    from hdp.errors import OffloadModifiedError as OffloadModifiedError
    from hdp.errors import RankFailure as RankFailure
    from hdp.models.causal_lm import transformer_shape as transformer_shape
    from hdp.models.loading import build_model as build_model
    from hdp.models.loading import load_model as load_model
    from hdp.objectives import DPO as DPO
    from hdp.objectives import KTO as KTO
    from hdp.objectives import BradleyTerry as BradleyTerry
    from hdp.objectives import Clip as Clip
    from hdp.objectives import ClippedWeight as ClippedWeight
    from hdp.objectives import KLPenalty as KLPenalty
    from hdp.objectives import Objective as Objective
    from hdp.objectives import PolicyGradient as PolicyGradient
    from hdp.objectives import RolloutCorrection as RolloutCorrection
    from hdp.objectives import Share as Share
    from hdp.objectives import ValueLoss as ValueLoss
    from hdp.objectives import cross_entropy as cross_entropy
    from hdp.objectives import gae as gae
    from hdp.objectives import group_advantages as group_advantages
    from hdp.objectives import loss_weights as loss_weights
    from hdp.objectives import pair_units as pair_units
    from hdp.objectives import reward_with_kl as reward_with_kl
    from hdp.objectives import sequence_sums as sequence_sums
    from hdp.objectives import token_cross_entropy as token_cross_entropy
    from hdp.objectives import whiten as whiten
    from hdp.offloading.context import offload as offload
    from hdp.scheduler import CostModel as CostModel
    from hdp.scheduler import StepPlan as StepPlan
    from hdp.scheduler import plan as plan
    from hdp.training.callbacks import Callback as Callback
    from hdp.training.loop import train as train
    from hdp.training.metrics import StepMetrics as StepMetrics
    from hdp.training.progress import Progress as Progress
    from hdp.training.setup import Run as Run
    from hdp.training.step import StepContext as StepContext
    from hdp.training.step import StepResult as StepResult
    from hdp.training.step import forward_step as forward_step
    from hdp.training.step import train_step as train_step
    from hdp.training.token_rows import token_rows as token_rows

_EXPORTS = {  # module -> its public names, in the order of docs/api.md
    "hdp.scheduler": ("plan", "StepPlan", "CostModel"),
    "hdp.data.sample": ("Sample", "SampleList", "SampleSource"),
    "hdp.data.pack": ("PackedBatch", "pack_rank"),
    "hdp.data.feed": ("StepBatch", "make_step", "StepFeed"),
    "hdp.attention.layout": ("RingLayout",),
    "hdp.attention.comm": ("RingComm",),
    "hdp.attention.ring": ("ring_attn_varlen_func",),
    "hdp.attention.varlen": ("zigzag_ring_attn_varlen_func", "zigzag_rows"),
    "hdp.models.loading": ("load_model", "build_model"),
    "hdp.models.causal_lm": ("transformer_shape",),
    "hdp.distributed.mesh": ("HDPMesh",),
    "hdp.distributed.fsdp": ("shard",),
    "hdp.offloading.context": ("offload",),
    "hdp.objectives": (
        *("Objective", "Share", "cross_entropy", "token_cross_entropy"),
        *("PolicyGradient", "Clip", "ClippedWeight", "KLPenalty", "RolloutCorrection"),
        *("DPO", "KTO", "BradleyTerry", "pair_units", "ValueLoss", "sequence_sums"),
        *("loss_weights", "group_advantages", "gae", "whiten", "reward_with_kl"),
    ),
    "hdp.training.token_rows": ("token_rows",),
    "hdp.training.step": ("train_step", "forward_step", "StepContext", "StepResult"),
    "hdp.training.loop": ("train",),
    "hdp.training.callbacks": ("Callback",),
    "hdp.training.setup": ("Run",),
    "hdp.training.progress": ("Progress",),
    "hdp.training.metrics": ("StepMetrics",),
    "hdp.config": ("TrainConfig",),
    "hdp.errors": (
        "HDPError",
        "NonFiniteError",
        "RankFailure",
        "CheckpointError",
        "OffloadMemoryError",
        "OffloadFreedError",
        "OffloadModifiedError",
        "ChatTemplateError",
    ),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

if not TYPE_CHECKING:  # else type checkers would accept any name, even hdp.plam, as Any
    __all__ = ["__version__", *_MODULE_OF]

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            return getattr(import_module(_MODULE_OF[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)
