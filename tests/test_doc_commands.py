"""What the documents tell a user to type works: commands run or parse, flags exist, figures hold.

Commands of the planner run. Those that train or measure are parsed with the real parsers, and the
first hour's are run in order by `test_first_hour`. Blocks of ``` without a language are commands.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from hdp.cli import main, parse_config
from hdp.config import TrainConfig
from hdp.profile.cli import _parser as profile_parser
from tests.patience import patience
from tests.source_tree import PACKAGE, ROOT, parse, sources
from tests.test_docs import by_name

# Flags of other programs; --config and --preset of ours, which are no fields (hdp/flags.py).
FOREIGN = {
    "--logdir",
    *("--standalone", "--nproc-per-node", "--max-restarts"),  # torchrun
    *("--no-build-isolation", "--no-deps", "--config-settings"),  # pip
    *("--shm-size", "--help", "--version", "--config", "--preset"),
}


def blocks(path: Path, language: str = "") -> list[str]:
    """The contents of fenced blocks of this language, in order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.M | re.S)
    return [text for name, text in fenced if name == language]


STARTED = re.compile(r"(?:[A-Z_]+=\S+ )*(?:torchrun [-\w ]*-m )?hdp ([a-z]+\b.*)")


def commands(path: Path) -> list[list[str]]:
    """`hdp ...` of the blocks, however it is started, as words; not what has "..." in it."""
    found = []
    for block in blocks(path):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            match = STARTED.match(line.partition(" && ")[0])
            if match and "..." not in line:
                found.append(shlex.split(match[1], comments=True))
    return found


@by_name
def test_commands_work(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lengths.txt").write_text("\n".join(map(str, [9000, 700, 650, 300, 30000] * 4)))
    monkeypatch.setenv("HOME", str(tmp_path))  # its cache
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "word " * 99}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    for command, *words in commands(path):
        if command in ("plan", "simulate", "compare"):
            if "--plot" in words:
                pytest.importorskip("matplotlib")
            if "--tokenizer" in words:  # not one from the hub
                words[words.index("--tokenizer") + 1] = "bytes"
            assert main([command, *words, "--no-timeline"]) == 0, f"{path.name}: {words}"
        elif command == "train" and not {"--config", "--preset"} & {
            *words
        }:  # a file of the reader's
            pytest.importorskip("tyro")
            parse_config(TrainConfig, words, prog="hdp train")
        elif command == "profile":
            profile_parser().parse_args(words)


def known_flags() -> set[str]:
    names = {f.name.replace("_", "-") for f in fields(TrainConfig)}
    known = {f"--{name}" for name in names} | {f"--no-{name}" for name in names} | FOREIGN
    for path in [*PACKAGE, *sources("tools")]:
        known |= set(re.findall(r'"(--[a-z][\w-]+)"', path.read_text()))
    return known


@by_name
def test_flags_exist(path: Path) -> None:
    """In prose as in commands; the first column of a table of another trainer has its own."""
    text = path.read_text()
    if path.name.startswith("from-"):
        text = re.sub(r"^\| .*? \|", "|", text, flags=re.M)
    if path.name == "megatron.md":  # its commands are Megatron's, with our flags in between
        return
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - known_flags()
    assert not unknown, f"{path.name} names flags that do not exist: {sorted(unknown)}"


def test_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    missing = pages - set(re.findall(r"\]\(([\w-]+\.md)\)", index))
    assert not missing, f"docs/index.md does not list {sorted(missing)}: add a line for each"
    assert "docs/index.md" in (ROOT / "README.md").read_text()


def test_messages_of_the_faq_are_ours() -> None:
    """A user searches for what is printed: headings in backticks occur in the sources."""
    texts = [
        node.value
        for path in PACKAGE
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    not_ours = {"hdp: command not found", "CUDA out of memory"}
    faq = (ROOT / "docs" / "faq.md").read_text()
    headings = [m for h in re.findall(r"^### (.+)$", faq, re.M) for m in re.findall(r"`(.+?)`", h)]
    assert len(headings) > 15
    for message in set(headings) - not_ours:
        for part in re.split(r" ?\.\.\. ?", message):
            words = part.strip(" ;,()")
            assert any(words in text for text in texts), f"no message of ours says {words!r}"


def test_python_examples_run(tmp_path: Path) -> None:
    """The examples that need no other framework, each in a process of its own."""
    for name in ("README.md", "docs/from-megatron.md"):
        for code in blocks(ROOT / name, "python"):
            compile(code, name, "exec")
            if "megatron.core" in code or "import hdp\n" in code:
                continue
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr


def test_memory_figures_follow_from_the_formula() -> None:
    from hdp.scheduler import estimate_cost
    from hdp.scheduler.costs.activation_plan import decoder_classes

    text = (ROOT / "docs" / "choosing-max-tokens-per-rank.md").read_text()
    models = {
        "Qwen3-0.6B": (28, 1024, 3072, 16, 8, 151936),
        "Qwen3-8B": (36, 4096, 12288, 32, 8, 151936),
        "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128256),
    }
    names = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
    for model, sizes in models.items():
        shape = dict(zip((*names, "vocab_size"), sizes, strict=True), head_dim=128)
        layers, hidden, mlp, heads, kv_heads, _ = sizes
        cost = estimate_cost(shape, device_type="cuda", bytes_per_element=2)
        saved = sum(c.bytes_per_token for c in decoder_classes(cost, **shape, bytes_per_element=2))
        q, k = 128 * heads, 128 * kv_heads
        assert saved == layers * (20 * hidden + 4 * q + 4 * k + 4 * heads + 8 * mlp)
        inputs = layers * 2 * hidden
        kept = inputs + (saved - inputs) / layers
        row = f"| {model} | {layers} | {saved / 1024:,.0f} KiB | {kept / 1024:,.0f} KiB |"
        assert row in text, row
    assert f"= {53.8e9 / 1024 / (6788 + 230):,.0f} tokens" in text
    assert f"= {53.8e9 / 1024 / (460 + 230):,.0f} tokens" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_first_hour(tmp_path: Path) -> None:
    """The page's commands, in its order and in one folder; no GPU, no network, no `make`."""
    pytest.importorskip("transformers")
    page = (ROOT / "docs" / "first-hour.md").read_text().partition("## 6.")[0]
    (tmp_path / "page.md").write_text(page)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env["HOME"] = str(tmp_path)  # its cache
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    ran = []
    for block in blocks(tmp_path / "page.md"):
        if block.startswith(("make", "hdp: ")):
            continue
        script = re.sub(r"^hdp ", "python -m hdp ", block, flags=re.M)
        script = script.replace("torchrun ", "python -m torch.distributed.run ")
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=patience(240),
        )
        ran.append(done.stdout + done.stderr)
        assert done.returncode == 0, f"{block}\n{ran[-1]}"
    lines = [re.search(r"hdp: chats.jsonl: 200 sequences, .*", text) for text in (page, ran[2])]
    told, printed = (re.sub(r"[\d,]+", "N", line[0]) if line else "" for line in lines)
    assert told and told == printed, f"the page shows {told}, the run {printed}"
    assert (tmp_path / "runs" / "chats" / "timeline_2.png").exists()
    assert "resumed from" in ran[-1] and (tmp_path / "out" / "config.json").exists()
    assert len(ran) == 5
