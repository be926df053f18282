"""The forge's workflow runs what there is: make targets, scripts, Pythons that we support."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="comes with transformers")
specifiers = pytest.importorskip("packaging.specifiers", reason="comes with pytest")

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()

# A sdist has no workflows, as it has no .ci.
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="not a checkout")


def jobs() -> Iterator[dict[str, Any]]:
    """Each job as often as its matrix says, with the matrix's values in place of their names."""
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            matrix = job.get("strategy", {}).get("matrix", {"include": [{}]})
            assert set(matrix) == {"include"}, "only `include` is read here"
            yield from (filled(job, values) for values in matrix["include"])


def filled(node: Any, values: dict[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: filled(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [filled(value, values) for value in node]
    if isinstance(node, str):
        return re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda found: values[found[1]], node)
    return node


def steps() -> list[dict[str, Any]]:
    return [step for job in jobs() for step in job["steps"]]


def commands() -> list[list[str]]:
    lines = [line for step in steps() for line in step.get("run", "").splitlines()]
    return [shlex.split(line) for line in lines]


def check_command(words: list[str]) -> None:
    """`make TARGET VARIABLE=value`, or a script of the repository; paths in values exist."""
    program, *arguments = words
    if program != "make":
        assert not arguments, f"{words}: not looked at here"
        assert (ROOT / program).is_file(), f"{program}: no such script"
        assert os.access(ROOT / program, os.X_OK), f"{program} cannot be executed"
        return
    for argument in arguments:
        name, is_variable, value = argument.partition("=")
        known = rf"^{name} \?=" if is_variable else rf"^{name}:"
        assert re.search(known, MAKEFILE, re.M), f"make {argument}: the Makefile has no {name}"
        for word in value.split():
            assert (ROOT / word).exists(), f"make {argument}: no {word}"


def test_commands_exist() -> None:
    assert ["make", "lint"] in commands()
    assert [".ci/run"] in commands()
    for words in commands():
        check_command(words)


@pytest.mark.parametrize(
    "command",
    ["make tests", "make test TEST_ARG=tests", "make test TEST_ARGS=test/data", ".ci/ran", "tox"],
)
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    with pytest.raises(AssertionError):
        check_command(command.split())


def test_pythons_are_those_that_we_support() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    supported = re.search(r'^requires-python = "(.+)"', text, re.M)
    assert supported
    used = {step["with"]["python-version"] for step in steps() if "python" in step.get("uses", "")}
    assert all(isinstance(version, str) for version in used), "3.10 without quotes is 3.1"
    allowed = specifiers.SpecifierSet(supported[1])
    assert all(version in allowed for version in used), f"{used}, requires-python {supported[1]}"
    assert supported[1] == ">=3.10"
    assert "3.10" in used, "the oldest one is tested"


def test_systems_are_those_that_we_claim() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    used = {str(job["runs-on"]).partition("-")[0] for job in jobs()}
    for system, runner in (("POSIX :: Linux", "ubuntu"), ("MacOS", "macos"), ("Microsoft", "win")):
        assert (f"Operating System :: {system}" in text) == (runner in used), system


def test_actions_have_a_major_version() -> None:
    actions = [step["uses"] for step in steps() if "uses" in step]
    loose = [name for name in actions if not re.fullmatch(r"[\w-]+/[\w-]+@v\d+", name)]
    assert actions
    assert not loose, f"name a major version: {loose}"


def test_files_that_are_named_exist() -> None:
    for step in steps():
        if path := step.get("with", {}).get("cache-dependency-path"):
            assert (ROOT / path).exists(), path


def test_jobs_end_and_may_only_read() -> None:
    assert all(0 < job["timeout-minutes"] <= 60 for job in jobs())
    for path in WORKFLOWS:
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}


def test_no_registry_is_named() -> None:
    """pip's own settings say where packages come from."""
    for path in [*WORKFLOWS, *(ROOT / ".ci").iterdir(), ROOT / "Makefile"]:
        hosts = re.findall(r"https?://\w[\w.]*", path.read_text())
        assert not hosts, f"{path.name} names {hosts}"
