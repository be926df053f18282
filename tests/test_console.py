"""Progress bars only on terminals, tables on terminals and in pipes, and all without rich."""

from __future__ import annotations

import builtins
import io
import re

import pytest

from hdp import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROWS = [("ring", 1234567, 0.123456), ("[red]static", None, 2.0)]


def test_progress_is_silent_without_a_terminal():
    stream = io.StringIO()
    with console.progress("work", 10, unit="bytes", stream=stream) as advance:
        advance(10)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("total", "unit", "drawn"),
    [
        (10, "bytes", "10/10 bytes"),
        (10, "steps", "10/10 steps"),
        (10, "", "10/10"),
        (None, "bytes", "10/? bytes"),
        (None, "steps", "0:00:0"),
    ],
)
def test_progress_draws_on_a_terminal(total, unit, drawn):
    pytest.importorskip("rich")
    stream = Terminal()
    with console.progress("work", total, unit=unit, stream=stream) as advance:
        advance(10)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "work" in text and drawn in text


def test_progress_propagates_errors():
    with pytest.raises(KeyError), console.progress("work", 1, stream=Terminal()):
        raise KeyError


def test_a_bar_of_steps_on_a_terminal_only():
    pytest.importorskip("rich")
    with console.step_bar(10, stream=io.StringIO()) as update:
        assert update is None
    with console.step_bar(10, enabled=False, stream=Terminal()) as update:
        assert update is None
    stream = Terminal()
    with console.step_bar(10, 3, stream=stream) as update:
        assert update is not None
        update(7, "loss 2.1 [red] eta 3 s")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "7/10" in text and "loss 2.1 [red] eta 3 s" in text


def test_durations():
    seconds = (0, 59.6, 200, 7500, 273_600)
    spoken = [console.duration(s) for s in seconds]
    assert spoken == ["0 s", "1 min", "3 min 20 s", "2 h 5 min", "3 d 4 h"]
    for unknown in (float("inf"), float("nan")):
        assert console.duration(unknown) == "unknown"


def test_counts():
    said = [console.count(number, "rank") for number in (0, 1, 2, 1234)]
    assert said == ["0 ranks", "1 rank", "2 ranks", "1,234 ranks"]


def test_table_text_right_aligns_numbers():
    assert console.table_text(["policy", "tokens", "s"], ROWS, title="T").splitlines() == [
        "T",
        "policy          tokens       s",
        "-----------  ---------  ------",
        "ring         1,234,567  0.1235",
        "[red]static          -       2",
    ]


def test_table_on_a_terminal_prints_markup_as_text():
    pytest.importorskip("rich")
    stream = Terminal()
    console.print_table(["policy", "tokens", "s"], ROWS, stream=stream)
    assert "[red]static" in stream.getvalue() and "1,234,567" in stream.getvalue()


def test_everything_works_without_rich(monkeypatch):
    real_import = builtins.__import__

    def no_rich(name, *args, **kwargs):
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_rich)
    stream = Terminal()
    with console.progress("work", 1, stream=stream) as advance:
        advance(1)
    with console.step_bar(1, stream=stream) as update:
        assert update is None
    console.print_table(["a"], [(1,)], stream=stream)
    assert stream.getvalue() == "a\n-\n1\n"


def test_wrong_rows_and_closed_streams():
    with pytest.raises(ValueError, match=r"row \[1, 2\] has 2 cells for 1 columns"):
        console.table_text(["a"], [(1, 2)])
    stream = io.StringIO()
    stream.close()
    assert not console.is_terminal(stream)
    assert console.table_text(["a", "b"], []) == "a  b\n-  -"


def test_note_goes_to_stderr(capsys):
    console.note("attention: torch flash")
    assert capsys.readouterr() == ("", "hdp: attention: torch flash\n")
