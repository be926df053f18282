"""Liger's kernels patch a model where they can be used; elsewhere the reason is reported.

CPU: a fake library that records its calls. GPU: the real library against the plain model.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

from hdp.models.liger import MODELS, use_liger
from tests.tiny_models import local_batch, random_samples, tiny_model

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def calls(monkeypatch):
    """[(model, keywords)], one for each call of the fake library's function."""
    recorded = []

    def record(model, **kwargs):
        recorded.append((model, kwargs))

    library = types.ModuleType("liger_kernel.transformers")
    library._apply_liger_kernel_to_instance = record
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", library)
    return recorded


def model_of(model_type="llama", **overrides):
    return tiny_model(model_type, dtype=torch.float32, **overrides).model


def test_layers_are_patched_and_the_loss_is_not(calls):
    model = model_of()
    text = use_liger(model, "auto", device=CUDA, dtype=torch.bfloat16)
    assert text == "Liger's RMSNorm, RoPE, SwiGLU"
    [(patched, options)] = calls
    assert patched is model
    assert options == {
        "rms_norm": True,
        "rope": True,
        "swiglu": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }


def test_kernels_that_do_not_fit_the_model_are_left_out(calls):
    use_liger(model_of("glm4"), "on", device=CUDA, dtype=torch.bfloat16)
    use_liger(model_of(hidden_act="gelu"), "on", device=CUDA, dtype=torch.bfloat16)
    assert [options["rope"] for _, options in calls] == [False, True]
    assert [options["swiglu"] for _, options in calls] == [True, False]


def test_later_models_are_plain_except_for_rope(monkeypatch, calls):
    from transformers.models.llama import modeling_llama

    def replace_all(model, **_):
        modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb = object, print

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    library = sys.modules["liger_kernel.transformers"]
    monkeypatch.setattr(library, "_apply_liger_kernel_to_instance", replace_all)
    before = modeling_llama.LlamaRMSNorm
    use_liger(model_of(), "on", device=CUDA, dtype=torch.bfloat16)
    assert modeling_llama.LlamaRMSNorm is before
    assert modeling_llama.apply_rotary_pos_emb is print


def test_off_is_off(calls):
    text = use_liger(model_of(), "off", device=CUDA, dtype=torch.bfloat16)
    assert text == "transformers' own (--liger off)" and not calls


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("llama", {"device": CPU}, "they need CUDA, not cpu"),
        ("llama", {"dtype": torch.float64}, "do not support float64"),
        ("llama", {"compiled": True}, "--compile already fuses the layers"),
        ("gpt_neox", {}, "not tested for model type 'gpt_neox'"),
    ],
)
def test_if_unusable_auto_reports_why_and_on_raises(calls, model_type, options, reason):
    options = {"device": CUDA, "dtype": torch.bfloat16, **options}
    assert reason in use_liger(model_of(model_type), "auto", **options)
    with pytest.raises(ValueError, match=f"--liger on: .*{reason}"):
        use_liger(model_of(model_type), "on", **options)
    assert not calls


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("no", name="liger_kernel"), "not installed .no module liger_kernel"),
        (RuntimeError("wrong Triton\nmore"), r"its import fails \(wrong Triton\)"),
    ],
)
def test_missing_or_broken_library_is_named(monkeypatch, error, reason):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] == "liger_kernel":
                raise error

    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(ValueError, match=reason):
        use_liger(model_of(), "on", device=CUDA, dtype=torch.bfloat16)
    assert "pip install" in use_liger(model_of(), "auto", device=CUDA, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_gpu_layers_compute_the_same(model_type):
    """Must run last: Liger patches its RoPE into transformers for the whole process."""
    pytest.importorskip("liger_kernel")
    batch = local_batch(random_samples([20, 30, 7])).to(CUDA)
    model = tiny_model(model_type, dtype=torch.float32).to(CUDA)
    results = []
    for _ in range(2):
        model.zero_grad()
        logprobs = model(batch)
        (torch.linspace(-1, 1, len(logprobs), device=CUDA) * logprobs).sum().backward()
        results.append([logprobs.detach(), *(p.grad for p in model.parameters())])
        use_liger(model.model, "on", device=CUDA, dtype=torch.float32)
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()
