"""kill -9 under torchrun --max-restarts: the run resumes by itself, with the same losses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import patience
from tests.training.test_loop import config, inputs  # noqa: F401 - a fixture

# Trains; rank 1 kills itself once, at the place named in its arguments.
SABOTEUR = """
import json, os, signal, sys
from pathlib import Path

import torch.distributed as dist

import hdp.checkpoint.files, hdp.attention.comm, hdp.training.loop
from hdp.config import TrainConfig

options, place, step, marker = json.loads(Path(sys.argv[1]).read_text()), *sys.argv[2:]
now = 0


def die():
    if now >= int(step) and dist.get_rank() == 1 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name):
    inner = getattr(owner, name)

    def wrapped(*args, **kwargs):
        die()
        return inner(*args, **kwargs)

    setattr(owner, name, wrapped)


inner_step = hdp.training.loop.train_step


def counted(*arguments):
    global now
    now += 1
    return inner_step(*arguments)


hdp.training.loop.train_step = counted
if place == "ring":  # in the middle of a step: its neighbor waits for keys
    before(hdp.attention.comm.RingComm, "shift")
if place == "save":  # its shard is announced but not written
    before(hdp.checkpoint.files._Writer, "write_data")
hdp.training.loop.train(TrainConfig(**options))
"""


def _run(folder: Path, options: dict, place: str = "nowhere", step: int = 0) -> tuple[dict, str]:
    """Train under torchrun with restarts; returns ({step: loss, as last logged}, stderr)."""
    (folder / "saboteur.py").write_text(SABOTEUR)
    (folder / "options.json").write_text(json.dumps(options))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    limits = ["--max-restarts=2", "--monitor-interval=0.1"]
    done = subprocess.run(
        [
            *torchrun,
            *limits,
            "saboteur.py",
            "options.json",
            place,
            str(step),
            str(folder / "killed"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patience(240),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (folder / "killed").exists() == (place != "nowhere")
    rows = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_killed_ranks_change_no_loss(inputs, tmp_path):  # noqa: F811
    def options(folder):
        full = config(inputs, folder / "run", steps=8, save_every=2, max_tokens_per_rank=352)
        return json.loads(full.to_json())

    folders = {name: tmp_path / name for name in ("whole", "ring", "save")}
    for folder in folders.values():
        folder.mkdir()
    whole, _ = _run(folders["whole"], options(folders["whole"]))
    assert sorted(whole) == [*range(1, 9)]

    ring, stderr = _run(folders["ring"], options(folders["ring"]), "ring", 5)
    assert ring == pytest.approx(whole, rel=1e-6)
    assert re.search(r"resumed from \S+, step [246]", stderr)

    # Killed while saving step 4: the checkpoint of step 2 is the newest complete one.
    save, stderr = _run(folders["save"], options(folders["save"]), "save", 4)
    assert save == pytest.approx(whole, rel=1e-6)
    assert re.search(r"resumed from \S+, step 2,", stderr)
