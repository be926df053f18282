"""What the documents point at exists: files, make targets, `hdp` commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hdp import __version__
from hdp.cli import USAGE
from tests.source_tree import PACKAGE, ROOT, name_of, sources

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
by_name = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def slug(heading: str) -> str:
    """The anchor that a Markdown heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@by_name
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), f"{path.name} links to {target}"
        if anchor and linked.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.M)
            assert anchor in map(slug, headings), f"{path.name}: no heading for #{anchor} in {name}"


# `hdp/attention/ring.py` and the like, and whatever is said of tests: files, patterns, folders.
NAMED = re.compile(
    r"(?<![\w/.~-])((?:hdp|scheduler|csrc|examples|tools|docs)"
    r"/[\w/.*-]*\w\.(?:py|md|txt|json|png|cpp|cu|cuh|h)\b|tests/[\w/.*-]*\w)"
)


def check_named_files(path: Path) -> None:
    for name in NAMED.findall(path.read_text()):
        assert any(ROOT.glob(name)), f"{name_of(path)} names {name}"


@by_name
def test_named_files_exist(path: Path) -> None:
    check_named_files(path)


def test_files_that_the_sources_name_exist() -> None:
    """Docstrings say which tests hold an invariant, and where a figure or a derivation is."""
    for path in [*PACKAGE, *sources("examples", "tools")]:
        check_named_files(path)


@by_name
def test_commands_exist(path: Path) -> None:
    text = path.read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"(?:^|`|&& )(?:[A-Z_]+=\S+ )?make ([a-z][\w-]*)", text, re.M):
        assert target in targets, f"{path.name} says make {target}"
    for command in re.findall(r"(?:^|`|-m )hdp ([a-z]+)\b", text, re.M):
        assert f"\n  {command} " in USAGE, f"{path.name} says hdp {command}"


def test_documents_are_ascii() -> None:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), f"{path.name}: {[c for c in text if not c.isascii()][:5]}"


def test_the_changelog_knows_this_version() -> None:
    """Newest first, dated, and the newest one is what `hdp --version` prints."""
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.+)$", text, re.M)
    releases = headings[headings[0] == "[Unreleased]" :]
    matches = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", h) for h in releases]
    assert all(matches), f"not [X.Y.Z] - YYYY-MM-DD: {releases}"
    assert matches[0] and matches[0][1] == __version__
    dates = [match[2] for match in matches if match]
    assert dates == sorted(dates, reverse=True)
