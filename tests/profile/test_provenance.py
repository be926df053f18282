"""A measurement names the commit of the checkout it was taken in, never another repository's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import hdp
from hdp.profile import provenance
from hdp.profile.provenance import code_version, commit

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", *who, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the module appear to live in tmp_path."""
    copy = tmp_path / "provenance.py"
    copy.write_text("1")
    monkeypatch.setattr(provenance, "__file__", str(copy))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return copy


def test_no_repository(file: Path) -> None:
    assert commit() is None
    assert code_version() == f"hdp {hdp.__version__}"


def test_the_repository_of_a_user(file: Path) -> None:
    """hdp is installed in an environment inside it that git ignores or does not track."""
    git(file.parent, "init", "-q")
    (file.parent / "script.py").write_text("2")
    git(file.parent, "add", "script.py")
    git(file.parent, "commit", "-qm", "a script")
    assert commit() is None


def test_a_checkout(file: Path) -> None:
    git(file.parent, "init", "-q")
    git(file.parent, "add", "-A")
    git(file.parent, "commit", "-qm", "a file")
    git(file.parent, "tag", "-a", "v9.9.9", "-m", "a release")
    head = git(file.parent, "rev-parse", "HEAD").strip()
    known = commit()
    assert known
    assert head.startswith(known), "the commit, not the tag"
    assert code_version() == f"commit {known}"
    file.write_text("3")
    assert commit() == f"{known}-dirty"


def test_no_git(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(file.parent))
    assert commit() is None
