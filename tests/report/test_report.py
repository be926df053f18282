"""`hdp report`: one file, whatever state the run is in, and nothing in it that a file injected."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hdp.cli import main
from hdp.config import TrainConfig
from hdp.report.files import RunFiles
from hdp.report.page import page
from tests.patience import patience
from tests.report.synthetic import write_run
from tests.source_tree import ROOT


def data_of(text: str) -> dict:
    """What the page's script draws."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def report(folder: Path) -> str:
    return page(RunFiles.read(folder))


@pytest.mark.parametrize("ranks", [1, 4, 64])
def test_a_run_has_its_curves_idle_map_and_plan(tmp_path, ranks):
    text = report(write_run(tmp_path / "run", steps=30, ranks=ranks))
    data = data_of(text)
    lines = {chart["title"]: [s["name"] for s in chart["series"]] for chart in data["charts"]}
    assert lines["Loss"] == ["training", "eval loss"]
    assert lines["Bubble"] == lines["Step time"] == ["measured", "planned"]
    assert {"Learning rate", "Gradient norm", "Throughput", "Memory", "MFU"} <= set(lines)
    assert len(data["idle"]["mean"]) == ranks and len(data["idle"]["share"]) == 30
    (plan,) = data["plans"]
    assert [view["title"] for view in plan["timelines"]] == ["planned", "measured"]
    assert "All 30 steps are done." in text


def test_boxes_say_where_each_sequence_is(tmp_path):
    """Each sequence has a compute box on each rank of its ring, with its microbatch there."""
    folder = write_run(tmp_path / "run", steps=3, ranks=4)
    step_plan = RunFiles.read(folder).traces[0].plan
    (view,) = data_of(report(folder))["plans"]
    assert view["ids"] == [1000 + seq for seq in range(step_plan.num_seqs)]
    assert view["names"][:2] == ["data/0.txt", "data/1.txt"]
    for timeline in view["timelines"]:
        found: dict[int, set[int]] = {}
        for i, seq in enumerate(timeline["seq"]):
            if timeline["kind"][i] == 0:
                found.setdefault(seq, set()).add(timeline["row"][i])
                pieces = step_plan.microbatches(timeline["row"][i])[timeline["microbatch"][i]]
                assert seq in [piece.seq for piece in pieces.pieces]
        assert found == {seq: set(step_plan.ring(seq)) for seq in range(step_plan.num_seqs)}
        assert [view["rings"][s] for s in found] == [list(step_plan.ring(s)) for s in found]


def test_one_step_and_100_000_steps(tmp_path):
    short = data_of(report(write_run(tmp_path / "one", steps=1, ranks=2)))
    assert short["charts"][0]["series"][0]["x"] == [1]
    folder = write_run(tmp_path / "long", steps=100_000, ranks=2)
    text = report(folder)
    loss = data_of(text)["charts"][0]["series"][0]
    assert len(loss["x"]) == 600 and loss["x"][-1] == 100_000
    assert all(
        lo <= y <= hi for lo, y, hi in zip(loss["low"], loss["y"], loss["high"], strict=True)
    )
    norm = next(c for c in data_of(text)["charts"] if c["title"] == "Gradient norm")
    assert max(norm["series"][0]["high"]) == 90.0, "a single spike must be seen"
    assert len(text) < 500_000


def test_a_run_that_is_still_going(tmp_path):
    """The last line is being written: no damage, and no reason to wait."""
    folder = write_run(tmp_path / "run", steps=5, ranks=2, wanted=100)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run = RunFiles.read(folder)
    assert not run.problems and len(run.rows) == 5
    assert re.search(r"Step 5 of 100: still going, or stopped early; .* \d+ s ago", page(run))


def test_a_run_before_its_first_step(tmp_path):
    folder = write_run(tmp_path / "run", steps=1, ranks=2, wanted=9)
    (folder / "metrics.jsonl").write_text("")
    (folder / "trace_3.json").unlink()
    text = report(folder)
    assert "No step has been recorded." in text and "metrics.jsonl has no step yet" in text


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "trace_3.json"])
@pytest.mark.parametrize(
    "what",
    [
        b"",
        b"\xff\xfe\x00garbage\n",
        b"[1, 2]\n",
        b'{"step": 3}\n',
        b"[" * 100_000 + b"\n",
        b'{"step": 1e999, "loss": "x", "version": 1, "plan": null}\n',
        b'{"step": 7, "loss": {}, "idle": [9, "a", null], "lr": 1' + b"0" * 500 + b"}\n",
        None,
    ],
)
def test_damaged_and_missing_files_are_named_and_left_out(tmp_path, name, what):
    folder = write_run(tmp_path / "run", steps=6, ranks=2)
    if what is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(what)
    run = RunFiles.read(folder)
    text = page(run)
    data_of(text)
    valid = {b'{"step": 3}\n': "config.json", None: "trace_3.json"}
    a_row = name == "metrics.jsonl" and what is not None and b'"step": 7' in what
    an_object = name == "config.json" and what is not None and what.startswith(b'{"')
    if not (a_row or an_object or valid.get(what) == name):
        assert any(name in problem for problem in run.problems), run.problems
        assert "Left out" in text


def test_damaged_rows_are_counted(tmp_path):
    folder = write_run(tmp_path / "run", steps=3, ranks=2)
    path = folder / "metrics.jsonl"
    path.write_text('nonsense\n{"step": true, "loss": 1}\n' + path.read_text())
    run = RunFiles.read(folder)
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    assert run.problems == ["metrics.jsonl: 2 damaged rows were left out"]


def test_values_that_are_not_finite_are_gaps(tmp_path):
    folder = write_run(tmp_path / "run", steps=4, ranks=2)
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    losses = iter([float("nan"), 2.0, float("inf"), 1.0])
    for row in rows:
        if "loss" in row:
            row["loss"] = next(losses)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss = data_of(report(folder))["charts"][0]["series"][0]
    assert (loss["x"], loss["y"]) == ([2, 4], [2, 1])


@pytest.mark.parametrize("steps", [3, 700])
def test_huge_values_are_drawn_or_left_out(tmp_path, steps):
    folder = write_run(tmp_path / "run", steps=steps, ranks=2)
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    huge = ("step_s", "bubble", "mfu", "loss", "num_tokens", "total_tokens", "hdp_size", "lr")
    changed = [{**row, **dict.fromkeys(huge, 1e308)} if "loss" in row else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert main(["report", str(folder)]) == 0
    titles = [chart["title"] for chart in data_of((folder / "report.html").read_text())["charts"]]
    assert "Loss" in titles and "MFU" not in titles  # as a percentage it is no number


def test_throughput_has_a_unit(tmp_path):
    text = report(write_run(tmp_path / "run", steps=3, ranks=2))
    notes = {chart["title"]: chart["note"] for chart in data_of(text)["charts"]}
    assert notes["Throughput"] == "tokens/s per rank"
    assert "tokens/s of all ranks, median" in text


def test_nothing_from_a_file_becomes_markup(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    folder = write_run(tmp_path / "<b>run", steps=3, ranks=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model": evil, evil: evil}))
    trace = json.loads((folder / "trace_3.json").read_text())
    trace["plan"]["policy"] = evil
    trace["names"][:2] = [evil, "not UTF-8: \udcff"]
    (folder / "trace_3.json").write_text(json.dumps(trace))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, f"eval_loss/{evil}": 1.0}) + "\n")
    text = report(folder)
    assert text.isascii()
    assert text.count("<script") == 2 and "<img" not in text and "<b>run" not in text
    assert html.escape(evil) in text
    names = [series["name"] for series in data_of(text)["charts"][0]["series"]]
    assert any(evil.replace("_", " ") in name or evil in name for name in names)


def test_the_page_loads_nothing(tmp_path):
    text = report(write_run(tmp_path / "run", steps=3, ranks=2))
    assert "default-src 'none'" in text
    assert not re.search(r"\b(src|href)=|url\(|@import|fetch\(|XMLHttp|import\(", text)


def test_the_wheel_has_the_parts_of_the_page():
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = ROOT / "hdp" / "report"
    parts = {path.name for path in folder.iterdir() if path.suffix in (".css", ".js")}
    assert parts == set(packaged["package-data"]["hdp.report"]) == {"page.css", "page.js"}


def test_differences_from_the_defaults(tmp_path):
    text = report(write_run(tmp_path / "run", steps=7, ranks=2))
    table = text.split("Differences from the defaults")[1].split("<details>")[0]
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    default = TrainConfig()
    assert ["steps", "7", str(default.steps)] in cells
    assert ["lr", "0.001", str(default.lr)] in cells
    assert not any(row and row[0] == "seed" for row in cells)


def test_too_many_boxes_are_left_to_perfetto(tmp_path, monkeypatch):
    monkeypatch.setattr("hdp.report.plans.MOST_BOXES", 10)
    (view,) = data_of(report(write_run(tmp_path / "run", steps=3, ranks=4)))["plans"]
    assert all("row" not in timeline and timeline["count"] > 10 for timeline in view["timelines"])


def test_command(tmp_path, capsys):
    folder = write_run(tmp_path / "run", steps=3, ranks=2)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert main(["report", str(folder), "--out", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").read_text() == (folder / "report.html").read_text()
    assert not list(tmp_path.glob("*.partial"))
    capsys.readouterr()
    for wrong, said in ((tmp_path / "no", "no folder"), (tmp_path, "no run in")):
        assert main(["report", str(wrong)]) == 2
        assert said in capsys.readouterr().err
    assert main(["report", str(folder), "--out", str(tmp_path / "no" / "x.html")]) == 1
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.slow
def test_a_browser_draws_it(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    folder = write_run(tmp_path / "run", steps=30, ranks=4)
    assert main(["report", str(folder)]) == 0
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    quiet = ["--disable-background-networking", "--disable-component-update"]
    done = subprocess.run(
        [
            *(browser, *flags, *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
            f"file://{folder / 'report.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=patience(60),
    )
    assert done.stdout.count("<polyline") == 11  # three charts of two curves, five of one
    assert done.stdout.count('class="box') > 40 and done.stdout.count('class="cell"') == 30 * 4
