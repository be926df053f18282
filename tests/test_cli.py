"""The `hdp` command reaches its subcommands and answers mistakes with a remedy, not a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hdp
from hdp.checkpoint.directory import step_path
from hdp.cli import main, parse_config, run_training
from hdp.config import TrainConfig
from tests.patience import patience


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["-h"], ["--help"]):
        assert main(arguments) == 0
        assert "usage: hdp COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hdp {hdp.__version__}\n"


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    captured = capsys.readouterr()
    assert "unknown command 'trian'" in captured.err
    assert not captured.out


def test_module_form() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hdp", "--version"],
        capture_output=True,
        text=True,
        timeout=patience(60),
    )
    assert done.stdout == f"hdp {hdp.__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "hdp", "nonsense"],
        capture_output=True,
        text=True,
        timeout=patience(60),
    )
    assert done.returncode == 2


def test_flags_are_the_fields_of_the_config() -> None:
    pytest.importorskip("tyro")
    config = parse_config(TrainConfig, ["--policy", "static", "--cp-size", "4", "--steps", "7"])
    assert config == TrainConfig(policy="static", cp_size=4, steps=7)
    assert parse_config(TrainConfig, []) == TrainConfig()


def test_integers_may_have_a_unit() -> None:
    """As in `hdp plan`; text values stay text."""
    pytest.importorskip("tyro")
    flags = ["--max-tokens-per-rank", "16K", "--batch-tokens=1M", "--max_length", "2k"]
    config = parse_config(TrainConfig, [*flags, "--overlong", "drop", "--model", "7M", "--data=4K"])
    assert (config.max_tokens_per_rank, config.batch_tokens) == (16384, 1 << 20)
    assert (config.max_length, config.model, config.data) == (2048, "7M", "4K")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy", "static"], "--cp-size"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--steps", "many"], "many"),
        (["--polcy", "hdp"], "--policy"),
    ],
)
def test_bad_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    with pytest.raises(SystemExit) as stop:
        main(["train", *flags])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out


def test_section_comments_are_no_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "-- step --" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "simulate", "compare"])
def test_scheduler_commands_are_reached(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert command in capsys.readouterr().out
    assert main([command, "--no-such-flag"]) == 2


def test_ctrl_c_before_the_run_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object, **options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("hdp.cli.parse_config", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "hdp: interrupted\n"
    monkeypatch.setattr("hdp.cli._stop_signal", interrupt)  # while torch is being imported
    assert run_training(TrainConfig(run_dir=str(tmp_path))) == 130
    assert capsys.readouterr().err.startswith("hdp: interrupted; no checkpoint in ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("a.jsonl:0", "b.jsonl:1"), "a weight must be above 0"),
        (("a.jsonl", "b.jsonl:1"), "--data gives a.jsonl no weight and others one"),
    ],
)
def test_wrong_weights_are_told_before_a_run_is_set_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("hdp.training.loop.train", lambda *arguments: pytest.fail("was set up"))
    assert run_training(TrainConfig(data=data, run_dir=str(tmp_path))) == 2
    assert message in capsys.readouterr().err


def test_an_error_of_a_run_is_a_message_and_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: TrainConfig, callbacks: object) -> None:
        raise error

    monkeypatch.setattr("hdp.training.loop.train", fail)
    config = TrainConfig(run_dir=str(tmp_path))
    error: BaseException = ValueError("sequence of 9 tokens needs 3 ranks of 4")
    assert run_training(config) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("hdp: error: sequence of 9 tokens needs 3 ranks of 4\n")
    assert "raise error" in (tmp_path / "traceback-0.txt").read_text()
    error = RuntimeError("a lost rank")
    assert run_training(config) == 1
    assert "RuntimeError: a lost rank" in capsys.readouterr().err
    error = KeyError("q_proj")  # nothing that we raise on purpose
    assert run_training(config) == 1
    captured = capsys.readouterr().err
    assert captured.startswith("hdp: error: KeyError: 'q_proj'\n") and "Traceback" not in captured
    error = KeyboardInterrupt()
    assert run_training(config) == 130
    expected = "will start over (use --save-every N to save during training)"
    assert expected in capsys.readouterr().err
    step_path(tmp_path / "checkpoints", 2).mkdir(parents=True)
    assert run_training(config) == 130
    assert "resume from the last checkpoint" in capsys.readouterr().err
    # a run folder that cannot be written: only the message, and no file is named
    (tmp_path / "file").write_text("")
    error = ValueError("cannot make the checkpoint folder")
    assert run_training(TrainConfig(run_dir=str(tmp_path / "file"))) == 2
    assert capsys.readouterr().err == "hdp: error: cannot make the checkpoint folder\n"
    error = RuntimeError("a lost rank")
    monkeypatch.setenv("RANK", "1")
    assert run_training(config) == 1
    assert not capsys.readouterr().err
