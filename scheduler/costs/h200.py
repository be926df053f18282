"""The h200 preset: a cost model of LLaMA-7B from measurements on one H200.

    python -m hdp.scheduler.costs.h200 scheduler/costs/presets/h200.json     # rebuild the file
    CostModel.preset("h200")                                                 # read it
    hdp plan lengths.txt --hdp-size 64 ...            # the default without --cost

This module holds the measurements that the model is fitted to: attention kernels, steps of a few
layers, the host link. What one GPU cannot show (links between GPUs, the gradient reduction) is
assumed; `report()` gives the source of each field, and measured next to predicted times. On your
own GPUs `hdp profile` measures all of it.

  1. attention   five measurements give quadratic_s, small_shard_tokens and ring_step_s
  2. the rest    steps of two and three layers, less their attention, give linear_s
  3. forward     the cost of recomputing every layer's forward gives forward_share

Invariants (tests/scheduler/test_h200.py): this module reproduces the preset's file; a fit to
three lengths of single sequences predicts packed short ones and a ring of 8 within 4%; layer steps
are predicted within 3%.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import median
from typing import Any

import numpy as np

from .cost_model import CostModel
from .fit import Fit, Observation, fit_cost

LLAMA_7B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_heads": 32,
    "num_kv_heads": 32,
    "vocab_size": 32000,
}
MACHINE = {
    "machine": "one NVIDIA H200, driver 580, 16 host cores",
    "torch": "2.11.0+cu130, CUDA 13.0, cuDNN 9.19",
    "attention": "flash-attn-4 4.0.0b36",
    "model": "LLaMA-7B: 32 layers, hidden 4096, 32 heads of 128, MLP 11008, vocabulary 32000; bf16",
    "command": "python -m hdp.scheduler.costs.h200 scheduler/costs/presets/h200.json",
}

# ---- measured: random data, bf16, medians of device events ----

MATMUL_FLOPS_PER_S = 799e12  # 8192 x 8192 x 8192
HOST_BYTES_PER_S = (
    50.8e9  # pinned copies, per direction with both active; alone 55.3 out, 55.4 back
)

# flash-attn 4, causal, 32 heads of 128, forward + backward: (tokens, sequences) -> rate. FLOPs
# are counted as 3.5 * 4 * tokens^2 * heads * head_dim / 2 per sequence.
ATTENTION_FLOPS_PER_S = {
    (8192, 1): 558e12,
    (32768, 1): 629e12,
    (131072, 1): 635e12,
    (1024, 128): 298e12,
}
# One rank of a ring of 8 at 128K tokens: its blocks and fp32 merges on one GPU, with instantaneous
# transfers. Speed relative to an eighth of the whole sequence in one call.
RING_OF_8_SPEED = 0.958

# Steps of LLaMA-7B-shaped layers with cuDNN's attention: (tokens, layers) -> seconds of forward +
# backward, and the same with every layer's forward recomputed in backward.
LAYER_STEPS_S = {
    (32768, 3): (0.357, 0.446),
    (65536, 3): (1.046, 1.327),
    (131072, 2): (2.302, 2.934),
    (131072, 3): (3.449, 4.399),
}
# cuDNN's attention, forward + backward, as above. 64K was not measured: the mean of the other two.
CUDNN_FLOPS_PER_S = {32768: 552e12, 65536: 546.5e12, 131072: 541e12}

# ---- assumed ----

HOST_MEMORY_BYTES = 0.9 * 128 * 2**30  # per GPU: 90% of what the machine had for its one
INTRA_NODE_BYTES_PER_S = 150e9
INTER_NODE_BYTES_PER_S = 40e9

SOURCES = {
    "quadratic_s": "measured: flash-attn 4, fitted to five shapes (attention below), 32 layers",
    "small_shard_tokens": "measured: the same fit",
    "ring_step_s": "measured: the same fit; a ring of 8 emulated on one GPU, without transfers",
    "linear_s": "measured: steps of 2 and 3 layers less their attention (layers below), times 32; "
    "assumed: the output head at the rate of a large matrix product (799 TFLOP/s, measured)",
    "forward_share": "measured: steps with every forward computed again, median of four",
    "host_bytes_per_s": "measured: pinned copies in both directions at once",
    "ranks_per_host_link": "assumed: a link of its own for each GPU; one GPU was measured",
    "host_memory_bytes": "assumed: 90% of 128 GiB for each GPU, as on the machine",
    "kv_bytes_per_token": "arithmetic: keys and values in bf16 twice, their gradients in fp32 once",
    "intra_node_bytes_per_s": "ASSUMED, not measured: 150 GB/s per GPU over NVLink",
    "inter_node_bytes_per_s": "ASSUMED, not measured: 40 GB/s per GPU, 80% of a 400 Gb/s link",
    "activation_bytes_per_token": "arithmetic, 170 KB per token and layer; measured: about 22 GB "
    "per layer at 128K tokens, which is 168 KB",
    "temporary_bytes_per_token": "arithmetic",
    "fixed_s": "not measured: 0",
    "reduce_s": "not measured: 0; gradients, optimizer and gathering of parameters are left out",
}


@cache
def h200_cost() -> CostModel:
    """LLaMA-7B on H200s, no activation checkpointing, all 32 layers on each rank."""
    layers = LLAMA_7B["num_layers"]
    attention = fit_attention(attention_observations()).cost
    head_flops = 6 * LLAMA_7B["hidden_size"] * LLAMA_7B["vocab_size"]
    return CostModel.from_transformer(
        **LLAMA_7B,
        intra_node_bytes_per_s=INTRA_NODE_BYTES_PER_S,
        inter_node_bytes_per_s=INTER_NODE_BYTES_PER_S,
        host_bytes_per_s=HOST_BYTES_PER_S,
        host_memory_bytes=_rounded(HOST_MEMORY_BYTES),
        quadratic_s=_rounded(layers * attention.quadratic_s),
        small_shard_tokens=_rounded(attention.small_shard_tokens),
        ring_step_s=_rounded(layers * attention.ring_step_s),
        linear_s=_rounded(layers * linear_s_per_layer() + head_flops / MATMUL_FLOPS_PER_S),
        forward_share=_rounded(median(again / once - 1 for once, again in LAYER_STEPS_S.values())),
        name="LLaMA-7B on H200, kernels measured, links between GPUs assumed",
    )


def attention_flops(seqlen: int) -> float:
    """FLOPs of one causal sequence in one layer, forward + backward."""
    return 3.5 * 4 * seqlen**2 * LLAMA_7B["hidden_size"] / 2


def attention_observations() -> list[Observation]:
    """One layer's attention, as measured: four shapes on one rank, then one on a ring of 8."""
    found = [
        Observation(pieces=((seqlen, 1),) * count, seconds=count * attention_flops(seqlen) / rate)
        for (seqlen, count), rate in ATTENTION_FLOPS_PER_S.items()
    ]
    whole_s = attention_flops(131072) / ATTENTION_FLOPS_PER_S[131072, 1]
    return [*found, Observation(pieces=((131072, 8),), seconds=whole_s / 8 / RING_OF_8_SPEED)]


def fit_attention(observations: Sequence[Observation]) -> Fit:
    """Fit the attention coefficients of one layer."""
    base = CostModel.from_coefficients(quadratic_s=1.0, linear_s=0.0)
    return fit_cost(observations, base, without=("linear_s", "fixed_s"))


def linear_s_per_layer() -> float:
    """Seconds per token and layer besides attention, forward + backward; relative least squares."""
    measured = np.array([once for once, _ in LAYER_STEPS_S.values()])
    attention = np.array([_cudnn_s(*step) for step in LAYER_STEPS_S])
    tokens = np.array([seqlen * layers for seqlen, layers in LAYER_STEPS_S])
    weight = tokens / measured
    return float(weight @ (1 - attention / measured) / (weight @ weight))


def layers_s(seqlen: int, layers: int) -> float:
    """Predicted seconds of a step of `layers` layers with cuDNN's attention."""
    return _cudnn_s(seqlen, layers) + seqlen * layers * linear_s_per_layer()


def report() -> dict[str, Any]:
    """The source of each field, and measured next to predicted times; JSON-ready."""
    observations = attention_observations()
    attention = fit_attention(observations).cost
    blind = fit_attention(observations[:3]).cost
    return {
        "provenance": MACHINE,
        "sources": SOURCES,
        "attention": [
            _row(
                {"pieces": _grouped(o), "layers": 1},
                o.seconds,
                o.predicted_s(attention),
                {"fitted_to_3_lengths_s": o.predicted_s(blind)},
            )
            for o in observations
        ],
        "layers": [
            _row({"tokens": seqlen, "layers": layers}, once, layers_s(seqlen, layers))
            for (seqlen, layers), (once, _) in LAYER_STEPS_S.items()
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the cost model with its report; print measured and predicted times."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m hdp.scheduler.costs.h200 FILE.json", file=sys.stderr)
        return 2
    summary = report()
    h200_cost().save(arguments[0], summary)
    for part in ("attention", "layers"):
        for row in summary[part]:
            what = row.get("pieces") or f"{row['layers']} layers of {row['tokens']:,} tokens"
            print(
                f"{part:9}  {what!s:36} {1e3 * row['measured_s']:9.2f} ms measured, "
                f"{1e3 * row['predicted_s']:9.2f} predicted  {row['error']:+.1%}"
            )
    print(f"wrote {arguments[0]}")
    return 0


def _cudnn_s(seqlen: int, layers: int) -> float:
    return layers * attention_flops(seqlen) / CUDNN_FLOPS_PER_S[seqlen]


def _grouped(observation: Observation) -> str:
    (seqlen, degree), *_ = observation.pieces
    return f"{len(observation.pieces)} x {seqlen:,} on {degree} rank{'s' * (degree > 1)}"


def _row(
    what: Mapping[str, Any],
    measured_s: float,
    predicted_s: float,
    more: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    times = {"measured_s": measured_s, "predicted_s": predicted_s, **(more or {})}
    rounded = {name: _rounded(value) for name, value in times.items()}
    return {**what, **rounded, "error": round(predicted_s / measured_s - 1, 4)}


def _rounded(value: float) -> float:
    """Round to five digits, more than were measured, so that every machine writes the same file."""
    return float(f"{value:.5g}")


if __name__ == "__main__":
    sys.exit(main())
