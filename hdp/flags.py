"""Flags: a configuration class as command-line options, over a file, over a preset.

    hdp train --preset demo-cpu --config run.yaml --steps 2000

Later words win: defaults, then the preset, then the file, then the flags. `--help` groups the flags
by the sections of the class (`# -- model --`) and shows the values they would have, those of the
preset and the file included. Only this file imports tyro.

tyro parses and prints the help. Checked before it, because their messages should be one line with a
remedy: unknown flags (the nearest is named), a flag given twice (tyro would take the last), values
of another type, and words that no flag takes, such as the rest of an unquoted glob.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, make_dataclass, replace
from functools import partial
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

from hdp.config_fields import (
    FieldInfo,
    default_values,
    describe_fields,
    did_you_mean,
    parse_value,
)
from hdp.config_file import preset_list, preset_names, preset_path, read_config
from hdp.installation import pip_install

Config = TypeVar("Config")

_HELP = ("-h", "--help")
_FILES = {
    "config": FieldInfo(
        section="configuration",
        help="YAML or JSON file with any of the options below; flags win over it. A run's own "
        "config.json is one.",
        type=str | None,
    ),
    "preset": FieldInfo(
        section="configuration",
        help="Start from a preset: help (lists them), {names}. The file and flags win over it.",
        type=str | None,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """A flag of the command line with its words."""

    flag: str  # as written
    name: str  # of the field
    negated: bool  # --no-resume
    words: list[str]


def parse_config(
    config_class: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> Config:
    """Parse one flag per field of the dataclass `config_class`; help comes from its docstrings.

    Integers may be written as 16K or 2M (powers of 1024), as in `hdp plan`. `--config FILE` and
    `--preset NAME` supply values that flags override. Anything wrong prints one line with the
    remedy and exits with code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = prog or "options"
    try:
        infos = describe_fields(config_class)
        flags = {name: info for name, info in _FILES.items() if name not in infos} | infos
        given = _read(argv, flags)
        if _word(given, "preset") == "help":
            print(f"presets for --preset:\n{preset_list()}")
            raise SystemExit(0)
        defaults = default_values(config_class)
        if preset := _word(given, "preset"):
            defaults |= read_config(preset_path(preset), config_class)
        if path := _word(given, "config"):
            defaults |= read_config(path, config_class)
    except ValueError as error:
        _refuse(prog, error)
    values = _parse(given, flags, defaults, argv, prog=prog, description=description)
    try:
        return config_class(**{name: values[name] for name in infos})
    except ValueError as error:
        _refuse(prog, error)


def _refuse(prog: str, error: object) -> NoReturn:
    print(f"{prog}: error: {error}", file=sys.stderr)
    raise SystemExit(2) from None


# ---- the words of the command line ----


def _read(argv: Sequence[str], flags: dict[str, FieldInfo]) -> list[_Given]:
    """The flags of `argv` with their words. Raises ValueError for what no flag explains."""
    given: list[_Given] = []
    for word in argv:
        if word in _HELP or word.startswith("--tyro-"):
            continue
        if word.startswith("--") and len(word) > 2:
            given.append(_flag(word, flags))
        elif given:
            given[-1].words.append(word)
        else:
            raise ValueError(f"{word!r} is not an option: options start with --")
    seen: dict[str, str] = {}
    for item in _joined(given, flags):
        if item.name in seen:
            both = seen[item.name] if seen[item.name] != item.flag else f"{item.flag} twice"
            both = both if both.endswith("twice") else f"{both} and {item.flag}"
            raise ValueError(f"{both}: an option may be given once; keep one of the two")
        seen[item.name] = item.flag
        _check_words(item, flags[item.name].type)
    return _joined(given, flags)


def _joined(given: list[_Given], flags: dict[str, FieldInfo]) -> list[_Given]:
    """--data a --data b as --data a b, for options that take several values."""
    result: dict[str, _Given] = {}
    for i, item in enumerate(given):
        several = _takes_several(flags[item.name].type)
        key = item.name if several else f"{item.name} {i}"
        words = [*(result[key].words if key in result else ()), *item.words]
        result[key] = replace(item, words=words)
    return list(result.values())


def _flag(word: str, flags: dict[str, FieldInfo]) -> _Given:
    flag, equals, value = word.partition("=")
    name = flag[2:].replace("-", "_")
    negated = name not in flags and name.startswith("no_")
    if negated:
        name = name.removeprefix("no_")
    if name not in flags or (negated and flags[name].type is not bool):
        switches = [f"no_{known}" for known in flags if flags[known].type is bool]
        known = ["--" + option.replace("_", "-") for option in (*flags, *switches)]
        raise ValueError(
            f"unknown option {flag}{did_you_mean(flag, known)}; --help lists all options"
        )
    return _Given(flag=flag, name=name, negated=negated, words=[value] if equals else [])


def _check_words(item: _Given, wanted: Any) -> None:
    if wanted is bool:
        if item.words:
            name = item.name.replace("_", "-")
            raise ValueError(
                f"{item.flag} takes no value, got {item.words[0]!r}; write --{name} or --no-{name}"
            )
        return
    if not item.words:
        raise ValueError(f"{item.flag} needs a value")
    if _takes_several(wanted):
        return
    if len(item.words) > 1:
        raise ValueError(
            f"{item.flag} takes one value, got {' '.join(item.words[:4])}"
            f"{' ...' if len(item.words) > 4 else ''}; quote a value with spaces or a glob"
        )
    try:
        parse_value(item.words[0], wanted)
    except ValueError as error:
        raise ValueError(f"{item.flag} must be {error}") from None


def _takes_several(wanted: Any) -> bool:
    return any(get_origin(option) in (tuple, list) for option in (wanted, *get_args(wanted)))


def _word(given: list[_Given], name: str) -> str | None:
    return next((item.words[0] for item in given if item.name == name and item.words), None)


# ---- tyro ----


def _parse(
    given: list[_Given],
    flags: dict[str, FieldInfo],
    defaults: dict[str, Any],
    argv: Sequence[str],
    *,
    prog: str,
    description: str | None,
) -> dict[str, Any]:
    """{field: value}, from the flags or `defaults`. Prints the help and exits if asked to."""
    try:
        import tyro
    except ImportError:
        raise SystemExit(f"parsing flags requires tyro: {pip_install('hf')}") from None
    names = ", ".join(preset_names())
    sections: dict[str, list[Any]] = {}
    for name, info in flags.items():
        text = info.help.replace("{names}", names) if name in _FILES else info.help
        wanted: Any = info.type
        annotated = Annotated[wanted, tyro.conf.arg(help=text)]
        value = defaults.get(name, None if name in _FILES else ...)
        default = [] if value is ... else [field(default_factory=partial(copy, value))]
        section = re.sub(r"\W+", "_", info.section)
        sections.setdefault(section, []).append((name, annotated, *default))
    flat: Any = tyro.conf.OmitArgPrefixes  # --steps, not --step.steps
    groups = [
        (section, flat[make_dataclass(section, columns, kw_only=True)])
        for section, columns in sections.items()
    ]
    words = [word for item in given for word in _plain_words(item, flags[item.name].type)]
    words += [word for word in argv if word in _HELP or word.startswith("--tyro-")]
    options: Any = make_dataclass("Options", groups, kw_only=True)
    parsed = tyro.cli(options, args=words, prog=prog, description=description or "")
    return {k: v for section in sections for k, v in vars(getattr(parsed, section)).items()}


def _plain_words(item: _Given, wanted: Any) -> list[str]:
    """The words for tyro, with 16K written out and None spelled as it does."""
    flag = f"--no-{item.name}" if item.negated else f"--{item.name}"
    flag = flag.replace("_", "-")
    if len(item.words) != 1:
        return [flag, *item.words]
    try:
        value = parse_value(item.words[0], wanted)
    except ValueError:  # a list
        return [flag, *item.words]
    return [flag, str(value) if value is None or type(value) is int else item.words[0]]
