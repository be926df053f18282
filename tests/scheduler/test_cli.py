"""`hdp plan|simulate|compare`: what they print, write and refuse."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from hdp.scheduler import CostModel, StepPlan
from hdp.scheduler.cli import main
from tests.patience import patience

CLUSTER = ["--hdp-size", "8", "--max-tokens-per-rank", "4K"]
BATCH = ["workload:lognormal", "--num-sequences", "60", "--max-length", "16K"]
BATCH += ["--overlong", "truncate"]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main([*argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_plan_prints_table_and_timeline(capsys) -> None:
    code, out, err = run(capsys, "plan", *BATCH, *CLUSTER, "--width", "80")
    assert code == 0
    assert err == ""
    assert "60 sequences" in out
    for label in ("step time", "lower bound", "gap to it", "bubble", "sent over rings",
                  "rings, degree x count", "microbatches per rank", "planning"):  # fmt: skip
        assert any(line.startswith(label) for line in out.splitlines()), label
    assert "A 16K on " in out
    assert max(map(len, out.splitlines())) <= 80
    assert out.isascii()


def test_table_columns_are_aligned(capsys) -> None:
    _, out, _ = run(capsys, "compare", *BATCH, *CLUSTER, "--no-timeline")
    table = out.split("\n\n")[1].splitlines()
    assert len({len(line) for line in table}) == 1, out


def test_compare_shows_every_policy_on_one_axis(capsys) -> None:
    code, out, _ = run(capsys, "compare", *BATCH, *CLUSTER, "--policies", "static,hdp")
    assert code == 0
    assert "Static mesh (DP x CP), cp = 4" in out
    assert "Hybrid Data Parallelism" in out
    assert "over the best" in out


def test_compare_goes_from_the_baseline_over_the_paper_to_ours(capsys) -> None:
    code, out, _ = run(capsys, "compare", *BATCH, *CLUSTER, "--json")
    assert code == 0
    names = [summary["policy"] for summary in json.loads(out)["plans"]]
    assert names == ["static", "bytescale-naive", "bytescale-dp", "hdp"]


def test_options_reach_the_planner(capsys) -> None:
    _, out, _ = run(capsys, "plan", *BATCH, *CLUSTER, "--equal-counts", "--json")
    counts = json.loads(out)["plans"][0]["microbatches_per_rank"]
    assert counts["min"] == counts["max"]
    _, out, _ = run(capsys, "plan", *BATCH, *CLUSTER, "--pp-size", "2", "--json")
    assert json.loads(out)["plan"]["pp_size"] == 2


def test_json_is_complete(capsys) -> None:
    code, out, _ = run(capsys, "plan", *BATCH, *CLUSTER, "--json")
    assert code == 0
    data = json.loads(out)
    summary = data["plans"][0]
    assert summary["step_s"] >= summary["lower_bound_s"] > 0
    assert 0 <= summary["bubble"] < 1
    assert sum(summary["rings_by_degree"].values()) == data["num_sequences"] == 60
    assert summary["planning_s"] > 0
    plan = StepPlan.from_json(json.dumps(data["plan"])).validate()
    assert plan.num_seqs == 60


def test_saved_plans_are_simulated(capsys, tmp_path) -> None:
    saved, trace = tmp_path / "plan.json", tmp_path / "trace.json"
    assert run(capsys, "plan", *BATCH, *CLUSTER, "--output", str(saved))[0] == 0
    cost = tmp_path / "cost.json"
    CostModel.from_coefficients(quadratic_s=0.0, linear_s=1.0).save(cost)
    code, out, _ = run(
        capsys, "simulate", "--plan", str(saved), "--cost", str(cost), "--trace", str(trace),
        "--json",
    )  # fmt: skip
    assert code == 0
    data = json.loads(out)
    assert data["cost"]["linear_s"] == 1.0
    assert data["plans"][0]["step_s"] >= data["num_tokens"] / 8
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["ph"] == "X"} == set(range(8))


@pytest.mark.parametrize("command", ["plan", "simulate", "compare"])
def test_a_preset_is_a_cost_model(command: str, capsys) -> None:
    code, named, err = run(capsys, command, *BATCH, *CLUSTER, "--cost", "h200", "--json")
    assert code == 0, err
    _, default, _ = run(capsys, command, *BATCH, *CLUSTER, "--json")
    costs = [json.loads(text)["cost"] for text in (named, default)]
    assert costs[0] == costs[1], "what is taken without --cost"
    assert CostModel(**costs[0]) == CostModel.preset("h200")


def test_coefficients_override_the_cost_model(capsys) -> None:
    extra = ["--coefficient", "quadratic_s=0", "--coefficient", "linear_s=1e-3"]
    extra += ["--coefficient", "kv_bytes_per_token=0"]
    _, out, _ = run(capsys, "plan", *BATCH, *CLUSTER, *extra, "--json")
    data = json.loads(out)
    assert (data["cost"]["quadratic_s"], data["cost"]["linear_s"]) == (0.0, 1e-3)
    assert data["plans"][0]["lower_bound_s"] == pytest.approx(data["num_tokens"] * 1e-3 / 8)


def test_bytes_are_shown_when_the_cost_model_knows_them(capsys) -> None:
    extra = ["--coefficient", "kv_bytes_per_token=1000"]
    _, out, _ = run(capsys, "plan", *BATCH, *CLUSTER, *extra)
    assert "sent over rings" in out


def test_a_plan_without_rings_sends_nothing(capsys, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("5\n" * 64)
    _, out, _ = run(capsys, "plan", str(tmp_path / "a.txt"), *CLUSTER)
    assert any(line.split() == ["sent", "over", "rings", "0", "B"] for line in out.splitlines()), (
        out
    )


def test_lengths_come_from_files(capsys, tmp_path) -> None:
    np.save(tmp_path / "a.npy", np.array([9000, 100, 4000]))
    code, out, _ = run(capsys, "plan", "--lengths", str(tmp_path / "a.npy"), *CLUSTER)
    assert code == 0
    assert "3 sequences, 13,100 tokens" in out


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_is_written(capsys, tmp_path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plans{suffix}"
    argv = [*BATCH, *CLUSTER, "--policies", "static,hdp", "--plot", str(path)]
    assert run(capsys, "compare", *argv)[0] == 0
    assert path.stat().st_size > 10_000


BAD = [
    (["plan", *CLUSTER], "give the lengths once"),
    (["plan", "a.txt", "--lengths", "b.txt", *CLUSTER], "give the lengths once"),
    (["plan", "missing.txt", *CLUSTER], "no file missing.txt"),
    (["plan", "workload:nope", *CLUSTER], "no workload 'nope'"),
    (["plan", *BATCH, "--hdp-size", "8"], "--max-tokens-per-rank"),
    (["plan", *BATCH, "--hdp-size", "0", "--max-tokens-per-rank", "1"], "'0' is not a positive"),
    (["plan", *BATCH, "--hdp-size", "x", "--max-tokens-per-rank", "1"], "'x' is not a positive"),
    (["plan", *BATCH, "--hdp-size", "2", "--max-tokens-per-rank", "4K"], "hdp_size=2"),
    (["plan", *BATCH, *CLUSTER, "--ranks-per-node", "3"], "ranks_per_node=3"),
    (["plan", *BATCH, *CLUSTER, "--policy", "nope"], "invalid choice: 'nope'"),
    (["plan", *BATCH, *CLUSTER, "--cost", "missing.json"], "no cost model in missing.json"),
    (["plan", *BATCH, *CLUSTER, "--cost", "h20"], "did you mean 'h200'? presets: h200"),
    (["plan", *BATCH, *CLUSTER, "--cost", __file__], "test_cli.py: not a CostModel in JSON"),
    (
        ["plan", *BATCH, *CLUSTER, "--max-lenght", "5"],
        "unknown arguments: --max-lenght 5 (hdp plan --help",
    ),
    (["plan", *BATCH, *CLUSTER, "--coefficient", "linear_s"], "use NAME=VALUE"),
    (["plan", *BATCH, *CLUSTER, "--coefficient", "speed=1"], "use NAME=VALUE"),
    (["plan", *BATCH, *CLUSTER, "--coefficient", "linear_s=fast"], "'fast' is not a number"),
    (["plan", *BATCH, *CLUSTER, "--coefficient", "linear_s=nan"], "linear_s=nan"),
    (["plan", *BATCH, *CLUSTER, "--coefficient", "linear_s=-1"], "linear_s=-1.0"),
    (["plan", *BATCH, *CLUSTER, "--plot", "plan.gif"], "cannot draw to plan.gif"),
    (["plan", *BATCH, *CLUSTER, "--plot", "no/such/folder/plan.png"], "no/such/folder"),
    (["plan", *BATCH, *CLUSTER, "--trace", "no/such/folder/a.json"], "no/such/folder"),
    (["plan", "workload:lognormal", "--max-length", "10", *CLUSTER], "longer than max_length=10"),
    (
        ["plan", "workload:github-like", "--max-length", "9", "--overlong", "drop", *CLUSTER],
        "all sequences exceed --max-length 9",
    ),
    (["compare", *BATCH, *CLUSTER, "--policies", "hdp,nope"], "unknown policy 'nope'"),
    (["compare", *BATCH, *CLUSTER, "--policies", "static", "--cp-size", "3"], "cp_size=3"),
    (["plan", *BATCH, *CLUSTER, "--cp-size", "4"], "--cp-size 4 applies to policy static"),
    (["plan", *BATCH, *CLUSTER, "--seed", "-1"], "seed=-1 must be at least 0"),
    (["plan", *BATCH, *CLUSTER, "--coefficient", "num_layers=2.7"], "'2.7' is not an integer"),
    (
        ["plan", *BATCH, *CLUSTER, "--offload", "--coefficient", "host_bytes_per_s=0"],
        "--offload: this cost model cannot offload; it needs host_bytes_per_s=0.0",
    ),
    (["simulate", "--plan", "b.json", "--pp-size", "4"], "--pp-size applies to new plans: b.json"),
    (["simulate", "--plan", "b.json", "--num-tokens", "4"], "--num-tokens applies to new plans"),
    (["simulate"], "give --plan FILE, or lengths and --hdp-size"),
    (["simulate", "--plan", "missing.json"], "missing.json"),
    (["simulate", "a.txt", "--plan", "b.json"], "not both"),
    ([], "COMMAND"),
    (["nope"], "invalid choice: 'nope'"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(a)[:60] for a, _ in BAD])
def test_bad_input_is_exit_code_2(capsys, argv: list[str], message: str) -> None:
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("hdp: ")
    assert err.count("\n") == 1, "bad input is one line"


def test_a_coefficient_is_a_number_where_the_file_has_an_integer(capsys, tmp_path) -> None:
    path = tmp_path / "cost.json"
    path.write_text('{"version": 1, "quadratic_s": 0, "linear_s": 1, "fixed_s": 0}')
    argv = [*BATCH, *CLUSTER, "--cost", str(path), "--coefficient", "fixed_s=0.5", "--json"]
    _, out, _ = run(capsys, "plan", *argv)
    assert json.loads(out)["cost"]["fixed_s"] == 0.5


def test_a_broken_plan_is_named(capsys, tmp_path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{}")
    code, _, err = run(capsys, "simulate", "--plan", str(path))
    assert code == 2
    assert f"{path}: not a StepPlan" in err
    plan = StepPlan.from_lists([8], [[0, 1]], [[[0]], [[0]]], max_tokens_per_rank=2)
    path.write_text(plan.to_json())
    code, _, err = run(capsys, "simulate", "--plan", str(path))
    assert code == 2
    assert "capacity_kept" in err


def test_compare_goes_on_without_a_policy_that_cannot(capsys) -> None:
    argv = [*BATCH, *CLUSTER, "--policies", "static,hdp", "--cp-size", "1", "--json"]
    code, out, err = run(capsys, "compare", *argv)
    assert code == 0
    assert [summary["policy"] for summary in json.loads(out)["plans"]] == ["hdp"]
    assert "static: no plan" in err


def test_help_needs_no_torch_and_no_matplotlib() -> None:
    script = (
        "import sys; from hdp.scheduler.cli import main; code = main(['plan', '--help'])\n"
        "assert code == 0 and not {'torch', 'matplotlib'} & set(sys.modules), sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=patience(60)
    )
    assert done.returncode == 0, done.stderr
    assert "workload:github-like" in done.stdout


def test_module_runs_and_pipes_may_close() -> None:
    command = (
        f"{sys.executable} -m hdp.scheduler plan {' '.join(BATCH + CLUSTER)} --json | head -c 1"
    )
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=patience(60))
    assert done.stdout == "{"
    assert done.stderr == ""
