"""Merge `--config-overrides` into the entries of a model's config.

An override is merged, not assigned: `{"rope_parameters": {"factor": 4.0}}` changes one value and
keeps the others, above all the model's own rope_theta. `null` sets an entry to None, and removes it
inside an object. What follows from an override follows it:

* Changing rope_type drops the old type's own parameters and keeps what belongs to the weights
  (rope_theta, the rotated share of a head, the length of pretraining). Setting the whole object to
  null turns scaling off.
* transformers 4 wrote `rope_theta` and `rope_scaling`, with `type` in it; transformers 5 writes
  `rope_parameters`. Overrides may use the names that the model's own config.json uses.
* With fewer layers, lists with one entry per layer are cut; with the sliding window turned off, no
  layer keeps it. (A saved config lists both; transformers derives them for a new one.)

A name that the config does not have is an error that suggests the nearest one: transformers would
silently drop it. This file works on plain dicts and does not import transformers.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")

# Names inside rope_parameters. Those of _KEPT_BY_TYPE describe the weights, not a way of scaling.
_KEPT_BY_TYPE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_ROPE = frozenset(
    {
        *_KEPT_BY_TYPE,
        *("rope_type", "type", "factor", "attention_factor", "beta_fast", "beta_slow"),
        *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
        *("mscale", "mscale_all_dim", "truncate", "mrope_section"),
    }
)
_ROPE_NAMES = ("rope_parameters", "rope_scaling")
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def merge_overrides(
    entries: Mapping[str, Any],
    overrides: Mapping[str, Any],
    *,
    known: Iterable[str],
    rope: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """`entries`, a config as a dict, with `overrides` merged in.

    known: the names that a config of this model type can have. rope: its `rope_parameters`
    without overrides, complete and in transformers 5's spelling; None: it has none. Raises
    ValueError for an unknown name, also inside an object, and for a value that must be an object.
    """
    model_type = str(entries.get("model_type"))
    names = {*known, *entries} | ({*_ROPE_NAMES} if rope else set())
    _check_names(overrides, names, f"configs of model type {model_type!r} have no entry")
    merged = copy.deepcopy(dict(entries))
    if rope:
        for name in (*_ROPE_NAMES, "rope_theta"):
            merged.pop(name, None)
        merged["rope_parameters"] = copy.deepcopy(dict(rope))
    for name, value in overrides.items():
        if rope and name in _ROPE_NAMES:
            merged["rope_parameters"] = _merge_rope(name, merged["rope_parameters"], value)
        elif rope and name == "rope_theta":
            merged["rope_parameters"] = _merge_rope(name, merged["rope_parameters"], {name: value})
        else:
            merged[name] = _merge(name, merged.get(name), value)
    _fit_layers(merged, overrides)
    return merged


def check_rope_type(kind: Any, model_type: str) -> None:
    """Raise ValueError for a rope_type that transformers does not know; it would say KeyError."""
    if kind is not None and kind not in ROPE_TYPES:
        near = difflib.get_close_matches(str(kind), ROPE_TYPES, cutoff=0.4)
        raise ValueError(
            f"config of model type {model_type!r}: unknown rope_type {kind!r}; close matches: "
            f"{', '.join(near) or 'none'}"
        )


def _merge(name: str, old: Any, new: Any) -> Any:
    """`new` in place of `old`; two objects are merged, and null removes an entry of the old one."""
    if not (isinstance(old, dict) and isinstance(new, Mapping)):
        return copy.deepcopy(new)
    if "model_type" in old:  # the config of a part: its names are known
        _check_names(new, old, f"{name} has no entry")
    merged = dict(old)
    for key, value in new.items():
        if value is None and key in merged:
            del merged[key]
        else:
            merged[key] = _merge(f"{name}.{key}", merged.get(key), value)
    return merged


def _merge_rope(name: str, old: dict[str, Any], new: Any) -> dict[str, Any]:
    """The rope_parameters `old` with the entries `new`; None turns scaling off."""
    if any(isinstance(value, dict) for value in old.values()):  # one object per type of layer
        _check_object(name, new, old)
        _check_names(new, old, f"{name} has no entry")
        return {
            key: _merge_rope(f"{name}.{key}", value, new[key]) if key in new else value
            for key, value in old.items()
        }
    kept = {key: old[key] for key in _KEPT_BY_TYPE if key in old}
    if new is None:
        return {**kept, "rope_type": "default"}
    _check_object(name, new, old)
    _check_names(new, _ROPE, f"{name} has no entry")
    new = dict(new)
    if "type" in new:
        new.setdefault("rope_type", new.pop("type"))
    old = {key: value for key, value in old.items() if key != "type"}  # only repeats rope_type
    if new.get("rope_type", old.get("rope_type")) != old.get("rope_type"):
        old = kept
    return _merge(name, old, new)


def _check_object(name: str, value: Any, old: Mapping[str, Any]) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"--config-overrides: {name} must be an object like {dict(old)}, got {value!r}"
        )


def _check_names(names: Iterable[str], known: Iterable[str], problem: str) -> None:
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, cutoff=0.4)
            raise ValueError(
                f"--config-overrides: {problem} {name!r}; close matches: "
                f"{', '.join(near) or 'none'}"
            )


def _fit_layers(merged: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Adapt the lists with one entry per layer to the overrides, except lists given there."""
    num_layers = overrides.get("num_hidden_layers")
    if isinstance(num_layers, int):
        for name in (name for name in _PER_LAYER if name not in overrides):
            per_layer = merged.get(name)
            if isinstance(per_layer, list) and len(per_layer) < num_layers:
                del merged[name]  # transformers derives it
            elif isinstance(per_layer, list):
                merged[name] = per_layer[:num_layers]
    off = overrides.get("use_sliding_window", True) is False
    off = off or ("sliding_window" in overrides and overrides["sliding_window"] is None)
    kinds = merged.get("layer_types")
    if off and isinstance(kinds, list) and "layer_types" not in overrides:
        merged["layer_types"] = [
            "full_attention" if kind == "sliding_attention" else kind for kind in kinds
        ]
