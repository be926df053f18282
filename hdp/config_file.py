"""Configurations as text: YAML and JSON files, and presets.

    # run.yaml                          hdp train --config run.yaml --steps 2000
    model: Qwen/Qwen3-0.6B
    max_tokens_per_rank: 16K            16384
    lr: 3e-4                            a number, though YAML itself reads text
    config_overrides: {sliding_window: null}

A file holds fields of the configuration and nothing else, in any order; a run's own config.json is
one too. Every value is converted from its text by the type of its field, by the same rules as a
flag's, so a file cannot mean anything else than the flags would. Whatever is wrong with a file is
a ValueError that names file, line and remedy.

A preset is such a file in hdp/presets/, for a common model and machine. Only this file imports
PyYAML, and only to read YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from hdp.config_fields import (
    FALSE,
    NONE,
    TRUE,
    default_values,
    describe_fields,
    describe_type,
    did_you_mean,
    parse_value,
)

PRESETS = Path(__file__).with_name("presets")
Config = TypeVar("Config")

# ---- reading ----


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A key of a file: its line, and its value as text, a list of texts or a mapping."""

    key: str
    line: int
    value: Any  # str, None, list[str] or dict


def load_config(path: str | Path, config_class: type[Config], **changes: Any) -> Config:
    """The configuration in a YAML or JSON file; `changes` win over the file.

    Raises ValueError with file, line and remedy for anything wrong in the file, and for values that
    the class rejects.
    """
    return config_class(**{**read_config(path, config_class), **changes})


def read_config(path: str | Path, config_class: type) -> dict[str, Any]:
    """{field: value} of a YAML or JSON file. Raises ValueError with file, line and remedy."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read the configuration {path}: {reason}") from error
    entries = (_json_entries if path.suffix == ".json" else _yaml_entries)(text, str(path))
    known = describe_fields(config_class)
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for entry in entries:
        name, where = entry.key.replace("-", "_"), f"{path}:{entry.line}"
        if name not in known:
            raise ValueError(
                f"{where}: unknown key {entry.key!r}{did_you_mean(name, known)}; "
                "`hdp train --help` lists all options"
            )
        if name in values:
            raise ValueError(
                f"{where}: {entry.key} is already set in line {lines[name]}; keep one of the two"
            )
        lines[name] = entry.line
        try:
            values[name] = _entry_value(entry, known[name].type)
        except ValueError as error:
            raise ValueError(f"{where}: {entry.key} must be {error}") from error
    return values


def _entry_value(entry: _Entry, wanted: Any) -> Any:
    value, options = entry.value, get_args(wanted) or (wanted,)
    if value is None:
        if type(None) not in options:
            raise ValueError(f"{describe_type(wanted, '')}, got nothing; remove the line?")
        return None
    if isinstance(value, dict):
        if str not in options or not entry.key.endswith(("overrides", "kwargs")):
            raise ValueError(f"{describe_type(wanted, '')}, got a mapping; options are not nested")
        return json.dumps(value)
    element = _element_type(wanted)
    if isinstance(value, list):
        if element is None:
            raise ValueError(f"{describe_type(wanted, '')}, got a list; give one value")
        return tuple(parse_value(item, element) for item in value)
    return (parse_value(value, element),) if element is not None else parse_value(value, wanted)


def _element_type(wanted: Any) -> Any:
    """str for tuple[str, ...] and list[str], alone or in a union with None; None: not a list."""
    for option in (wanted, *get_args(wanted)):
        if get_origin(option) in (tuple, list):
            return get_args(option)[0]
    return None


def _yaml_entries(text: str, name: str) -> list[_Entry]:
    try:
        import yaml
    except ImportError:
        raise ValueError(
            f"{name}: reading YAML needs PyYAML: pip install pyyaml, or write the file as JSON"
        ) from None
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        _refuse_aliases(yaml, text, name)
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{name}:1: expected lines such as 'steps: 100'")
        return [
            _Entry(
                key=str(key.value),
                line=key.start_mark.line + 1,
                value=_yaml_value(loader, value, f"{name}:{value.start_mark.line + 1}"),
            )
            for key, value in root.value
        ]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ValueError(f"{name}:{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _refuse_aliases(yaml: Any, text: str, name: str) -> None:
    """Raise ValueError for an alias: ten lines of aliases to aliases stand for billions of values.

    Events come one by one, before any alias is followed.
    """
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(
                f"{name}:{event.start_mark.line + 1}: *{event.anchor} is an alias, which is not "
                "read here; write the value out"
            )


def _yaml_value(loader: Any, node: Any, where: str) -> Any:
    """Scalars stay text: YAML would read 3e-4 as text, 16K as text, and on as true."""
    if node.id == "scalar":
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if node.id == "mapping":
        _check_unique(node, where)
        return _plain(loader.construct_mapping(node, deep=True), where)
    if any(item.id != "scalar" for item in node.value):
        raise ValueError(f"{where}: expected a list of plain values")
    return [item.value for item in node.value]


def _check_unique(node: Any, where: str) -> None:
    """Raise ValueError if a mapping below `node` has a key twice: YAML would take the last."""
    seen: set[str] = set()
    for key, value in node.value if node.id == "mapping" else ():
        if str(key.value) in seen:
            raise ValueError(f"{where}: {key.value} is given twice; keep one of the two")
        seen.add(str(key.value))
        _check_unique(value, where)


def _plain(value: Any, where: str) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}; use text, numbers, lists and mappings") from error


def _json_entries(text: str, name: str) -> list[_Entry]:
    pairs: list[tuple[str, Any]] = []
    twice = ""

    def hook(items: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        twice = twice or _twice(pairs)  # of the object before: the whole file's, which comes last
        pairs[:] = items  # is checked with its lines
        return dict(items)

    try:
        root = json.loads(text, object_pairs_hook=hook)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}:{error.lineno}: not valid JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{name}: not valid JSON: nested too deeply") from error
    if not isinstance(root, dict):
        raise ValueError(f'{name}:1: expected an object such as {{"steps": 100}}')
    if twice:
        raise ValueError(f"{name}: {twice} is given twice; keep one of the two")
    pairs = pairs if root else []
    seen: dict[str, int] = {}
    entries = []
    for key, value in pairs:
        starts = [m.start() for m in re.finditer(re.escape(json.dumps(key)) + r"\s*:", text)]
        start = starts[min(seen.get(key, 0), len(starts) - 1)] if starts else 0
        seen[key] = seen.get(key, 0) + 1
        line = text.count("\n", 0, start) + 1
        entries.append(_Entry(key=key, line=line, value=_json_value(value)))
    return entries


def _twice(pairs: list[tuple[str, Any]]) -> str:
    """The first key that comes twice, or ''."""
    keys = [key for key, _ in pairs]
    return next((key for key in keys if keys.count(key) > 1), "")


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, (str, dict)):
        return value
    if isinstance(value, list):
        return [item if isinstance(item, str) else json.dumps(item) for item in value]
    return json.dumps(value)


# ---- presets ----


def preset_names() -> list[str]:
    """The presets that `--preset` takes."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The file of a preset. Raises ValueError for an unknown one, naming the nearest."""
    names = preset_names()
    if name not in names:
        raise ValueError(
            f"--preset {name}: no such preset{did_you_mean(name, names)}; there are "
            f"{', '.join(names)}"
        )
    return PRESETS / f"{name}.yaml"


def preset_list() -> str:
    """One line per preset: its name, and the first line of its comment."""
    rows = [(n, preset_path(n).read_text().splitlines()[0].lstrip("# ")) for n in preset_names()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {text}" for name, text in rows)


# ---- writing ----


def to_yaml(config: Any, *, leave_out: Iterable[str] = ()) -> str:
    """All values, by section, as a file that `read_config` reads; a comment marks what is not the
    default."""
    lines: list[str] = []
    defaults = default_values(type(config))
    section = ""
    for name, info in describe_fields(type(config)).items():
        if name in leave_out:
            continue
        if info.section != section:
            section = info.section
            lines += [*([""] if lines else []), f"# -- {section} --"]
        value = getattr(config, name)
        line = f"{name}: {_yaml_text(value)}"
        if name in defaults and value != defaults[name]:
            line += f"  # default: {_yaml_text(defaults[name])}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, old, new) of every value that differs; a value that one lacks counts as missing."""
    names = [*new, *(name for name in old if name not in new)]
    absent = "(absent)"
    pairs = [(name, old.get(name, absent), new.get(name, absent)) for name in names]
    return [(name, was, now) for name, was, now in pairs if was != now]


def _yaml_text(value: Any) -> str:
    if value is None or isinstance(value, (bool, int)):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_yaml_text, value)) + "]"
    plain = re.fullmatch(r"[A-Za-z./][\w./@-]*", value) and value.lower() not in (
        *TRUE, *FALSE, *NONE
    )  # fmt: skip
    if plain:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in quoted)
