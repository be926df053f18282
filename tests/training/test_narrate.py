"""What a run says: the time left, the summary, samples; and whether ranks share cores."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest

from hdp.training.cores import shared_cores_note, shares_cores, usable_cores
from hdp.training.narrate import Narrator, sample_texts
from hdp.training.progress import Progress
from tests.run_ranks import run_ranks
from tests.training.runs import config, train_and_listen, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_lines_of_a_run_in_a_pipe(inputs, tmp_path):
    options = config(inputs, tmp_path / "run", steps=3, save_every=2)
    said, other = run_ranks(train_and_listen, 2, options)
    assert "step" not in other, "only rank 0 speaks"
    lines = [line.removeprefix("hdp: ") for line in said.splitlines()]
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 3 and all(re.search(r"  eta \d+ (s|min|h)", line) for line in steps)
    assert steps[-1].endswith("eta 0 s")
    assert sum("saved step" in line for line in lines) == 2
    text = "\n".join(lines)
    assert re.search(r"^3 steps in \d+ s: [\d,]+ tokens, [\d,]+ tokens/s", text, re.M)
    assert re.search(r"^lowest training loss \d\.\d{4} at step \d$", text, re.M)
    assert f"checkpoints: {tmp_path}/run/checkpoints; metrics: {tmp_path}/run/metrics" in text
    assert f"to look at it: hdp report {tmp_path}/run" in text and "tensorboard" not in text
    # more ranks than cores are said once and marked in each line
    few_cores = usable_cores() < 2
    assert ("share" in text and "CPU cores" in text) == few_cores
    assert all(("%* (plan" in line) == few_cores for line in steps)


def test_a_run_that_has_nothing_to_do_says_no_summary(inputs, tmp_path):
    options = config(inputs, tmp_path / "run", steps=1)
    run_ranks(train_and_listen, 1, options)
    assert "to look at it" not in run_ranks(train_and_listen, 1, options)[0]


def test_time_left_is_the_pace_of_the_last_steps():
    run = SimpleNamespace(config=SimpleNamespace(steps=100), is_main=False, say=print)
    narrator = Narrator(run, Progress(step=10))
    narrator._began = (10, 0.0)
    assert narrator.left_s(11, 60.0) == 89 * 60.0  # the first step compiles
    assert narrator.left_s(12, 62.0) == 88 * 2.0
    assert narrator.left_s(22, 82.0) == pytest.approx(78 * 2.0)  # log_every 10
    assert narrator.left_s(100, 300.0) == 0.0


def test_the_lowest_loss_is_said_and_since_when():
    said: list[str] = []
    options = SimpleNamespace(steps=9, run_dir="r", export_hf="out", tensorboard=True)
    run = SimpleNamespace(config=options, is_main=False, say=said.append)
    progress = Progress(step=5, first_step=6, total_tokens=100)
    with Narrator(run, progress) as narrator:
        for step, loss in ((6, 3.0), (7, 1.5), (8, 1.75)):
            metrics = SimpleNamespace(step=step, loss=loss, line=lambda *_, **__: "step")
            narrator.step(metrics)
            progress.step, progress.total_tokens = step, progress.total_tokens + 1000
    narrator.summary()
    assert re.match(r"3 steps in \d+ s: 3,000 tokens, ", said[3])
    assert said[4] == "lowest training loss 1.5000 at step 7 (since step 6)"
    assert said[6:] == ["model: out", "to look at it: hdp report r; tensorboard --logdir r"]


def test_samples_are_what_the_model_reads():
    class Data:
        tokenizer = SimpleNamespace(decode=lambda ids: "".join(chr(97 + i % 26) for i in ids))

        def __getitem__(self, number):
            return SimpleNamespace(input_ids=np.arange(number))

        def name(self, number):
            return f"f{number}.txt"

    found = sample_texts(Data(), np.array([3, 5000, 2, 1, 9]))
    assert [name for name, _ in found][:2] == ["f3.txt, 3 tokens", "f5000.txt, 5,000 tokens"]
    assert found[0][1] == "abc" and len(found[1][1]) == 1004 and len(found) == 4
    assert sample_texts(object(), np.array([1])) == []


def test_cores_are_those_of_the_affinity_or_the_quota(tmp_path):
    quota = tmp_path / "cpu.max"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert usable_cores(quota) == cores
    for text, expected in (("max 100000", cores), ("50000 100000", 0.5), ("junk", cores)):
        quota.write_text(text)
        assert usable_cores(quota) == expected


def test_ranks_share_cores_only_on_a_cpu(monkeypatch):
    monkeypatch.setattr("hdp.training.cores.usable_cores", lambda: 2)
    for device, ranks, expected in (("cpu", 4, True), ("cpu", 2, False), ("cuda", 4, False)):
        mesh = SimpleNamespace(
            device=SimpleNamespace(type=device), ranks_per_node=ranks, hdp_size=ranks
        )
        assert shares_cores(mesh) is expected
    assert shared_cores_note(mesh).startswith("4 ranks share 2 CPU cores")
