"""A refused command leaves the run folder alone; an accepted one says what it changed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hdp.config import TrainConfig
from hdp.training.run_config import EFFECTS, accept, describe_changes
from tests.run_ranks import RankError, run_ranks
from tests.training.runs import config, train_and_listen, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_refused_command_writes_nothing(inputs, tmp_path):
    first = config(inputs, tmp_path / "run", steps=1)
    run_ranks(train_and_listen, 1, first)
    before = _contents(tmp_path)
    anew = dataclasses.replace(first, resume=False, lr=1.0)
    with pytest.raises(
        RankError, match=r"exists but --no-resume was given: choose another .* folder .*checkpoints"
    ):
        run_ranks(train_and_listen, 2, anew)
    other = dataclasses.replace(first, config_overrides='{"hidden_size": 64}', lr=1.0)
    with pytest.raises(RankError, match="is of another model"):
        run_ranks(train_and_listen, 1, other)
    long = dataclasses.replace(first, max_tokens_per_rank=100, lr=1.0)
    with pytest.raises(RankError, match="do not fit"):
        run_ranks(train_and_listen, 1, long)
    assert _contents(tmp_path) == before


def test_a_resumed_run_says_what_changed_and_keeps_the_earlier_configuration(inputs, tmp_path):
    first = config(inputs, tmp_path / "run", steps=2)
    assert "changed since" not in run_ranks(train_and_listen, 1, first)[0]
    earlier = (tmp_path / "run" / "config.json").read_text()
    same = dataclasses.replace(first)
    assert "changed since" not in run_ranks(train_and_listen, 1, same)[0]
    other = dataclasses.replace(first, steps=4, lr=2e-2, batch_tokens=700, log_every=2)
    said = run_ranks(train_and_listen, 2, other)[0]
    kept = tmp_path / "run" / "config-until-2.json"
    assert f"changed since step 2 (the earlier configuration is {kept}):" in said
    assert "--lr: 0.01 -> 0.02  (changes the updates from here on)" in said
    assert "--batch-tokens: 900 -> 700  (changes which sequences come next)" in said
    assert "--steps: 2 -> 4  (changes the updates from here on: the schedule ends" in said
    assert "--log-every: 1 -> 2\n" in said
    assert kept.read_text() == earlier
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == 2e-2
    assert "step 4/4" in said


def test_no_configuration_is_lost(tmp_path):
    base = TrainConfig(run_dir=str(tmp_path))
    assert accept(base, step=0) == []
    for lr in (0.1, 0.2, 0.3):
        assert "--lr" in accept(dataclasses.replace(base, lr=lr), step=5)[1]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "config-until-5-2.json",
        "config-until-5-3.json",
        "config-until-5.json",
        "config.json",
    ]
    (tmp_path / "config.json").write_text("{oops")
    assert "could not be read" in accept(base, step=6)[1]
    assert (tmp_path / "config-until-6.json").read_text() == "{oops"


def test_an_option_that_an_old_file_lacks_had_its_default():
    old = json.loads(TrainConfig().to_json())
    del old["schedule"], old["lr"]
    assert describe_changes(old, TrainConfig()) == []
    assert describe_changes({**old, "gone": 1}, TrainConfig()) == ["  --gone: 1 -> (absent)"]
    [line] = describe_changes(old, TrainConfig(lr=0.5))
    assert line.startswith("  --lr: 0.0003 -> 0.5")


def test_effects_name_fields():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(EFFECTS) <= names
