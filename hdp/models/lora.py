"""LoRA: train a low-rank correction of frozen weights (arXiv 2106.09685). The only use of peft.

    W x  becomes  W x + (alpha / rank) B A x,    A random, B = 0: at first, nothing changes

peft puts the matrices into the model's linear layers, in place; the rest of the path stays as it
is. FSDP2 shards A and B along with the frozen W and reduces gradients of A and B alone, and the
optimizer has no state for W.

    add_lora(model, LoRA(rank=16), seed=0)            # before shard()
    with adapters_off(model): ...                     # the base model: a reference without a copy
    save_adapter(model, full_state_dict(model), folder, base="Qwen/Qwen3-0.6B")   # peft loads it
    merged(model, full_state_dict(model))             # W + (alpha / rank) B A, for an export

Invariants (tests of the same names in tests/models/test_lora.py, tests/training/test_lora_step.py):

* starts_as_the_base        a new adapter changes no bit; a trained one that is off does not either
* gradients_equal_dense     of adapters alone, on any number of ranks
* peft_loads_what_is_saved  with the same outputs; merged() has them, too
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .weight_files import write_weights

_NAME = "default"  # peft's name for the only adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """Options of the adapters.

    rank: of B A. alpha: B A is scaled by alpha / rank; None: 2 * rank. targets: "all-linear", every
    linear layer but the head, or the last parts of their names, such as ("q_proj", "v_proj").

    Raises ValueError unless rank is at least 1 and alpha above 0.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] | str = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank={self.rank} must be at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"LoRA alpha={self.alpha} must be above 0; None: 2 * rank")
        if not self.targets:
            raise ValueError("LoRA targets are empty: name layers, or say 'all-linear'")


def add_lora(model: Any, options: LoRA, *, seed: int = 0) -> None:
    """Put adapters into `model`, a CausalLM or ScalarHeadLM, and freeze its other weights.

    Before `shard`. A scalar head stays trainable. seed: of the matrices A, the same on any number
    of ranks; a skeleton's are on the meta device. Raises ValueError if peft is missing, if no layer
    fits the targets, if they include the head or an embedding, or if there are adapters already.
    """
    LoraConfig, inject, _ = _peft()
    if list(_adapted(model)):
        raise ValueError("the model has LoRA adapters already: build it anew for others")
    targets = options.targets if isinstance(options.targets, str) else list(options.targets)
    linear = {name for name, layer in model.model.named_modules() if _is_linear(layer)}
    unknown = [
        target
        for target in ([] if isinstance(targets, str) else targets)
        if not any(name == target or name.endswith(f".{target}") for name in linear)
    ]
    if unknown or (isinstance(targets, str) and targets != "all-linear"):
        known = sorted({name.rpartition(".")[2] for name in linear if "layers." in name})
        raise ValueError(
            f"LoRA targets {targets!r}: {unknown or targets} are not linear layers of "
            f"{type(model.model).__name__}; it has {', '.join(known)}, or say all-linear"
        )
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha or 2 * options.rank,
        target_modules=targets,
        lora_dropout=0.0,  # a recomputed or split forward would draw other masks
        bias="none",
    )
    first = next(model.model.parameters())
    is_skeleton, dtype = first.is_meta, first.dtype
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject(config, model.model, low_cpu_mem_usage=is_skeleton)
    head = getattr(model.model, "get_output_embeddings", lambda: None)()
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"LoRA targets {targets!r} include the head, whose logits are computed without calling "
            "it; leave it out"
        )
    for name, parameter in model.model.named_parameters():
        if _is_adapter(name):  # peft makes those of a skeleton in fp32
            parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(_is_adapter(name))


def has_lora(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return any(True for _ in _adapted(model))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """`model` computes what its frozen weights alone say. Raises ValueError if it has no adapters.

    Enter it between steps, on all ranks alike.
    """
    layers = [layer for _, layer in _adapted(model)]
    if not layers:
        raise ValueError("the model has no LoRA adapters to switch off: call add_lora() first")
    # Not peft's enable_adapters(), which also stops gradients of the adapters: FSDP2 may create
    # the gathered parameters meanwhile, and those would stay without gradients.
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def save_adapter(
    model: Any, state_dict: Mapping[str, Tensor], path: str | os.PathLike, *, base: str = ""
) -> None:
    """Write adapters alone, as `peft.PeftModel.from_pretrained(base_model, path)` loads them.

    Call it in one process. state_dict: of `full_state_dict(model)`. base: what the adapter belongs
    to, a folder or hub name. Raises ValueError if the model has no adapters, or peft is missing.
    """
    _peft()
    config = model.model.peft_config[_NAME] if has_lora(model) else None
    if config is None:
        raise ValueError("the model has no LoRA adapters to save")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"base_model.{name.replace(f'.{_NAME}.', '.')}": x.detach().cpu().contiguous()
        for name, x in state_dict.items()
        if _is_adapter(name)
    }
    write_weights(folder / "adapter_model.safetensors", weights)
    before = config.base_model_name_or_path, config.task_type
    config.base_model_name_or_path, config.task_type = base or None, "CAUSAL_LM"
    try:
        config.save_pretrained(folder)
    finally:
        config.base_model_name_or_path, config.task_type = before


def merged(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors under the names of the model without adapters, W + (alpha / rank) B A.

    state_dict: of `full_state_dict(model)`; without adapters, it comes back as it is. Products are
    in fp32 or better.
    """
    result = {}
    scales = {f"{name}.": layer.scaling[_NAME] for name, layer in _adapted(model)}
    for name, x in state_dict.items():
        if _is_adapter(name):
            continue
        layer, _, rest = name.partition("base_layer.")
        if rest == "weight" and layer in scales:
            wide = torch.promote_types(x.dtype, torch.float32)
            a, b = (state_dict[f"{layer}lora_{m}.{_NAME}.weight"].to(wide) for m in "AB")
            x = (x.to(wide) + scales[layer] * (b @ a)).to(x.dtype)
        result[layer + rest] = x
    return result


def describe_lora(model: nn.Module) -> str:
    """For the start-up report; "" without adapters."""
    layers = [layer for _, layer in _adapted(model)]
    if not layers:
        return ""
    count = sum(p.numel() for name, p in model.named_parameters() if _is_adapter(name))
    total = sum(p.numel() for p in model.parameters())
    layer = layers[0]
    return (
        f"LoRA of rank {layer.r[_NAME]}, alpha {layer.lora_alpha[_NAME]:g}, in {len(layers)} "
        f"linear layers: {count / 1e6:,.2f}M parameters, {count / total:.2%} of all"
    )


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of the layers that peft wrapped. Works without peft."""
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "_disable_adapters"):
            yield name, layer


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear)


def _peft() -> tuple[Any, Any, Any]:
    """(LoraConfig, inject_adapter_in_model, peft). Raises ValueError if peft cannot be imported."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"LoRA needs peft, which cannot be imported ({error}); pip install 'peft>=0.17'"
        ) from error
    return peft.LoraConfig, peft.inject_adapter_in_model, peft
