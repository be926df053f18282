"""Events of a run, and stopping it between steps: by a callback, by a signal, on any rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from hdp.training.callbacks import Callback
from hdp.training.progress import Progress
from hdp.training.signals import STOPPING, StopSignals
from tests.patience import patience
from tests.run_ranks import RankError, run_ranks
from tests.training.runs import config, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


class Diary(Callback):
    """Writes down each event."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def on_train_start(self, run, progress):
        self.events.append(("start", progress.step, run.config.steps))

    def on_step_end(self, run, progress, metrics):
        assert (progress.step, progress.total_tokens) == (metrics.step, metrics.total_tokens)
        self.events.append(("step", progress.step, metrics.loss))

    def on_save(self, run, progress, checkpoint):
        assert (checkpoint / "hdp.json").exists(), "the event is for a complete checkpoint"
        self.events.append(("save", checkpoint.name))

    def on_train_end(self, run, progress):
        self.events.append(("end", progress.step, progress.stop_reason, progress.stop_signal))


class Act(Callback):
    """Calls `act(progress)` after step `step`, on one rank."""

    def __init__(self, rank, step, act) -> None:
        self.rank, self.step, self.act = rank, step, act

    def on_step_end(self, run, progress, metrics):
        if (run.mesh.hdp_rank, progress.step) == (self.rank, self.step):
            self.act(progress)


def _default_signals() -> None:
    """Undo what the shell that runs the tests set: under nohup or in the background, SIGHUP and
    SIGINT are ignored, and the product leaves ignored signals alone."""
    for number in STOPPING:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)


def _train(rank, world, options, act_rank=None, act_step=None, what=None):
    from hdp.training.loop import train

    _default_signals()
    diary = Diary()
    acts = {
        "stop": lambda progress: progress.stop("loss is low"),
        "raise": lambda progress: 1 / 0,
        **{s.name: lambda progress, s=s: os.kill(os.getpid(), s) for s in STOPPING},
    }
    extra = [] if what is None else [Act(act_rank, act_step, acts[what])]
    train(options, [diary, *extra])
    return diary.events


def test_events_come_in_order_on_all_ranks(inputs, tmp_path):
    options = config(inputs, tmp_path, steps=4, save_every=2)
    first, second = run_ranks(_train, 2, options)
    assert first == second
    kinds = [event[0] for event in first]
    assert kinds[0] == "start" and kinds[-1] == "end" and kinds.count("step") == 4
    assert [event[1] for event in first if event[0] == "save"] == ["step-00000002", "step-00000004"]
    assert first[0] == ("start", 0, 4) and first[-1] == ("end", 4, "", 0)


def test_one_rank_stops_all_after_the_same_step_with_a_checkpoint(inputs, tmp_path):
    """The steps after the resume are those of a run that was never stopped."""
    whole = run_ranks(_train, 2, config(inputs, tmp_path / "whole", steps=6))[0]
    options = config(inputs, tmp_path / "part", steps=6)
    part = run_ranks(_train, 2, options, 1, 3, "stop")
    assert [events[-1] for events in part] == [
        ("end", 3, "requested by another rank", 0),
        ("end", 3, "loss is low", 0),
    ]
    rest = run_ranks(_train, 2, options)[0]
    assert rest[0] == ("start", 3, 6)
    losses = [[e[2] for e in events if e[0] == "step"] for events in (part[0], rest, whole)]
    np.testing.assert_allclose(losses[0] + losses[1], losses[2], rtol=1e-4)


@pytest.mark.parametrize("name", [s.name for s in STOPPING])
def test_a_signal_to_one_rank_saves_and_stops_all(inputs, tmp_path, name):
    out = tmp_path / "out"
    options = config(inputs, tmp_path / "run", steps=6, export_hf=str(out))
    both = run_ranks(_train, 2, options, 1, 2, name)
    number = signal.Signals[name].value
    assert [events[-1] for events in both] == [("end", 2, f"received {name}", number)] * 2
    assert ("save", "step-00000002") in both[0]
    assert not out.exists(), "there is no time for an export"


def test_an_exception_in_a_callback_ends_the_run_on_all_ranks(inputs, tmp_path):
    with pytest.raises(RankError, match="ZeroDivisionError"):
        run_ranks(_train, 2, config(inputs, tmp_path, steps=3), 1, 1, "raise")


def test_what_is_no_callback_is_refused(inputs, tmp_path):
    from hdp.training.loop import train

    with pytest.raises(ValueError, match=r"got <class .*Diary.*pass an instance"):
        train(config(inputs, tmp_path), [Diary])


def test_signals_are_restored_and_ignored_ones_stay_ignored():
    before = {number: signal.getsignal(number) for number in STOPPING}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    said = []
    monkeypatch.setattr("hdp.training.signals.signal.getsignal", lambda number: signal.SIG_DFL)
    with StopSignals(said.append) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes it on: not a second Ctrl-C
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(said) == 1 and "press Ctrl-C again" in said[0]


def test_the_strongest_reason_wins():
    progress = Progress()
    assert not progress.settle_stop(progress.stop_code)
    progress.stop("first")
    progress.stop("second")
    assert progress.settle_stop(progress.stop_code) and progress.stop_reason == "first"
    assert progress.settle_stop(1 + signal.SIGTERM)
    assert (progress.stop_reason, progress.stop_signal) == ("received SIGTERM", signal.SIGTERM)


@pytest.mark.slow
def test_the_command_saves_and_exits_with_the_signal(inputs, tmp_path):
    """As a cluster does it: SIGTERM to a process that trains, then the same command again."""
    command = [
        *(sys.executable, "-m", "hdp", "train", "--model", str(inputs / "model"), "--random-init"),
        *("--data", str(inputs / "text"), "--tokenizer", "bytes", "--device", "cpu"),
        *("--cache-dir", str(tmp_path / "cache"), "--run-dir", str(tmp_path / "run")),
        *("--batch-tokens", "900", "--max-tokens-per-rank", "704", "--no-tensorboard"),
    ]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen([*command, "--steps", "100000"], stderr=subprocess.PIPE) as job:
        deadline = time.monotonic() + patience(120)
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=patience(120))
    assert job.returncode == 128 + signal.SIGTERM, said.decode()
    assert b"SIGTERM: saving a checkpoint after this step" in said
    steps = len(metrics.read_text().splitlines())
    assert f"stopped after step {steps} of 100000: received SIGTERM".encode() in said
    done = subprocess.run(
        [*command, "--steps", str(steps + 1)], capture_output=True, timeout=patience(120)
    )
    assert done.returncode == 0, done.stderr.decode()
    assert f"step {steps + 1}/{steps + 1}".encode() in done.stderr
