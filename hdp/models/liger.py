"""Liger's Triton kernels for the layers of a loaded model: RMSNorm, RoPE and SwiGLU.

Each replaces several element-wise kernels by one, and keeps less for backward. They are put in by
Liger's own function for a model that exists. Its fused linear cross-entropy is left out: ours
(logprobs.py) gives one log-probability per token, for any objective.

The one file that imports liger_kernel. Where it cannot be used, `--liger auto` goes on without it
and the run says why; `--liger on` is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import torch

# Model types that tests/models/test_liger.py compares with and without it.
MODELS = frozenset({"glm4", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"})
_NO_ROPE = frozenset({"glm4"})  # Liger's refuses it
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SILU = ("silu", "swish")


def use_liger(
    model: Any,
    wanted: Literal["auto", "on", "off"],
    *,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
) -> str:
    """Put Liger's kernels into `model`, a transformers model, and return one line for people.

    device, dtype: of the computation. compiled: torch.compile fuses the layers already.

    Raises ValueError for wanted="on" where they cannot be used.
    """
    if wanted == "off":
        return "as transformers has them (--liger off)"
    problem = _misfit(model, device, dtype, compiled)
    apply = None
    if problem is None:
        apply, problem = _load()
    if apply is None:
        if wanted == "on":
            raise ValueError(f"--liger on: {problem}; or leave it to --liger auto")
        return f"as transformers has them (Liger's kernels: {problem})"
    rope = model.config.model_type not in _NO_ROPE
    swiglu = getattr(model.config, "hidden_act", None) in _SILU
    with _classes_kept(sys.modules[type(model).__module__]):
        apply(
            model,
            rms_norm=True,
            rope=rope,
            swiglu=swiglu,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )
    parts = ["RMSNorm", *(["RoPE"] if rope else []), *(["SwiGLU"] if swiglu else [])]
    return f"Liger's {', '.join(parts)}"


@contextmanager
def _classes_kept(modeling: ModuleType) -> Iterator[None]:
    """Liger replaces transformers' classes beside the model's modules: later models get their own
    back. RoPE is a function that layers look up, so its replacement stays."""
    before = dict(vars(modeling))
    try:
        yield
    finally:
        for name, value in before.items():
            if name != "apply_rotary_pos_emb" and vars(modeling).get(name) is not value:
                setattr(modeling, name, value)


def _misfit(model: Any, device: torch.device, dtype: torch.dtype, compiled: bool) -> str | None:
    kind = model.config.model_type
    if device.type != "cuda":
        return f"they need CUDA, this is {device.type}"
    if dtype not in _DTYPES:
        return f"they do not compute in {str(dtype).removeprefix('torch.')}"
    if compiled:
        return "--compile fuses the layers already"
    if kind not in MODELS:
        return f"not tested for model type {kind!r} (tested: {', '.join(sorted(MODELS))})"
    return None


def _load() -> tuple[Callable[..., None] | None, str | None]:
    """(Liger's function, None), or (None, why not)."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ModuleNotFoundError as error:
        return None, f"not installed (no module {error.name}): pip install 'liger-kernel>=0.6'"
    except Exception as error:  # for another transformers or Triton: any error is possible
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return None, f"its import fails ({reason}); pip install -U liger-kernel"
    return _apply_liger_kernel_to_instance, None
