"""Reproduce ByteScale's Figure 17, ablation and case study in the simulator, with our policy added.

    python tools/reproduce_paper.py                            # everything, about ten minutes
    python tools/reproduce_paper.py --panel 7B --batches 4     # two panels, seconds
    python tools/reproduce_paper.py --plot fig17.png --json fig17.json

Taken from the paper (arXiv 2502.21231): time per layer by length (Fig. 6a: attention 9.15e-9 s^2 +
1.33e-4 s + 0.10 ms, MLP 2.25e-4 s ms for s tokens), shares of tokens by length (Fig. 4), 32M tokens
per step, models (Table 1), numbers of GPUs, and the speedups (Fig. 17, 20).

What the paper does not state is chosen once for all panels:

* C = 8K tokens per rank (a 312K sequence is on 39 ranks in its Fig. 18). tp x pp: 7B 2 x 1, 13B
  4 x 1, 30B 8 x 1, the others 8 x 2: 512 HDP ranks, and 768 for 8x22B on 12,288 GPUs.
* SLOWDOWN 4.4: Fig. 18a's times per layer, for both attention and MLP, are 4.3 to 4.7x Fig. 6a's.
* A ring step's transfer of 8K tokens' KV takes 1.45 ms in forward (Fig. 18a: 1.4 to 1.6 ms) and
  twice that in backward, where KV gradients travel too. Bytes scale with KV heads per GPU. Each
  step costs another 0.3 ms (Fig. 18a's extra kernel), independent of the model.
* Backward takes 2.15x forward (Fig. 18: 19 s and 41 s).
* A step spends 12 s outside microbatches (optimizer, gradients, data): roughly what remains of the
  balanced GitHub bars after subtracting attention.
* Work per layer scales with hidden size (attention) and with weights (the rest), divided by tp; MoE
  counts active experts; every layer of a stage counts.
* Documents longer than the context are split. Byted's last bar is (1M, 2M], an octave like the
  others.
* Host link: forward hides a ratio of 0.5 at 64K tokens (Fig. 21), 42 KB per token per layer.
* The baseline packs documents first-fit in data order and deals packs out in turn; naive HDP emits
  long documents before packs (Algorithm 1's order). Both balanced policies are those of
  scheduler/policies/bytescale.py. Offload is off except in the ablation's offload rows: Eq. 3 as
  printed gives a 2M sequence 16 ranks, where it alone takes longer than the paper's whole step.

A speedup is the ratio of mean step times over batches, that is, of throughput over many steps.
Batches are stratified draws (each bucket has its exact share), so a few are enough to represent the
paper's 200.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_planner import environment
from paper_figures import ABLATION, CONTEXTS, DATASETS, MODELS, Model

from hdp.scheduler import CostModel, StepPlan, plan, simulate
from hdp.scheduler.render.text import align, markdown
from hdp.scheduler.simulation.simulator import finish_s
from hdp.scheduler.workloads.generate import WORKLOADS, Buckets
from hdp.scheduler.workloads.limit import limit_lengths

CAPACITY, BATCH_TOKENS = 8192, 32 * 2**20
SLOWDOWN, BACKWARD = 4.4, 2.15
TRANSFER_MS, RING_STEP_MS, OUTSIDE_S = 1.45, 0.3, 12.0
KV_HEADS, HEAD = 8, 128


POLICY_NAMES = ("static", "naive", "balance", "ours")


# ---- the cluster's cost ----


def cost_of(model: Model) -> CostModel:
    """Cost of a stage's layers, forward + backward, from Fig. 6a (measured on the 7B model)."""
    seven = MODELS["7B"]

    def weights(m: Model) -> float:
        attention = 2 * m.hidden + 2 * KV_HEADS * HEAD
        return m.hidden * (attention + 3 * m.intermediate) / m.tp

    layers = model.layers // model.pp
    passes = (1 + BACKWARD) * SLOWDOWN * 1e-3 * layers
    heads = (model.hidden / model.tp) / (seven.hidden / seven.tp)
    kv_bytes = 2 * KV_HEADS * HEAD * 2  # of one token and layer, bf16, before tp
    bytes_per_s = CAPACITY * kv_bytes / seven.tp / (TRANSFER_MS * 1e-3)
    kept_bytes = 84e3 * (model.hidden / seven.hidden) / model.tp * layers
    cost = CostModel.from_coefficients(
        quadratic_s=9.15e-9 * passes * heads,
        linear_s=(1.33e-4 + 2.25e-4) * passes * weights(model) / weights(seven),
        kv_bytes_per_token=3 * layers * kv_bytes / model.tp,
        intra_node_bytes_per_s=bytes_per_s,
        inter_node_bytes_per_s=bytes_per_s,
        ring_step_s=3 * layers * RING_STEP_MS * 1e-3,
        forward_share=1 / (1 + BACKWARD),
        num_layers=layers,
        activation_bytes_per_token=kept_bytes,
        name="ByteScale Fig. 6a",
    )
    # A host link fast enough to move half of a 64K sequence's activations during forward.
    forward_s = float(cost.compute_s(65536, 1)) * cost.forward_share
    moved = 0.5 * 65536 * kept_bytes * (layers - 2) / layers
    return replace(cost, host_bytes_per_s=moved / forward_s)


# ---- batches and plans ----


def batches(dataset: str, context: int, count: int, seed: int = 0) -> list[np.ndarray]:
    """`count` batches of 32M tokens in data order, with documents over the context split."""
    sampler = WORKLOADS[dataset].sample
    assert isinstance(sampler, Buckets)
    sampler = replace(sampler, last_at_edge=False)
    documents = stratified(sampler, count * BATCH_TOKENS * 1.02, np.random.default_rng(seed))
    pieces = limit_lengths(documents, context, "split")
    ends = np.cumsum(pieces)
    cuts = np.searchsorted(ends, BATCH_TOKENS * np.arange(1, count + 1), side="right")
    return np.split(pieces, cuts)[:count]


def stratified(sampler: Buckets, num_tokens: float, rng: np.random.Generator) -> np.ndarray:
    """Shuffled lengths: each bucket has its exact share of samples, evenly spread inside it."""
    shares, means = sampler.sample_share(), sampler.means()
    num = num_tokens / float((shares * means).sum())
    parts = []
    for i, share in enumerate(shares.tolist()):
        count = round(num * share)
        low, high = float(sampler.edges[i]), float(sampler.edges[i + 1])
        u = (np.arange(count) + rng.random(count)) / max(count, 1)
        spread = low + (high - low) * u if i == 0 else low / (1 - u * (1 - low / high))
        parts.append(np.ceil(spread).astype(np.int64))
    return rng.permutation(np.concatenate(parts))


def baseline(seqlens: np.ndarray, cp_size: int, model: Model) -> StepPlan:
    """Static DP x CP with packs filled first-fit in data order and dealt out in turn."""
    rooms: list[int] = []
    packs: list[list[int]] = []
    for seq, shard in enumerate((-(-seqlens // cp_size)).tolist()):
        at = next((p for p, room in enumerate(rooms) if room >= shard), None)
        if at is None:
            at = len(rooms)
            rooms.append(CAPACITY)
            packs.append([])
        packs[at].append(seq)
        rooms[at] -= shard
    num_rings = model.ranks // cp_size
    rings: list[range] = [range(0)] * len(seqlens)
    lists: list[list[list[int]]] = [[] for _ in range(num_rings)]
    for p, pack in enumerate(packs):
        lists[p % num_rings].append(pack)
        first = p % num_rings * cp_size
        for seq in pack:
            rings[seq] = range(first, first + cp_size)
    return StepPlan.from_lists(
        seqlens.tolist(),
        rings,
        [lists[rank // cp_size] or [[]] for rank in range(model.ranks)],
        policy="static",
        max_tokens_per_rank=CAPACITY,
        pp_size=model.pp,
    )


def make_plan(
    name: str, seqlens: np.ndarray, context: int, model: Model, cost: CostModel, offload: bool
) -> StepPlan:
    """The plan of one policy of POLICY_NAMES."""
    if name == "static":
        return baseline(seqlens, context // CAPACITY, model)
    if name == "naive":
        is_long = seqlens > CAPACITY
        seqlens = np.concatenate([seqlens[is_long], seqlens[~is_long]])
    return plan(
        seqlens,
        hdp_size=model.ranks,
        max_tokens_per_rank=CAPACITY,
        cost=cost,
        policy={"naive": "bytescale-naive", "balance": "bytescale", "ours": "hdp"}[name],
        pp_size=model.pp,
        offload=offload,
    )


def step_s(
    name: str,
    model: Model,
    cost: CostModel,
    context: int,
    drawn: list[np.ndarray],
    offload: bool = False,
) -> float:
    """Mean step time of a policy over batches, seconds."""
    plans = (make_plan(name, seqlens, context, model, cost, offload) for seqlens in drawn)
    return float(np.mean([finish_s(each, cost) for each in plans])) + OUTSIDE_S


# ---- Figure 17 ----


def figure_17(panels: list[str], count: int) -> list[dict[str, Any]]:
    """One row per model, dataset and context."""
    rows = []
    for name in panels:
        model, cost = MODELS[name], cost_of(MODELS[name])
        for dataset in DATASETS:
            for k, context in enumerate(CONTEXTS):
                drawn = batches(dataset, context, count)
                seconds = {p: step_s(p, model, cost, context, drawn) for p in POLICY_NAMES}
                naive, balance = model.paper(dataset)[k]
                row = {
                    "model": name,
                    "dataset": dataset,
                    "context": context,
                    "seconds": seconds,
                    "paper": {"naive": naive, "balance": balance},
                    "speedup": {p: seconds["static"] / seconds[p] for p in POLICY_NAMES[1:]},
                }
                rows.append(row)
                print("  " + "  ".join(_cells(row)), file=sys.stderr)
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [f"{row['model']} {row['dataset'].split('-')[0]} {row['context'] // 1024}K"]
    for name in ("naive", "balance"):
        paper, here = row["paper"][name], row["speedup"][name]
        cells += [f"{paper:.2f}", f"{here:.2f}", f"{100 * (here / paper - 1):+.0f}%"]
    cells.append(f"{row['speedup']['ours']:.2f}")
    return cells


def table_17(rows: list[dict[str, Any]]) -> list[list[str]]:
    head = ["speedup over static", "naive, paper", "simulated", "off", "balance, paper",
            "simulated", "off", "ours"]  # fmt: skip
    return [head, *(_cells(row) for row in rows)]


# ---- ablation and case study (7B, 2M, Byted) ----


def ablation(count: int) -> list[list[str]]:
    model, cost, context = MODELS["7B"], cost_of(MODELS["7B"]), CONTEXTS[-1]
    drawn = batches("byted-like", context, count)

    base_s = step_s("static", model, cost, context, drawn)
    table = [["7B, 2M, Byted", "step", "speedup", "paper"]]
    for label, name, offload, paper in (
        ("static (MegaScale)", "static", False, 1.0),
        ("+ dynamic communication (naive)", "naive", False, ABLATION["dynamic communication"]),
        ("+ selective offload, Eq. 3 as printed", "naive", True, ABLATION["selective offload"]),
        ("+ balance, without offload", "balance", False, ABLATION["balance"]),
        ("+ balance, Eq. 3 as printed", "balance", True, None),
        ("ours, without offload", "ours", False, None),
        ("ours, offload planned", "ours", True, None),
    ):
        seconds = step_s(name, model, cost, context, drawn, offload)
        cells = [label, f"{seconds:.0f} s", f"{base_s / seconds:.2f}"]
        table.append([*cells, "-" if paper is None else f"{paper:.2f}"])
    return table


def case_study(count: int) -> list[list[str]]:
    """Busy time per rank for the batch with the longest sequence, as in the paper."""
    model, cost, context = MODELS["7B"], cost_of(MODELS["7B"]), CONTEXTS[-1]
    seqlens = max(batches("byted-like", context, count), key=lambda batch: int(batch.max()))
    head = ["case study: one batch", "step", "busy min", "busy max", "busy std", "bubble", "paper"]
    table = [head]
    paper = {"static": "8m40", "naive": "4m32 (60..279, std 68)", "balance": "2m37", "ours": "-"}
    for name in POLICY_NAMES:
        timeline = simulate(make_plan(name, seqlens, context, model, cost, False), cost)
        # The paper's "valid time" includes a rank's ongoing communication.
        busy = timeline.busy_s + timeline.seconds("comm")
        table.append(
            [
                name,
                f"{timeline.makespan_s + OUTSIDE_S:.0f} s",
                f"{busy.min():.0f} s",
                f"{busy.max():.0f} s",
                f"{busy.std():.0f} s",
                f"{100 * timeline.mean_bubble:.0f}%",
                paper[name],
            ]
        )
    return table


# ---- the plot ----


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Draw Figure 17: speedups of the paper, the simulation and our policy by panel."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["model"], row["dataset"]) for row in rows))
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.35 * lines + 0.5), dpi=150)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    bars = (
        ("naive, paper", "#cfd8dc", lambda r: r["paper"]["naive"]),
        ("naive, simulated", "#78909c", lambda r: r["speedup"]["naive"]),
        ("balance, paper", "#b2dfdb", lambda r: r["paper"]["balance"]),
        ("balance, simulated", "#00798c", lambda r: r["speedup"]["balance"]),
        ("ours, simulated", "#d1495b", lambda r: r["speedup"]["ours"]),
    )
    for ax, panel in zip(axes, panels, strict=False):
        mine = [row for row in rows if (row["model"], row["dataset"]) == panel]
        x = np.arange(len(mine))
        for i, (label, color, value) in enumerate(bars):
            heights = [value(row) for row in mine]
            ax.bar(x + (i - 2) * 0.17, heights, 0.16, color=color, label=label)
        ax.axhline(1.0, color="#9aa0a6", linewidth=0.8, linestyle="--")
        ax.set_title(f"{panel[0]} {panel[1].split('-')[0]}", fontsize=10, loc="left")
        ax.set_xticks(x, [f"{row['context'] // 1024}K" for row in mine], fontsize=8)
        ax.tick_params(labelsize=8)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    axes[0].set_ylabel("speedup over static", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    wide = columns > 2
    figure.legend(
        handles, labels, loc="lower center", ncols=5 if wide else 3, frameon=False, fontsize=8.5
    )
    figure.tight_layout(rect=(0, (0.16 if wide else 0.22) / lines, 1, 1))
    figure.savefig(path)


def summary(rows: list[dict[str, Any]]) -> str:
    """Text that tells how far the simulation is from the paper."""
    lines = []
    for name in ("naive", "balance"):
        off = np.array([row["speedup"][name] / row["paper"][name] - 1 for row in rows])
        lines.append(
            f"{name}: {int((abs(off) <= 0.15).sum())} of {len(off)} within 15%, "
            f"mean {100 * off.mean():+.0f}%, worst {100 * off[np.argmax(abs(off))]:+.0f}%"
        )
    gain = np.array([row["speedup"]["ours"] / row["speedup"]["balance"] for row in rows])
    lines.append(f"ours over balance: {gain.min():.2f}x to {gain.max():.2f}x")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--panel", action="append", choices=list(MODELS), help="repeatable")
    parser.add_argument("--batches", type=int, default=8, help="batches of 32M tokens per point")
    parser.add_argument("--plot", help="write Figure 17 to this file")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    arguments = parser.parse_args()
    show = markdown if arguments.markdown else align
    print(environment("tools/reproduce_paper.py"), end="\n\n")
    rows = figure_17(arguments.panel or list(MODELS), arguments.batches)
    print(show(table_17(rows)), summary(rows), sep="\n\n")
    if "7B" in (arguments.panel or MODELS):
        print("", show(ablation(arguments.batches)), sep="\n")
        print("", show(case_study(arguments.batches)), sep="\n")
    if arguments.plot:
        draw(rows, arguments.plot)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
