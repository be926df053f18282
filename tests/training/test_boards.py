"""TensorBoard and W&B behind one writer; whatever a board does, training goes on."""

from __future__ import annotations

import json
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from hdp.training.boards import BoardOptions, Boards
from hdp.training.callbacks import Callback
from hdp.training.metrics import MetricsWriter
from tests.run_ranks import run_ranks
from tests.training.runs import config, write_inputs

pytest.importorskip("PIL")


class FakeWandb:
    """The part of the wandb module that is used; keeps what it is given."""

    def __init__(self, *, key: str | None = "k", reachable: bool = True) -> None:
        self.key = key
        self.taken: set[str] = set()
        self.reachable = reachable
        self.inits: list[dict] = []
        self.logged: list[dict] = []
        self.config: dict = {}
        self.finished = 0

    def Settings(self, **values):
        return values

    def Image(self, path):
        return ("image", path)

    def Table(self, *, columns, data):
        return ("table", columns, data)

    def login(self, *, prompt):
        assert not prompt
        return self.key is not None

    def teardown(self) -> None:
        self.taken.clear()

    def init(self, **options):
        self.inits.append(options)
        if options["id"] in self.taken:
            raise RuntimeError(f"run ID {options['id']} is in use")
        self.taken.add(options["id"])
        if options["mode"] == "online" and not self.reachable:
            raise RuntimeError("Run initialization has timed out after 30.0 sec.\nMore lines")
        config = SimpleNamespace(update=lambda values, **_: self.config.update(values))
        return SimpleNamespace(
            id=options["id"],
            config=config,
            define_metric=lambda *args, **options: None,
            log=self.logged.append,
            finish=self.finish,
        )

    def finish(self, *, exit_code) -> None:
        self.finished += 1
        self.exit_code = exit_code
        self.taken.clear()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def open_boards(folder, said, *, first_step=1, **options):
    return Boards.open(BoardOptions(**options), folder, first_step=first_step, say=said.append)


def picture_in(folder):
    from PIL import Image

    Image.fromarray(np.full((8, 12, 4), 128, dtype=np.uint8)).save(folder / "x.png")
    return folder / "x.png"


def test_all_that_is_shown_reaches_both_boards(tmp_path, wandb):
    said: list[str] = []
    config = {"lr": 0.1, "pattern": None, "model": "a|b"}
    boards = open_boards(tmp_path, said, tensorboard=True, wandb="project", config=config)
    assert boards
    boards.scalars(3, {"loss": 2.0, "mfu": None, "rings": {"1": 2}, "step": 3})
    boards.picture(3, "timeline", picture_in(tmp_path))
    boards.texts(1, "samples", [("a.txt, 3 tokens", "one\ntwo")])
    boards.close()
    assert wandb.config == config and wandb.finished == 1
    assert wandb.logged[0] == {"loss": 2.0, "step": 3}
    assert wandb.logged[1] == {"timeline": ("image", str(tmp_path / "x.png")), "step": 3}
    table = ("table", ["sequence", "text"], [["a.txt, 3 tokens", "one\ntwo"]])
    assert wandb.logged[2] == {"samples": table, "step": 1}
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [e.value for e in board.Scalars("loss")] == [2.0]
    assert (board.Images("timeline")[0].width, board.Images("timeline")[0].height) == (12, 8)
    tags = board.Tags()["tensors"]
    texts = [board.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in sorted(tags)]
    assert r"| model | a\|b |" in texts[0] and "    one\n    two" in texts[1]
    assert said == [f"W&B: project project, run {wandb.inits[0]['id']}, online"]


def test_a_resume_goes_on_in_the_same_run_and_a_new_start_does_not(tmp_path, wandb):
    for first_step in (1, 11, 1):
        open_boards(tmp_path, [], first_step=first_step, wandb="p").close()
    (tmp_path / "wandb.json").write_text("damaged")
    open_boards(tmp_path, [], first_step=21, wandb="p").close()
    open_boards(tmp_path, [], first_step=31, wandb="other").close()
    first, resumed, again, damaged, other = [options["id"] for options in wandb.inits]
    assert first == resumed and len({first, again, damaged, other}) == 4
    assert all(options["resume"] == "allow" for options in wandb.inits)
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": other, "project": "other"}


def test_without_a_key_the_run_is_kept_offline(tmp_path, wandb):
    wandb.key = None
    said: list[str] = []
    open_boards(tmp_path, said, wandb="p").close()
    assert [options["mode"] for options in wandb.inits] == ["offline"], "never asks for a key"
    assert "no API key" in said[0] and "wandb sync" in said[0] and len(said) == 2


def test_without_a_network_the_run_is_kept_offline(tmp_path, wandb):
    wandb.reachable = False
    said: list[str] = []
    boards = open_boards(tmp_path, said, wandb="p")
    boards.scalars(1, {"loss": 1.0})
    boards.close()
    assert [options["mode"] for options in wandb.inits] == ["online", "offline"]
    assert "cannot be reached (Run initialization has timed out after 30.0 sec.)" in said[0]
    assert wandb.logged == [{"loss": 1.0, "step": 1}]


def test_a_run_that_ends_by_an_error_is_a_failed_one(tmp_path, wandb):
    with pytest.raises(ZeroDivisionError), MetricsWriter(tmp_path, tensorboard=False, wandb="p"):
        raise ZeroDivisionError
    assert wandb.exit_code == 1
    with MetricsWriter(tmp_path, tensorboard=False, wandb="p"):
        pass
    assert wandb.exit_code == 0


def test_offline_is_offline_at_once(tmp_path, wandb):
    open_boards(tmp_path, [], wandb="p", wandb_mode="offline").close()
    assert [options["mode"] for options in wandb.inits] == ["offline"]


@pytest.mark.parametrize("package", ["wandb", "torch.utils.tensorboard"])
def test_a_board_that_is_not_installed_is_said_once(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    said: list[str] = []
    name = {"wandb": "wandb", "torch.utils.tensorboard": "tensorboard"}[package]
    with MetricsWriter(
        tmp_path, tensorboard=name == "tensorboard", wandb="p" * (name == "wandb"), say=said.append
    ) as writer:
        writer.log(1, {"eval_loss": 1.0})
        writer.log(2, {"eval_loss": 1.0})
    assert len(said) == 1 and f"pip install {name}" in said[0], said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_board_that_fails_is_dropped_and_the_other_goes_on(tmp_path, wandb):
    said: list[str] = []
    boards = open_boards(tmp_path, said, tensorboard=True, wandb="p")
    boards._boards[1].scalars = lambda *_: (_ for _ in ()).throw(ConnectionError("gone\nfar"))
    for step in (1, 2, 3):
        boards.scalars(step, {"loss": float(step)})
    boards.close()
    stopped = [line for line in said if "stopped" in line]
    assert stopped == ["W&B logging stopped for the rest of this run: gone"]
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("loss")] == [1, 2, 3]


def test_an_upload_that_hangs_does_not_hold_the_run(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr("hdp.training.wandb_board._FINISH_S", 0.05)
    stuck = threading.Event()
    wandb.finish = lambda **_: stuck.wait()
    said: list[str] = []
    began = time.monotonic()
    open_boards(tmp_path, said, wandb="p").close()
    assert time.monotonic() - began < 30
    stuck.set()
    assert "has not uploaded everything" in said[-1]


def _train_with_wandb(rank, world, options):
    """The order of what a run says and what its boards see."""
    from hdp.training.loop import train

    fake = FakeWandb()
    if rank == 0:
        sys.modules["wandb"] = fake  # type: ignore[assignment]
    saves: list[int] = []

    class Watch(Callback):
        def on_save(self, run, progress, checkpoint):
            saves.append(fake.finished)

    train(options, [Watch()])
    keys = [sorted(set(row) - {"step"})[:1] for row in fake.logged]
    return fake.inits, fake.config, keys, fake.finished, saves


def test_a_run_shows_samples_steps_and_its_traced_step(inputs, tmp_path):
    """On rank 0 alone; the upload at the end waits for the last checkpoint."""
    options = config(inputs, tmp_path, steps=2, trace_step=2, wandb="p", wandb_mode="offline")
    first, second = run_ranks(_train_with_wandb, 2, options)
    inits, shown, keys, finished, saves = first
    assert [init["mode"] for init in inits] == ["offline"] and finished == 1
    assert shown["steps"] == 2 and shown["ranks"] == 2
    assert keys == [["samples"], ["bubble"], ["bubble"], ["timeline"]]
    assert saves == [0], "the checkpoint is complete before W&B is finished"
    assert second[0] == [] and second[3] == 0
