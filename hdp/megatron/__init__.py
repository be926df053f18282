"""HDP inside Megatron training scripts: what a pretrain_gpt.py-style script needs.

    --spec hdp.megatron layer_spec    core attention over rings (attention.py)
    wrap                              each rank runs its own microbatches (schedule.py)
    plan_options, pack_step           a step's plan, and this rank's part of it (microbatch.py)
    forward_step                      and its parts get_batch and loss_func
    check_arguments                   refuses what does not work together (refusals.py)

HDP ranks are Megatron's data parallel replicas; TP, PP, EP, the optimizer and checkpoints stay
Megatron's. docs/megatron.md has the lines to add. Importing this package checks the installed
megatron-core (contract.py) and raises ImportError if it changed what we rely on.
"""

from __future__ import annotations

from .attention import HDPAttention, check_model, layer_spec, use_hdp_attention
from .contract import check_contract
from .microbatch import (
    RankStep,
    forward_step,
    get_batch,
    loss_func,
    pack_step,
    plan_options,
)
from .refusals import check_arguments
from .rotary import use_span_rotary
from .schedule import wrap

__all__ = [
    "HDPAttention",
    "RankStep",
    "check_arguments",
    "check_model",
    "forward_step",
    "get_batch",
    "layer_spec",
    "loss_func",
    "pack_step",
    "plan_options",
    "use_hdp_attention",
    "use_span_rotary",
    "wrap",
]

check_contract()
