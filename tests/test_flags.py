"""Flags over a file over a preset over defaults; a mistake is one line with the remedy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from hdp.cli import main, parse_config
from hdp.config import TrainConfig
from hdp.config_file import preset_names

pytest.importorskip("tyro")

WRONG = [
    (["--step", "5"], "unknown option --step (did you mean --steps?)"),
    (["--learning-rate", "1e-3"], "unknown option --learning-rate"),
    (["--Lr", "1e-3"], "unknown option --Lr (did you mean --lr?)"),
    (["--polcy=hdp"], "unknown option --polcy (did you mean --policy?)"),
    (["--no-steps"], "unknown option --no-steps"),
    (["--no-resum"], "unknown option --no-resum (did you mean --no-resume?)"),
    (["--steps", "5", "--steps", "6"], "--steps twice"),
    (["--model", "a", "--model=b"], "--model twice"),
    (["--max-length", "4K", "--max_length", "8K"], "--max-length and --max_length"),
    (["--resume", "--no-resume"], "--resume and --no-resume"),
    (["--steps"], "--steps needs a value"),
    (["--lr", "--steps", "5"], "--lr needs a value"),
    (["--steps", "many"], "a whole number such as 16384 or 16K, got 'many'"),
    (["--steps", "1.5"], "a whole number such as 16384 or 16K, got '1.5'"),
    (["--steps", "16G"], "a whole number such as 16384 or 16K, got '16G'"),
    (["--lr", "fast"], "--lr must be a number, got 'fast'"),
    (["--policy", "bytscale"], "did you mean bytescale?"),
    (["--dtype", "float16"], "--dtype must be one of auto, fp64, fp32, bf16"),
    (["--resume", "maybe"], "--resume takes no value, got 'maybe'; write --resume or --no-resume"),
    (["--pattern", "a.py", "b.py"], "--pattern takes one value, got a.py b.py; quote"),
    (["run.yaml"], "'run.yaml' is not an option"),
    (["--steps", "0"], "--steps must be 1 or more, got 0"),
    (["--lr", "nan"], "--lr must be"),
    (["--lr", "inf"], "--lr must be"),
    (["--beta1", "1.0"], "--beta1 must be in [0, 1), got 1.0"),
    (["--batch-tokens", "-5"], "--batch-tokens must be 1 or more, got -5"),
    (["--config-overrides", "{oops"], "is not valid JSON"),
    (["--config-overrides", '{"a": 1, "a": 2}'], "a is given twice"),
    (["--policy", "static"], "--policy static requires --cp-size"),
    (["--overlong", "drop"], "--overlong drop requires --max-length"),
    (["--config", "/nope/run.yaml"], "cannot read the configuration /nope/run.yaml: No such file"),
    (["--preset", "demo-gpu"], "--preset demo-gpu: no such preset (did you mean demo-cpu?)"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=lambda x: " ".join(x)[:40])
def test_a_wrong_flag_is_one_line_with_the_remedy(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", *flags])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and message in captured.err and not captured.out
    assert captured.err.startswith("hdp train: error: ") and captured.err.count("\n") == 1


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\nlr: 2e-4\nresume: false\n")
    given = ["--config", str(path), "--preset", "demo-cpu", "--steps", "9", "--resume"]
    config = parse_config(TrainConfig, given)
    assert (config.steps, config.lr, config.resume) == (9, 2e-4, True)
    assert config.max_length == 2048  # the preset's
    assert config.seed == TrainConfig().seed
    again = parse_config(TrainConfig, [*given[4:], "--preset=demo-cpu", f"--config={path}"])
    assert again == config  # the order of the words does not matter


def test_a_runs_own_configuration_is_an_input(tmp_path: Path) -> None:
    config = TrainConfig(steps=5, max_length=2048, config_overrides='{"a": null}', lr=1e-5)
    (tmp_path / "config.json").write_text(config.to_json())
    assert parse_config(TrainConfig, ["--config", str(tmp_path / "config.json")]) == config


def test_a_wrong_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("steps: 7\nbatch_tokns: 5\n")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(tmp_path / "run.yaml")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "run.yaml:2: unknown key 'batch_tokns' (did you mean batch_tokens?)" in error


def test_help_groups_the_flags_and_shows_the_values_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"batch_tokens": 12345}))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(tmp_path / "run.json"), "--help"])
    out = capsys.readouterr().out
    assert not stop.value.code and "12345" in out
    groups = ("configuration", "model", "data", "step", "parallelism", "optimizer", "output")
    places = [out.index(f"{group} options") for group in groups]
    assert places == sorted(places)


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--preset", "help"])
    out = capsys.readouterr().out
    assert not stop.value.code and all(f"\n  {name} " in out for name in preset_names())


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainConfig):
    """A configuration of one's own."""

    steps: int = 3
    words: tuple[str, ...] = ()
    """Several values."""


def test_a_configuration_of_ones_own_has_lists_and_the_inherited_sections(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = parse_config(Recipe, ["--words", "a", "b", "--seed", "2"])
    assert (config.words, config.seed, config.steps) == (("a", "b"), 2, 3)
    with pytest.raises(SystemExit):
        parse_config(Recipe, ["--help"], prog="recipe")
    assert "Several values." in capsys.readouterr().out
