"""Turn measurements into a cost model with a report: the fit, provenance, tables, and the file.

measure.py takes the measurements and calls this. The report is JSON in the cost model's file:

    provenance       machine, versions, commit (of a checkout), date, command, model
    sources          where each field of the cost model comes from
    errors           mean and largest: fitted microbatches, predicted ones, whole predicted steps
    microbatches     measured and predicted seconds of each
    kernels, links, model   rows of kernels.py, links.py, model.py
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from statistics import mean, median
from typing import Any

import torch

from hdp import __version__, console
from hdp.doctor.machine import cpu_name
from hdp.models.causal_lm import transformer_shape
from hdp.offloading.memory import host_bytes_per_rank
from hdp.ops.native import describe
from hdp.scheduler import CostModel
from hdp.scheduler.costs.fit import Fit, Observation, fit_cost
from hdp.training.setup import Run

from .kernels import KERNEL_COLUMNS, Heads, attention_fit, kernels_table, with_predictions
from .links import ACROSS, INSIDE, LINK_COLUMNS, coefficients, links_table
from .model import model_costs
from .picture import ATTENTION_FIELDS, GOAL, draw_profile
from .provenance import commit

Shape = tuple[int, tuple[int, ...]]  # (degree, lengths of the whole sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All measurements, the same on all ranks."""

    kernels: list[dict[str, Any]]
    links: list[dict[str, Any]]
    model: list[dict[str, Any]]
    fitted: dict[Shape, tuple[float, float]]  # seconds of (the microbatch, the rest of the step)
    held_out: dict[Shape, tuple[float, float]]
    wall_s: float


def heads_of(run: Run, repeats: int) -> Heads:
    shape = transformer_shape(run.model)
    cuda = run.mesh.device.type == "cuda"
    return Heads(
        heads=shape["num_heads"],
        kv_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        dtype=torch.bfloat16 if cuda else torch.float32,  # like TrainConfig.dtype "auto"
        device=run.mesh.device,
        repeats=repeats,
        group=run.mesh.hdp_group,
    )


# ---- fitting ----


def fit_all(run: Run, measured: Measured) -> Fit:
    """Set the directly measured fields, then fit the others to the microbatches' times."""
    mesh = run.mesh
    layer = attention_fit(measured.kernels)
    model = model_costs(measured.model)
    changes: dict[str, Any] = {
        "forward_share": model.forward_share,
        "activation_bytes_per_token": model.activation_bytes_per_token,
        "reduce_s": median(out for _, out in [*measured.fitted.values()]),
        "host_memory_bytes": float(host_bytes_per_rank()),
        **coefficients(measured.links),
    }
    if layer is not None:
        changes["small_shard_tokens"] = layer.cost.small_shard_tokens
        changes["ring_step_s"] = layer.cost.ring_step_s * run.cost.num_layers
    if model.temporary_bytes_per_token is not None:
        changes["temporary_bytes_per_token"] = model.temporary_bytes_per_token
    where = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "CPU"
    ranks = f"{mesh.hdp_size} rank{'s' * (mesh.hdp_size > 1)}"
    return fit_cost(
        [observation(run, shape, s) for shape, (s, _) in measured.fitted.items()],
        replace(run.cost, **changes),
        name=f"{run.config.model} on {ranks} of {where}, measured",
        known_links=True,
    )


def observation(run: Run, shape: Shape, seconds: float) -> Observation:
    degree, lengths = shape
    return Observation(
        pieces=tuple((length, degree) for length in lengths),
        seconds=seconds,
        across_nodes=degree > run.mesh.ranks_per_node,
    )


def sources(run: Run, measured: Measured) -> dict[str, str]:
    """Where each field of the cost model comes from, as text."""
    names = {row["link"] for row in measured.links}
    on_rings = run.mesh.hdp_size > 1
    cuda = run.mesh.device.type == "cuda"
    ring = "microbatches on rings" if on_rings else "attention alone, without transfers"
    host = "pinned copies" if cuda else "memory copies, no device"
    estimate = "NOT measured: estimated"
    inside, across = INSIDE in names, ACROSS in names
    return {
        "quadratic_s": "measured: microbatches",
        "linear_s": "measured: microbatches",
        "fixed_s": "measured: microbatches",
        "small_shard_tokens": f"measured: {ring}",
        "ring_step_s": f"measured: {ring}",
        "forward_share": "measured: forward alone, median",
        "reduce_s": "measured: steps minus their microbatch, median",
        "intra_node_bytes_per_s": "measured: P2P inside a node" if inside else estimate,
        "inter_node_bytes_per_s": "measured: P2P across nodes" if across else estimate,
        "host_bytes_per_s": f"measured: {host}, both ways at once, all ranks of a node",
        "ranks_per_host_link": f"measured: {host}, one rank vs. all",
        "host_memory_bytes": "measured: 90% of free memory / ranks on the node",
        "activation_bytes_per_token": "measured: storages saved by autograd",
        "temporary_bytes_per_token": "measured: peak minus saved bytes" if cuda else "computed",
        "kv_bytes_per_token": "computed: keys, values and their gradients",
        "num_layers": "the model's config",
    }


# ---- reporting ----


def microbatch_rows(run: Run, measured: Measured, cost: CostModel) -> list[dict[str, Any]]:
    """Measured and predicted times, JSON-ready; `step_*` is the whole step, with `reduce_s`."""
    rows = []
    for fitted, part in ((True, measured.fitted), (False, measured.held_out)):
        for shape, (inside_s, outside_s) in part.items():
            seen = observation(run, shape, inside_s)
            predicted_s = seen.predicted_s(cost)
            step_s, predicted_step_s = inside_s + outside_s, predicted_s + cost.reduce_s
            rows.append(
                {
                    "lengths": list(shape[1]),
                    "degree": shape[0],
                    "across_nodes": seen.across_nodes,
                    "fitted": fitted,
                    "measured_s": inside_s,
                    "predicted_s": predicted_s,
                    "error": predicted_s / inside_s - 1,
                    "step_s": step_s,
                    "step_error": predicted_step_s / step_s - 1,
                }
            )
    return rows


def make_report(run: Run, measured: Measured, cost: CostModel) -> dict[str, Any]:
    """The report that is saved with the coefficients."""
    attention = attention_fit(measured.kernels)
    model = model_costs(measured.model)
    rows = microbatch_rows(run, measured, cost)
    errors = {}
    for name, key, fitted in (
        ("fitted", "error", True),
        ("predicted", "error", False),
        ("predicted_steps", "step_error", False),
    ):
        sizes = [abs(row[key]) for row in rows if row["fitted"] == fitted]
        errors[name] = {"mean": mean(sizes), "largest": max(sizes)}
    return {
        "provenance": provenance(run, measured),
        "sources": sources(run, measured),
        "errors": errors,
        "microbatches": rows,
        "attention_of_one_layer": attention
        and {name: getattr(attention.cost, name) for name in ATTENTION_FIELDS},
        "without_attention": {"linear_s": model.linear_s, "fixed_s": model.fixed_s},
        "kernels": with_predictions(measured.kernels, attention),
        "links": measured.links,
        "model": measured.model,
    }


def provenance(run: Run, measured: Measured) -> dict[str, Any]:
    mesh, device = run.mesh, run.mesh.device
    heads = heads_of(run, 1)
    cuda, known = device.type == "cuda", commit()
    return {
        "machine": torch.cuda.get_device_name()
        if cuda
        else f"{cpu_name()}, {os.cpu_count()} cores",
        "ranks": mesh.hdp_size,
        "ranks_per_node": mesh.ranks_per_node,
        "torch": torch.__version__,
        "attention": heads.kernel.name,
        "ops": describe(device.type)[0],
        "model": run.config.model,
        "shape": transformer_shape(run.model),
        "dtype": str(heads.dtype).removeprefix("torch."),
        "activation_checkpointing": run.config.activation_checkpointing,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hdp": __version__,
        **({"commit": known} if known else {}),
        "command": " ".join(["hdp", *sys.argv[1:]]),
        "measured_in_s": round(measured.wall_s),
    }


def show_and_save(run: Run, measured: Measured, fit: Fit, *, out: str, plot: str | None) -> None:
    """Print the tables, write the cost model, draw the picture."""
    cost = fit.cost
    report = make_report(run, measured, cost)
    links, kernels = links_table(report["links"]), report["kernels"]
    console.print_table(LINK_COLUMNS, links, title="links")
    console.print_table(
        KERNEL_COLUMNS,
        kernels_table(kernels),
        title=f"\nattention: {report['provenance']['attention']}",
    )
    columns = ["sequences", "ranks", "measured s", "model s", "fit error", "prediction error"]
    table = []
    for row in report["microbatches"]:
        lengths, error = row["lengths"], f"{row['error']:+.1%}"
        text = f"{len(lengths)} x {lengths[0]:,}" if len(set(lengths)) == 1 else str(lengths)
        table.append(
            [text, row["degree"], f"{row['measured_s']:.4f}", f"{row['predicted_s']:.4f}"]
            + ([error, ""] if row["fitted"] else ["", error])
        )
    console.print_table(columns, table, title=f"\n{cost.name}")
    print("\n" + verdict(report, cost))
    cost.save(out, report)
    print(f"wrote {out}: use it with --cost {out}")
    if plot:
        draw_profile(cost, report, plot)
        print(f"wrote {plot}")


def verdict(report: dict[str, Any], cost: CostModel) -> str:
    """Text that tells whether errors are within the goal and the parts agree with the whole."""
    errors, parts = report["errors"], report["attention_of_one_layer"]
    good = "within" if errors["predicted_steps"]["largest"] <= GOAL else "NOT within"
    linear = report["without_attention"]["linear_s"]
    alone = f"{parts['quadratic_s'] * cost.num_layers:.3g}" if parts else "unknown"
    return (
        "errors, mean (largest): "
        + ", ".join(
            f"{name.replace('_', ' ')} {e['mean']:.1%} ({e['largest']:.1%})"
            for name, e in errors.items()
        )
        + f", {good} {GOAL:.0%}\n"
        f"attention, s per token^2: {cost.quadratic_s:.3g} in training, {alone} alone\n"
        f"the rest, s per token: {cost.linear_s:.3g} in training, {linear:.3g} alone"
    )
