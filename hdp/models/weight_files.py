"""Check the files of a checkpoint against the model that will hold them, before reading weights.

A file's header lists names, shapes and dtypes, so whatever can be refused is refused in
milliseconds, with the file, the weight and the remedy: shards that are missing or cut short,
weights that are missing, superfluous or of another shape, quantized weights, and an LM head that
contradicts tie_word_embeddings. No other file imports safetensors.

    check_weights(path, files, model)      # model: on the meta device

A superfluous weight is an error, since it usually means that the config describes another model: a
bias that the config turns off would be dropped in silence. Exceptions are buffers that old versions
of transformers wrote and that follow from the config (`_HARMLESS`).
"""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .support import LFS_POINTER, first_line

INDEX_SUFFIX = ".index.json"
# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER = "adapter_config.json"
_HARMLESS = re.compile(r"(rotary_emb\.inv_freq|\.attention\.(masked_)?bias)$")
_FORMER_NAMES = {"lm_head.weight": "embed_out.weight"}  # gpt_neox; transformers renames it
_QUANTIZED = re.compile(
    r"(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|input_scale|absmax|quant_map|SCB)$"
)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """A weight as its file describes it."""

    shape: tuple[int, ...]
    dtype: str  # as in safetensors: BF16, F32, ...
    file: Path


def find_weights(folder: Path) -> list[Path]:
    """The weight files in `folder`. Raises ValueError if there are none, or some are missing."""
    if folder.is_file():
        raise ValueError("a config file has no weights")
    if (folder / _ADAPTER).is_file():  # transformers would load the base model that it names
        raise ValueError(
            f"the folder holds an adapter ({_ADAPTER}), not a model; merge it into its base model "
            "(peft: merge_and_unload, then save_pretrained)"
        )
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(INDEX_SUFFIX):
            return [path]
        shards = [folder / shard for shard in names_in_index(path)]
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent:
            raise ValueError(
                f"{path} names {len(shards)} files, and {len(absent)} of them are missing, first "
                f"{absent[0]}; download or copy the folder again"
            )
        return shards
    raise ValueError(f"no file named {' or '.join(WEIGHT_FILES)}")


def names_in_index(path: Path) -> list[str]:
    """The files that an index of shards names. Raises ValueError if it is damaged."""
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not an index of weight files ({error!r}); {_again()}"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"{path} names {name!r}, which is not a file of its folder; {_again()}"
            )
    return names


def read_headers(files: Iterable[Path]) -> dict[str, StoredWeight]:
    """Names, shapes and dtypes of the weights in `files`. Raises ValueError for a damaged file."""
    found: dict[str, StoredWeight] = {}
    for file in files:
        try:
            found.update(_header(file))
        except ImportError:
            raise
        except Exception as error:  # SafetensorError, and whatever torch.load raises
            if _starts_with(file, LFS_POINTER):
                raise ValueError(f"{file} is a Git LFS pointer; run: git lfs pull") from error
            if isinstance(error, pickle.UnpicklingError):
                raise ValueError(
                    f"{file} holds Python objects other than weights, which are not loaded; "
                    "convert it to safetensors"
                ) from error
            raise ValueError(
                f"{file} is damaged or incomplete ({first_line(error)}); {_again()}"
            ) from error
    return found


def check_weights(where: str, files: list[Path], model: Any, tie: bool) -> torch.dtype:
    """The dtype that most weights are stored in. `model`, on the meta device, must fit the files.

    where: the checkpoint's name, for messages. tie: the config's tie_word_embeddings. Raises
    ValueError with file, weight and remedy if they do not fit.
    """
    stored = read_headers(files)
    parameters = dict(model.state_dict(keep_vars=True))
    names = _names_in_file(parameters, stored, model.base_model_prefix)
    kind = type(model).__name__
    _check_quantized(where, stored)
    missing = _missing(parameters, names, stored)
    head = _head_name(model, parameters)
    if missing == [head]:
        raise ValueError(
            f"checkpoint {where!r} lacks {head}, and its config says tie_word_embeddings=false; if "
            "it shares the embedding's weights, pass --config-overrides "
            "'{\"tie_word_embeddings\": true}'"
        )
    if missing:
        raise ValueError(
            f"checkpoint {where!r} lacks {len(missing)} weights of {kind}, first {missing[0]}: it "
            "is incomplete, or holds another type of model"
        )
    _check_shapes(parameters, names, stored)
    _check_unexpected(where, kind, set(stored) - set(names.values()), model.config)
    if tie and head:
        _check_tied(where, parameters, names, stored, head)
    count = Counter[str]()
    for name in names.values():
        if name in stored:
            count[stored[name].dtype] += parameters_in(stored[name].shape)
    return _DTYPES[count.most_common(1)[0][0]]


def parameters_in(shape: Iterable[int]) -> int:
    """How many numbers a tensor of `shape` has."""
    size = 1
    for length in shape:
        size *= length
    return size


# ---- headers ----


def _header(file: Path) -> dict[str, StoredWeight]:
    if file.suffix != ".safetensors":
        weights = _torch_load(file)
        names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16"}
        names[torch.bfloat16] = "BF16"
        return {
            name: StoredWeight(
                shape=tuple(x.shape), dtype=names.get(x.dtype, str(x.dtype)), file=file
            )
            for name, x in weights.items()
            if isinstance(x, Tensor)
        }
    with _safe_open(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: StoredWeight(shape=tuple(x.get_shape()), dtype=x.get_dtype(), file=file)
            for name, x in slices.items()
        }


def _read(weight: StoredWeight, name: str) -> Tensor:
    if weight.file.suffix != ".safetensors":
        return _torch_load(weight.file, device="cpu")[name]
    with _safe_open(weight.file) as opened:
        return opened.get_tensor(name)


def _safe_open(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="pt")


def _torch_load(file: Path, device: str = "meta") -> dict[str, Any]:
    try:
        return torch.load(file, map_location=device, weights_only=True, mmap=True)
    except RuntimeError:  # the format before torch 1.6 cannot be mapped
        return torch.load(file, map_location=device, weights_only=True)


# ---- comparisons ----


def _names_in_file(
    parameters: Mapping[str, Any], stored: Mapping[str, Any], prefix: str
) -> dict[str, str]:
    """parameter -> its name in the file, which lacks the prefix if it holds a base model."""
    has_prefix = any(name.startswith(f"{prefix}.") for name in stored)
    names = {}
    for name in parameters:
        names[name] = name if has_prefix else name.removeprefix(f"{prefix}.")
        former = _FORMER_NAMES.get(name, name)
        if former in stored and name not in stored:
            names[name] = former
    return names


def _missing(
    parameters: Mapping[str, Any], names: Mapping[str, str], stored: Mapping[str, Any]
) -> list[str]:
    """Parameters that the file has under none of the names that share one tensor."""
    there = {id(x) for name, x in parameters.items() if names[name] in stored}
    return sorted(name for name, x in parameters.items() if id(x) not in there)


def _head_name(model: Any, parameters: Mapping[str, Any]) -> str | None:
    """The name of the LM head's weight."""
    head = model.get_output_embeddings()
    modules = {id(module): name for name, module in model.named_modules()}
    name = f"{modules.get(id(head), '')}.weight"
    return name if isinstance(head, nn.Module) and name in parameters else None


def _check_quantized(where: str, stored: Mapping[str, StoredWeight]) -> None:
    for name, weight in stored.items():
        if weight.dtype not in _DTYPES or _QUANTIZED.search(name):
            raise ValueError(
                f"checkpoint {where!r} is quantized ({name} is stored as {weight.dtype}); train "
                "the original model in bf16, fp16 or fp32"
            )


def _check_shapes(
    parameters: Mapping[str, Any], names: Mapping[str, str], stored: Mapping[str, StoredWeight]
) -> None:
    for name, parameter in parameters.items():
        weight = stored.get(names[name])
        if weight is not None and weight.shape != tuple(parameter.shape):
            raise ValueError(
                f"{weight.file}: {names[name]} has shape {weight.shape}, but the config asks for "
                f"{tuple(parameter.shape)}; correct the config (vocab_size, hidden_size, ...), "
                "with --config-overrides if need be"
            )


def _check_unexpected(where: str, kind: str, extra: set[str], config: Any) -> None:
    surplus = sorted(name for name in extra if not _HARMLESS.search(name))
    if not surplus:
        return
    first = surplus[0]
    reason = "its config describes another model"
    layer = re.search(r"layers\.(\d+)\.", first)
    if "lora_" in first:
        reason = "merge the adapter into the model first (peft: merge_and_unload)"
    elif layer and int(layer[1]) >= config.num_hidden_layers:
        reason = f"its config says num_hidden_layers={config.num_hidden_layers}"
    elif first.endswith(".bias"):
        reason = "its config turns this bias off (attention_bias, mlp_bias)"
    raise ValueError(
        f"checkpoint {where!r} has {len(surplus)} weights that {kind} has no place for, first "
        f"{first}: {reason}"
    )


def _check_tied(
    where: str,
    parameters: Mapping[str, Any],
    names: Mapping[str, str],
    stored: Mapping[str, StoredWeight],
    head: str,
) -> None:
    """Refuse a file whose LM head differs from the embedding that the config ties it to.

    transformers unties them with a warning, in the process that reads the file. The other ranks
    only have the config: they would build another model.
    """
    others = [name for name, x in parameters.items() if x is parameters[head] and name != head]
    for other in others:
        pair = [names[head], names[other]]
        if not all(name in stored for name in pair):
            continue
        weights = [_read(stored[name], name) for name in pair]
        if not torch.equal(*weights):
            raise ValueError(
                f"checkpoint {where!r}: {pair[0]} differs from {pair[1]}, but the config says "
                "tie_word_embeddings=true; to train both, pass --config-overrides "
                "'{\"tie_word_embeddings\": false}'"
            )


def _starts_with(file: Path, start: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(start)) == start
    except OSError:
        return False


def _again() -> str:
    return "download or copy it again"


def write_weights(file: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file of CPU tensors that share no memory."""
    from safetensors.torch import save_file

    save_file(dict(weights), file, metadata={"format": "pt"})
