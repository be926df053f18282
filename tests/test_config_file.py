"""A file means what the flags would; whatever is wrong with it is named with its line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.config import TrainConfig
from hdp.config_fields import describe_fields, parse_value
from hdp.config_file import (
    differences,
    load_config,
    preset_names,
    preset_path,
    read_config,
    to_yaml,
)

pytest.importorskip("yaml")


BOMB = "config_overrides:\n  a0: &a0 [1]\n" + "".join(
    f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)


def read(tmp_path: Path, text: str, name: str = "run.yaml") -> dict:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_config(path, TrainConfig)


def test_values_have_the_types_of_their_fields(tmp_path: Path) -> None:
    """YAML itself reads 3e-4 and 16K as text, on and no as booleans, 007 as a number."""
    text = """
# a comment
lr: 3e-4
weight_decay: 1e-05
batch_tokens: 2M
max-tokens-per-rank: 16k
max_length: null
steps: 1_000
liger: on
split: no
resume: off
strict: yes
pattern: 007
model: ~/models/x
run_dir: "16K"
config_overrides: {sliding_window: null, rope_parameters: {factor: 4.0}}
"""
    assert read(tmp_path, text) == {
        "lr": 3e-4,
        "weight_decay": 1e-5,
        "batch_tokens": 2 << 20,
        "max_tokens_per_rank": 16384,
        "max_length": None,
        "steps": 1000,
        "liger": "on",
        "split": "no",
        "resume": False,
        "strict": True,
        "pattern": "007",
        "model": "~/models/x",
        "run_dir": "16K",
        "config_overrides": '{"sliding_window": null, "rope_parameters": {"factor": 4.0}}',
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "steps: 5\nbatch_token: 7",
            r"run.yaml:2: unknown key 'batch_token' \(did you mean",
        ),
        ("learningrate: 7", r"run.yaml:1: unknown key 'learningrate'"),
        ("steps: 5\nlr: 1\nsteps: 6", "run.yaml:3: steps is already set in line 1; keep one"),
        ("max_length: 5\nmax-length: 5", "run.yaml:2: max-length is already set in line 1"),
        ("lr: fast", "run.yaml:1: lr must be a number, got 'fast'"),
        ("steps: 1.5", "run.yaml:1: steps must be a whole number such as 16384 or 16K, got '1.5'"),
        ("steps:", "run.yaml:1: steps must be a whole number .*, got nothing; remove the line"),
        ("resume: maybe", "run.yaml:1: resume must be true or false, got 'maybe'"),
        ("dtype: fp8", "run.yaml:1: dtype must be one of auto, fp64, fp32, bf16, got 'fp8'"),
        ("dtype: fp16", "run.yaml:1: dtype must be one of auto, fp64, fp32, bf16"),
        ("steps: [1, 2]", "run.yaml:1: steps must be a whole number .*, got a list"),
        ("optimizer:\n  lr: 3", "run.yaml:1: optimizer must be one of .*options are not nested"),
        ("- steps", "run.yaml:1: expected lines such as 'steps: 100'"),
        ("steps: 5", None),
        ("", None),
        ("steps: 5\nlr: [1", "run.yaml:[12]: not valid YAML"),
        ("a: &x 1\nb: *y", r"run.yaml:2: \*y is an alias, which is not read here; write the value"),
        (BOMB, r"run.yaml:3: \*a0 is an alias"),
        ("steps: 5\n\tlr: 1", "run.yaml:2: not valid YAML"),
        ("config_overrides: {when: 2024-01-05}", "run.yaml:1: .*date is not JSON"),
        ("config_overrides: {a: 1, b: {c: 1, c: 2}}", "run.yaml:1: c is given twice"),
        ("[" * 3000, "run.yaml"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    if message is None:
        assert len(read(tmp_path, text)) == bool(text)
        return
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"steps": 5,\n "steps": 6}', "run.json:2: steps is already set in line 1"),
        ('{"steps": 5,\n "stepz": 6}', r"run.json:2: unknown key 'stepz' \(did you mean steps\?\)"),
        ('{"steps": 5,\n}', r"run.json:[12]: not valid JSON"),
        ("[1]", "run.json:1: expected an object"),
        ('{"steps": "x"}', "run.json:1: steps must be a whole number"),
        ('{"config_overrides": {"b": {"c": 1, "c": 2}}, "steps": 3}', "run.json: c is given twice"),
        ("[" * 100_000, "run.json"),
    ],
)
def test_json_too(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text, "run.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nope\.yaml: No such file"):
        read_config(tmp_path / "nope.yaml", TrainConfig)
    with pytest.raises(ValueError, match="Is a directory"):
        read_config(tmp_path, TrainConfig)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_config(tmp_path / "x.yaml", TrainConfig)


texts = st.text(st.characters(min_codepoint=32, max_codepoint=0xD7FF), min_size=1, max_size=12)


@given(
    model=texts,
    pattern=st.none() | texts,
    steps=st.integers(1, 10**9),
    lr=st.floats(1e-12, 1e3),
    resume=st.booleans(),
)
def test_what_is_written_is_read_back(tmp_path_factory, model, pattern, steps, lr, resume) -> None:
    """As YAML and as a run's config.json."""
    config = TrainConfig(model=model, pattern=pattern, steps=steps, lr=lr, resume=resume)
    folder = tmp_path_factory.mktemp("written")
    (folder / "run.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "run.json").write_text(config.to_json(), encoding="utf-8")
    for name in ("run.yaml", "run.json"):
        again = load_config(folder / name, TrainConfig)
        assert asdict(again) == asdict(config) or (pattern or "").lower() in ("none", "null", "~")


def test_yaml_marks_what_is_not_the_default() -> None:
    text = to_yaml(TrainConfig(steps=7))
    assert f"steps: 7  # default: {TrainConfig().steps}\n" in text
    assert "# -- optimizer --" in text and "seed: 0\n" in text


def test_every_field_has_a_section_and_a_help_text() -> None:
    for name, info in describe_fields(TrainConfig).items():
        assert info.section != "options" and info.help, name


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid(name: str) -> None:
    first = preset_path(name).read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) <= 100, "the first line describes the preset"
    load_config(preset_path(name), TrainConfig)


def test_differences() -> None:
    old, new = {"a": 1, "b": 2, "gone": 3}, {"a": 1, "b": 5, "new": 4}
    assert differences(old, new) == [
        ("b", 2, 5),
        ("new", "(absent)", 4),
        ("gone", 3, "(absent)"),
    ]


def test_text_of_optional_values() -> None:
    assert parse_value("None", int | None) is None
    assert parse_value("4K", int | None) == 4096
    with pytest.raises(ValueError, match=r"a whole number .* or none, got 'x'"):
        parse_value("x", int | None)
