"""`hdp profile` rejects bad input before measuring anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from hdp.cli import main
from hdp.scheduler import CostModel


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plot", "cost.gif"], "cannot draw to cost.gif: use one of .png"),
        (["--plot", "missing/cost.png"], "--plot missing/cost.png: folder "),
        (["--out", "missing/cost.json"], "--out missing/cost.json: folder "),
        (["--max-tokens-per-rank", "64"], "--max-tokens-per-rank 64 is too small"),
        (["--redraw", "cost.json"], "--redraw cost.json needs --plot"),
        (["--redraw", "nothing.json", "--plot", "a.png"], "no cost model in nothing.json"),
        (["--redraw", "cost.json", "--plot", "a.png"], "no measurements"),
    ],
)
def test_bad_input_is_a_message(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if ".png" in flags[-1]:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    CostModel.from_coefficients(quadratic_s=1e-9, linear_s=1e-5).save("cost.json")
    assert main(["profile", *flags]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("hdp profile: ")
    assert message in captured
    monkeypatch.setenv("RANK", "1")
    assert main(["profile", *flags]) == 2
    assert not capsys.readouterr().err, "only rank 0 prints"


def test_bad_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--repeats", "0"], ["--link-bytes", "many"], ["--polt", "a.png"]):
        with pytest.raises(SystemExit) as stop:
            main(["profile", *flags])
        assert stop.value.code == 2
        assert flags[0] in capsys.readouterr().err


def test_missing_torch_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hdp.profile.cli.find_spec", lambda name: None)
    assert main(["profile", "--out", str(tmp_path / "cost.json")]) == 2
    assert "measuring requires torch: pip install" in capsys.readouterr().err
