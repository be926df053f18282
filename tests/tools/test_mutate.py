"""tools/mutate.py: mutants are small, and a test that fails kills its mutant."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''def first(a, b):
    """The smaller one, unless both are 3."""
    if not a == b:
        return min(a, b)
    return 1
'''


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import mutate

    return mutate


def test_each_mutant_changes_one_expression(mutate) -> None:
    found = {(m.line, m.before, m.after) for m in mutate.mutants_of(Path("first.py"), SOURCE)}
    assert found == {
        (3, "not a == b", "a == b"),
        (3, "a == b", "a != b"),
        (4, "min", "max"),
        (5, "1", "2"),
    }


def test_a_seed_draws_the_same_mutants_of_the_planner(mutate) -> None:
    drawn = mutate.draw(5, 1, "policies/hdp")
    assert len(drawn) == 5
    assert drawn == mutate.draw(5, 1, "policies/hdp")
    assert all(str(mutant.path).startswith("scheduler/policies/hdp") for mutant in drawn)


def test_what_no_test_notices_survives(mutate, tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(SOURCE)
    command = [sys.executable, "-c", "from first import first; assert first(2, 3) == 2"]
    killed = {
        mutant.after: mutate.is_killed(mutant, tmp_path, command, 30.0)
        for mutant in mutate.mutants_of(Path("first.py"), SOURCE)
    }
    assert killed == {"a == b": True, "a != b": True, "max": True, "2": False}
    assert (tmp_path / "first.py").read_text() == SOURCE
