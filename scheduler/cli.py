"""`python -m hdp.scheduler plan|simulate|compare`, also `hdp plan ...`: plan from a shell.

    hdp plan workload:github-like --num-sequences 2000 --hdp-size 64 --max-tokens-per-rank 32K
    hdp compare lengths.txt --hdp-size 128 --max-tokens-per-rank 16K --plot plans.png
    hdp simulate --plan plan.json --cost cost.json --trace step.json

`plan` plans a batch and shows the plan, `compare` does so under several policies, `simulate` runs a
saved plan. All print an aligned table and a text timeline, or JSON; `--plot` draws the plans and
`--trace` writes Perfetto JSON (https://ui.perfetto.dev). No torch, GPU or cluster needed. Bad input
gives one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hdp.scheduler.costs.cost_model import CostModel
from hdp.scheduler.render.outputs import check_outputs
from hdp.scheduler.render.text import ascii_timeline, seconds_text, summarize, table, tokens_text
from hdp.scheduler.simulation.simulator import simulate
from hdp.scheduler.simulation.timeline import Timeline
from hdp.scheduler.workloads.generate import WORKLOADS
from hdp.scheduler.workloads.limit import OVERLONG
from hdp.scheduler.workloads.read import read_lengths

from .plain import read_bytes
from .planner import POLICIES, plan
from .step_plan import StepPlan

_COMPARED = ("static", "bytescale-naive", "bytescale", "hdp")
# Options that a saved plan already fixes, and cost model fields that are counts.
_OF_A_PLAN = ("hdp_size", "max_tokens_per_rank", "cp_size", "pp_size", "ranks_per_node", "offload",
              "equal_counts", "num_sequences", "num_tokens", "max_length")  # fmt: skip
_INTEGERS = ("num_layers", "ranks_per_host_link")
_EPILOG = "named workloads: " + ", ".join(f"workload:{name}" for name in WORKLOADS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `argv` (default: sys.argv[1:]); returns 0, or 2 after one line about bad input."""
    parser = _parser()
    try:
        arguments, unknown = parser.parse_known_args(argv)
        if unknown:
            parser.error(f"unknown arguments: {' '.join(unknown)}", arguments.command)
        check_outputs(vars(arguments))
        text = _COMMANDS[arguments.command](arguments)
    except SystemExit as stop:  # argparse: --help
        return stop.code if isinstance(stop.code, int) else 2
    except (ValueError, OSError) as error:
        print(f"hdp: {error}", file=sys.stderr)
        return 2
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `hdp plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


# ---- options ----


class _Parser(argparse.ArgumentParser):
    def error(self, message: str, command: str = "") -> NoReturn:
        """Report a bad option like any other bad input: one line, without the usage text."""
        prog = f"{self.prog} {command}".rstrip()
        raise ValueError(f"{message} ({prog} --help lists the options)")


def _parser() -> _Parser:
    parser = _Parser(
        prog="hdp", description="Plan training steps for batches of mixed lengths; no GPU needed."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in (
        ("plan", "plan one batch and show the plan"),
        ("simulate", "run a saved plan (--plan), or a new one, in the simulator"),
        ("compare", "plan one batch by several policies and show them side by side"),
    ):
        command = commands.add_parser(
            name, help=summary, description=summary, epilog=_EPILOG, allow_abbrev=False
        )
        _add_batch(command)
        _add_cluster(command, required=name != "simulate")
        _add_cost(command)
        _add_output(command)
        if name == "compare":
            command.add_argument(
                "--policies",
                default=None,
                metavar="A,B",
                help=f"policies to compare, in this order (default: {','.join(_COMPARED)})",
            )
        else:
            command.add_argument("--policy", default="hdp", choices=list(POLICIES))
        if name == "simulate":
            command.add_argument("--plan", metavar="FILE", help="a plan saved by plan --output")
        if name == "plan":
            command.add_argument("--output", metavar="FILE", help="write the plan as JSON")
    return parser


def _add_batch(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the batch")
    group.add_argument("source", nargs="?", metavar="LENGTHS", help="the same as --lengths")
    group.add_argument(
        "--lengths",
        metavar="FILE|workload:NAME",
        help="text (one length per line), .npy, .json, a token cache folder, or workload:NAME",
    )
    group.add_argument(
        "--num-sequences", type=count, metavar="N", help="default for a workload: 1024"
    )
    group.add_argument(
        "--num-tokens", type=count, metavar="N", help="enough sequences for N tokens"
    )
    group.add_argument("--seed", type=int, default=0, help="for a named workload")
    group.add_argument("--max-length", type=count, metavar="N", help="longest sequence, tokens")
    group.add_argument(
        "--overlong", choices=OVERLONG, default="error", help="what to do with longer ones"
    )


def _add_cluster(command: argparse.ArgumentParser, *, required: bool) -> None:
    group = command.add_argument_group("the cluster")
    group.add_argument("--hdp-size", type=count, required=required, metavar="N", help="ranks")
    group.add_argument(
        "--max-tokens-per-rank",
        type=count,
        required=required,
        metavar="N",
        help="tokens that a rank holds in one microbatch (32768 or 32K)",
    )
    group.add_argument("--cp-size", type=count, metavar="N", help="ranks per ring of policy static")
    group.add_argument("--pp-size", type=count, metavar="N", help="pipeline stages (default: 1)")
    group.add_argument(
        "--ranks-per-node", type=count, metavar="N", help="default: all ranks on one node"
    )
    group.add_argument("--offload", action="store_true", help="let activations move to the host")
    group.add_argument(
        "--equal-counts", action="store_true", help="same number of microbatches on every rank"
    )


def _add_cost(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the cost model")
    group.add_argument(
        "--cost",
        metavar="FILE|PRESET",
        help="a file from `hdp profile`, or a preset: "
        f"{', '.join(CostModel.presets())} (default: h200, LLaMA-7B on H200s)",
    )
    group.add_argument(
        "--coefficient",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override one field, repeatable: quadratic_s, linear_s, fixed_s, kv_bytes_per_token, "
        "inter_node_bytes_per_s, ...",
    )


def _add_output(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("output")
    group.add_argument("--plot", metavar="FILE", help="draw the plans: .png, .svg or .pdf")
    group.add_argument("--trace", metavar="FILE", help="write the timelines as Perfetto JSON")
    group.add_argument("--json", action="store_true", help="print JSON instead of text")
    group.add_argument("--width", type=count, metavar="N", help="columns (default: the terminal's)")
    group.add_argument("--no-timeline", action="store_true", help="print the table only")


def count(text: str) -> int:
    """A positive integer, also 32K or 2M (times 1024)."""
    scale = {"K": 1024, "M": 1024**2}.get(text[-1:].upper(), 1)
    digits = text[:-1] if scale > 1 else text
    if not digits.isdigit() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer (or 32K, 2M)")
    return int(digits) * scale


# ---- commands ----


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    plan: StepPlan
    timeline: Timeline
    summary: dict[str, Any]


def _plan_command(arguments: argparse.Namespace) -> str:
    _check_policy(arguments, [arguments.policy])
    cost, seqlens = _cost(arguments), _seqlens(arguments)
    result = _run_policy(arguments.policy, seqlens, arguments, cost)
    if arguments.output:
        Path(arguments.output).write_text(result.plan.to_json() + "\n", encoding="ascii")
    return _render([result], cost, arguments, with_plan=True)


def _simulate_command(arguments: argparse.Namespace) -> str:
    cost = _cost(arguments)
    if not arguments.plan:
        for option in ("hdp_size", "max_tokens_per_rank"):
            if getattr(arguments, option) is None:
                flag = "--" + option.replace("_", "-")
                raise ValueError(f"give --plan FILE, or lengths and {flag}")
        _check_policy(arguments, [arguments.policy])
        result = _run_policy(arguments.policy, _seqlens(arguments), arguments, cost)
        return _render([result], cost, arguments)
    if arguments.source or arguments.lengths:
        raise ValueError("give lengths or --plan, not both: a saved plan has its own lengths")
    for option in _OF_A_PLAN:
        if getattr(arguments, option):
            flag = "--" + option.replace("_", "-")
            raise ValueError(f"{flag} applies to new plans: {arguments.plan} has its own; omit it")
    try:
        saved = StepPlan.from_json(read_bytes(arguments.plan)).validate()
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        remedy = "give a file that `hdp plan --output` wrote"
        raise ValueError(f"{arguments.plan}: {reason}; {remedy}") from error
    return _render([_simulated(saved, cost)], cost, arguments)


def _compare_command(arguments: argparse.Namespace) -> str:
    cost, seqlens = _cost(arguments), _seqlens(arguments)
    names = arguments.policies.split(",") if arguments.policies else list(_COMPARED)
    if unknown := [name for name in names if name not in POLICIES]:
        raise ValueError(f"unknown policy {unknown[0]!r}; choose from {', '.join(POLICIES)}")
    _check_policy(arguments, names)
    results, refused = [], []
    for name in names:
        try:
            results.append(_run_policy(name, seqlens, arguments, cost))
        except ValueError as error:
            refused.append(f"{name}: no plan: {error}")
    if not results:
        raise ValueError(
            "; ".join(dict.fromkeys(line.partition(": no plan: ")[2] for line in refused))
        )
    for line in refused:
        print(line, file=sys.stderr)
    return _render(results, cost, arguments)


def _check_policy(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    if arguments.cp_size and "static" not in names:
        raise ValueError(f"--cp-size {arguments.cp_size} applies to policy static only: omit it")


_COMMANDS = {"plan": _plan_command, "simulate": _simulate_command, "compare": _compare_command}


def _seqlens(arguments: argparse.Namespace) -> np.ndarray:
    if bool(arguments.source) == bool(arguments.lengths):
        raise ValueError(f"give the lengths once: --lengths FILE or workload:NAME ({_EPILOG})")
    seqlens = read_lengths(
        arguments.lengths or arguments.source,
        num_sequences=arguments.num_sequences,
        num_tokens=arguments.num_tokens,
        seed=arguments.seed,
        max_length=arguments.max_length,
        overlong=arguments.overlong,
    )
    if not len(seqlens):
        raise ValueError(f"all sequences exceed --max-length {arguments.max_length}: raise it")
    return seqlens


def _cost(arguments: argparse.Namespace) -> CostModel:
    cost = CostModel.find(arguments.cost) if arguments.cost else CostModel.preset("h200")
    names = [field.name for field in fields(CostModel)]
    changes: dict[str, Any] = {}
    for text in arguments.coefficient:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            raise ValueError(f"--coefficient {text}: use NAME=VALUE, NAME in {', '.join(names)}")
        try:
            number = value if name == "name" else float(value)
            changes[name] = int(value) if name in _INTEGERS else number
        except ValueError:
            kind = "an integer" if name in _INTEGERS else "a number"
            raise ValueError(f"--coefficient {text}: {value!r} is not {kind}") from None
    cost = replace(cost, **changes) if changes else cost
    if arguments.offload and cost.offloadable == 0.0:
        raise ValueError(
            "--offload: this cost model cannot offload; it needs host_bytes_per_s="
            f"{cost.host_bytes_per_s}, activation_bytes_per_token={cost.activation_bytes_per_token}"
            f" above 0 and num_layers={cost.num_layers} above 2 (--cost, or --coefficient)"
        )
    return cost


def _run_policy(
    name: str, seqlens: np.ndarray, arguments: argparse.Namespace, cost: CostModel
) -> _Result:
    started = time.perf_counter()
    result = plan(
        seqlens,
        hdp_size=arguments.hdp_size,
        max_tokens_per_rank=arguments.max_tokens_per_rank,
        cost=cost,
        policy=name,
        pp_size=arguments.pp_size or 1,
        cp_size=arguments.cp_size if name == "static" else None,
        ranks_per_node=arguments.ranks_per_node,
        offload=arguments.offload,
        equal_counts=arguments.equal_counts,
    )
    return _simulated(result, cost, planning_s=time.perf_counter() - started)


def _simulated(plan: StepPlan, cost: CostModel, planning_s: float | None = None) -> _Result:
    timeline = replace(simulate(plan, cost), title=plan.policy)
    summary = summarize(plan, cost, timeline, planning_s=planning_s)
    return _Result(plan=plan, timeline=timeline, summary=summary)


# ---- output ----


def _render(
    results: Sequence[_Result],
    cost: CostModel,
    arguments: argparse.Namespace,
    *,
    with_plan: bool = False,
) -> str:
    if arguments.plot:
        from hdp.scheduler.render.figure import draw_plans

        drawn = [(_title(r.plan), r.plan, r.timeline) for r in results]
        draw_plans(drawn, arguments.plot, cost=cost)
    if arguments.trace:
        first, *others = [r.timeline for r in results]
        first.to_perfetto(arguments.trace, others=others)
    if arguments.json:
        return json.dumps(_as_json(results, cost, with_plan), indent=None if with_plan else 2)
    parts = [_headline(results[0].plan, cost), table([r.summary for r in results])]
    if not arguments.no_timeline:
        end_s = max(r.timeline.makespan_s for r in results)
        lines = 24 if len(results) == 1 else max(24 // len(results), 6)
        for r in results:
            text = ascii_timeline(
                r.plan, r.timeline, cost=cost, width=arguments.width, max_lines=lines, end_s=end_s
            )
            parts.append(f"{_title(r.plan)}: {seconds_text(r.timeline.makespan_s)}\n{text}")
    return "\n\n".join(parts)


def _headline(plan: StepPlan, cost: CostModel) -> str:
    seqlens = plan.seqlens
    stages = f", {plan.pp_size} pipeline stages" if plan.pp_size > 1 else ""
    return (
        f"{len(seqlens):,} sequences, {int(seqlens.sum()):,} tokens, "
        f"median {tokens_text(int(np.median(seqlens)))}, "
        f"longest {tokens_text(int(seqlens.max()))}; "
        f"{plan.hdp_size:,} ranks of {tokens_text(plan.max_tokens_per_rank)} tokens{stages}\n"
        f"cost model: {cost.name or 'unnamed'}"
    )


def _title(plan: StepPlan) -> str:
    known = {
        "hdp": "Hybrid Data Parallelism",
        "static": "Static mesh (DP x CP)",
        "bytescale-naive": "ByteScale, naive",
        "bytescale": "ByteScale, balanced",
        "bytescale-dp": "ByteScale, DP-balance",
        "bytescale-pp": "ByteScale, PP-balance",
    }
    title = known.get(plan.policy, plan.policy)
    if plan.policy == "static" and "cp_size" in plan.notes:
        title += f", cp = {plan.notes['cp_size']}"
    return title


def _as_json(results: Sequence[_Result], cost: CostModel, with_plan: bool) -> dict[str, Any]:
    first = results[0].plan
    data: dict[str, Any] = {
        "hdp_size": first.hdp_size,
        "pp_size": first.pp_size,
        "max_tokens_per_rank": first.max_tokens_per_rank,
        "num_sequences": first.num_seqs,
        "num_tokens": int(first.seqlens.sum()),
        "cost": {k: None if v == float("inf") else v for k, v in asdict(cost).items()},
        "plans": [r.summary for r in results],
    }
    if with_plan:
        data["plan"] = json.loads(first.to_json())
    return data
