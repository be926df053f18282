"""Liger's Triton kernels for the layers of a loaded model: RMSNorm, RoPE and SwiGLU.

Each fuses several element-wise kernels into one and saves less for backward. Liger's own function
patches the existing model. Its fused linear cross-entropy is not used: logprobs.py returns one
log-probability per token, which serves any objective.

No other file imports liger_kernel. Where it cannot be used, `--liger auto` continues without it and
the run prints the reason; `--liger on` is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import torch

# Model types that tests/models/test_liger.py compares with and without Liger.
MODELS = frozenset({"glm4", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"})
_NO_ROPE = frozenset({"glm4"})  # Liger rejects rope=True for these
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
    """Patch `model`, a transformers model, with Liger's kernels; return a line that describes it.

    device, dtype: of the computation. compiled: whether torch.compile already fuses the layers.

    Raises ValueError for wanted="on" if they cannot be used.
    """
    if wanted == "off":
        return "transformers' own (--liger off)"
    problem = _misfit(model, device, dtype, compiled)
    apply = None
    if problem is None:
        apply, problem = _load()
    if apply is None:
        if wanted == "on":
            raise ValueError(f"--liger on: {problem}; or pass --liger auto")
        return f"transformers' own (Liger's kernels: {problem})"
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
    """Restore the classes of `modeling` that Liger replaces, so that later models are unaffected.

    Liger patches both the model's modules and transformers' classes. RoPE is a module-level
    function that layers look up on each call, so its replacement must stay.
    """
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
        return f"they need CUDA, not {device.type}"
    if dtype not in _DTYPES:
        return f"they do not support {str(dtype).removeprefix('torch.')}"
    if compiled:
        return "--compile already fuses the layers"
    if kind not in MODELS:
        return f"not tested for model type {kind!r} (tested: {', '.join(sorted(MODELS))})"
    return None


def _load() -> tuple[Callable[..., None] | None, str | None]:
    """(Liger's patch function, None), or (None, why it is unavailable)."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ModuleNotFoundError as error:
        return None, f"not installed (no module {error.name}): pip install 'liger-kernel>=0.6'"
    except Exception as error:  # built for another transformers or Triton: anything can be raised
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return None, f"its import fails ({reason}); pip install -U liger-kernel"
    return _apply_liger_kernel_to_instance, None
