"""Adapters of libraries that need a GPU, against stand-ins with the libraries' own signatures.

This checks on a CPU: argument names and positions, lse layouts, contiguity, the dense and varlen
paths. Only a GPU can show that the libraries do what their sources say
(`python -m pytest -m gpu tests/attention/test_kernels.py`).
"""

from __future__ import annotations

import inspect

import pytest
import torch

from hdp.attention.kernels import KERNELS
from hdp.attention.kernels.cudnn import MIN_SEQLEN, CudnnKernel
from hdp.attention.kernels.flash_attn import FlashAttn4Kernel
from hdp.attention.kernels.torch_flash import TorchFlashKernel
from hdp.attention.kernels.transformer_engine import _size_class
from hdp.attention.layout import RingLayout, Segments
from hdp.attention.ring import ring_attn_varlen_func
from tests.attention.foreign_attention import MODULES, RELEASES, StandIn, backward, forward, install
from tests.attention.kernel_cases import CASES, check_kernel

releases = pytest.mark.parametrize(("kernel", "release"), RELEASES, ids=" ".join)


@releases
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapter_matches_the_librarys_signatures(
    monkeypatch: pytest.MonkeyPatch, kernel: str, release: str, case: str, dtype: torch.dtype
) -> None:
    functions = install(monkeypatch, kernel, release)
    torch.manual_seed(3)
    check_kernel(KERNELS[kernel](), CASES[case], dtype)
    assert any(function.calls for function in functions.values())


@releases
def test_rows_may_be_strided(monkeypatch: pytest.MonkeyPatch, kernel: str, release: str) -> None:
    install(monkeypatch, kernel, release)
    torch.manual_seed(3)
    for case in ("one sequence", "ragged sequences", "ragged rectangles"):
        check_kernel(KERNELS[kernel](), CASES[case], torch.float32, strided=True)


@releases
def test_asks_for_determinism_when_torch_does(
    monkeypatch: pytest.MonkeyPatch, kernel: str, release: str
) -> None:
    functions = install(monkeypatch, kernel, release)
    for wanted in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda w=wanted: w)
        for function in functions.values():
            function.calls.clear()
        check_kernel(KERNELS[kernel](), CASES["ragged sequences"], torch.float32)
        flags = {
            call.deterministic
            for function in functions.values()
            for call in function.calls
            if hasattr(call, "deterministic")
        }
        assert flags == {wanted}


def test_equal_segments_are_one_dense_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is a view of the same memory: inputs are not copied."""
    functions = install(monkeypatch, "flash-attn-4", "4.0.0b36")
    q, k, v = torch.randn(3, 24, 2, 8)
    segments = Segments((8, 8, 8), (8, 8, 8), causal=True)
    FlashAttn4Kernel().forward(q, k, v, segments, 0.3)
    FlashAttn4Kernel(dense=False).forward(q, k, v, segments, 0.3)
    dense, varlen = functions["_flash_attn_fwd"].calls
    assert dense.q.shape == (3, 8, 2, 8)
    assert dense.q.data_ptr() == q.data_ptr()
    assert dense.cu_seqlens_q is None and dense.max_seqlen_q is None
    assert varlen.q.shape == q.shape
    assert varlen.cu_seqlens_q.tolist() == [0, 8, 16, 24]


def test_a_model_can_train_on_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through autograd and the ring's own entry point, as a layer calls it."""
    install(monkeypatch, "flash-attn-4", "4.0.0b36")
    layout = RingLayout(local_seqlens=(9, 4))
    leaves = [torch.randn(13, h, 8, requires_grad=True) for h in (4, 2, 2)]
    results = []
    for kernel in (FlashAttn4Kernel(), KERNELS["reference"]()):
        out = ring_attn_varlen_func(*leaves, layout, kernel=kernel)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_unknown_arguments_are_refused_by_stand_ins() -> None:
    """Stand-ins refuse the arguments that the libraries would refuse."""
    function = StandIn("q, k, causal=False", lambda a: a.q)
    assert function(1, k=2) == 1
    for kwargs in ({"causal": True}, {"k": 1, "is_causal": True}):
        with pytest.raises(TypeError):
            function(1, **kwargs)


def test_size_classes_are_few_and_close() -> None:
    classes = {_size_class(n) for n in range(1, 1 << 17)}
    assert len(classes) < 50
    for n in (1, 127, 128, 129, 1000, 4097, 70000, 131072):
        assert n <= _size_class(n) <= max(n + 128, 1.25 * n), n


@pytest.mark.parametrize("kernel", MODULES)
def test_installed_signatures_match_the_snapshots(kernel: str) -> None:
    """If a library is installed, its newest snapshot must still match."""
    library = pytest.importorskip(MODULES[kernel], exc_type=ImportError)
    snapshots = [functions for (name, _), functions in RELEASES.items() if name == kernel]
    for name in snapshots[-1]:
        function = getattr(library, name)
        function = getattr(function, "_init_fn", function)  # inside torch.library.custom_op
        found = list(inspect.signature(function).parameters)
        known = [
            list(inspect.signature(eval(f"lambda {functions[name]}: None")).parameters)
            for functions in snapshots
        ]
        assert found in known, f"{name} of {MODULES[kernel]} changed: {found}"


# ---- torch's own operators ----


class _Aten:
    """Stand-in for torch.ops.aten: real schemas, our arithmetic."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._forward = forward
        self._backward = backward

    def bind(self, name: str, args: tuple, kwargs: dict):
        """The arguments by name, after torch's own schema has accepted them (on meta tensors)."""
        schema = getattr(torch.ops.aten, name).default._schema
        self.calls.append(name)
        names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
        known = {argument.name for argument in schema.arguments}
        assert len(args) <= len(names), f"{name} takes {len(names)} positional arguments"
        assert set(kwargs) <= known, f"{name} does not know {set(kwargs) - known}"
        on_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
        getattr(torch.ops.aten, name)(*on_meta, **kwargs)
        bound = dict(zip(names, args, strict=False)) | kwargs
        required = [a.name for a in schema.arguments if not a.has_default_value()]
        assert set(required) <= set(bound), f"{name} lacks {set(required) - set(bound)}"
        return bound


def _aten(monkeypatch: pytest.MonkeyPatch) -> _Aten:
    from types import SimpleNamespace

    aten = _Aten()
    ops = SimpleNamespace(aten=aten)

    def flash(*args, **kwargs):
        a = aten.bind("_flash_attention_forward", args, kwargs)
        call = SimpleNamespace(
            q=a["query"],
            k=a["key"],
            v=a["value"],
            cu_seqlens_q=a["cum_seq_q"],
            cu_seqlens_k=a["cum_seq_k"],
        )
        out, lse, segments = forward(call, a["is_causal"], a["scale"])
        assert (a["max_q"], a["max_k"]) == (segments.max_seqlen_q, segments.max_seqlen_k)
        return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)

    def flash_backward(*args, **kwargs):
        a = aten.bind("_flash_attention_backward", args, kwargs)
        call = SimpleNamespace(
            q=a["query"],
            k=a["key"],
            v=a["value"],
            cu_seqlens_q=a["cum_seq_q"],
            cu_seqlens_k=a["cum_seq_k"],
        )
        return backward(call, a["grad_out"], a["out"], a["logsumexp"], a["is_causal"], a["scale"])

    def dense_call(a) -> SimpleNamespace:
        q, k, v = (a[name].transpose(1, 2) for name in ("query", "key", "value"))
        return SimpleNamespace(q=q, k=k, v=v, cu_seqlens_q=None, cu_seqlens_k=None)

    def cudnn(*args, **kwargs):
        a = aten.bind("_scaled_dot_product_cudnn_attention", args, kwargs)
        assert a["compute_log_sumexp"] is True
        out, lse, _ = forward(dense_call(a), a["is_causal"], a["scale"])
        return out.transpose(1, 2), lse.unsqueeze(-1), None, None, 0, 0, None, None, None

    def cudnn_backward(*args, **kwargs):
        a = aten.bind("_scaled_dot_product_cudnn_attention_backward", args, kwargs)
        dout, out = (a[name].transpose(1, 2) for name in ("grad_out", "out"))
        assert a["logsumexp"].shape[-1] == 1
        lse = a["logsumexp"].squeeze(-1)
        grads = backward(dense_call(a), dout, out, lse, a["is_causal"], a["scale"])
        return tuple(x.transpose(1, 2) for x in grads)

    aten._flash_attention_forward = flash
    aten._flash_attention_backward = flash_backward
    aten._scaled_dot_product_cudnn_attention = cudnn
    aten._scaled_dot_product_cudnn_attention_backward = cudnn_backward
    for module in ("hdp.attention.kernels.torch_flash", "hdp.attention.kernels.cudnn"):
        import importlib

        stub = SimpleNamespace(ops=ops, empty=torch.empty, int64=torch.int64)
        monkeypatch.setattr(importlib.import_module(module), "torch", stub)
    return aten


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dense", [True, False])
def test_torch_flash_fits_the_schema(
    monkeypatch: pytest.MonkeyPatch, case: str, dense: bool
) -> None:
    _aten(monkeypatch)
    torch.manual_seed(3)
    check_kernel(TorchFlashKernel(dense), CASES[case], torch.float32)
    check_kernel(TorchFlashKernel(dense), CASES[case], torch.bfloat16, strided=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("min_seqlen", [1, 10, 1000])
def test_cudnn_fits_the_schema(monkeypatch: pytest.MonkeyPatch, case: str, min_seqlen: int) -> None:
    aten = _aten(monkeypatch)
    monkeypatch.setattr("hdp.attention.kernels.cudnn.MIN_SEQLEN", min_seqlen)
    torch.manual_seed(3)
    check_kernel(CudnnKernel(), CASES[case], torch.float32)
    dense = [name for name in aten.calls if "cudnn" in name]
    if min_seqlen == 1:
        assert len(dense) == len(aten.calls)
    if min_seqlen == 1000:
        assert not dense


def test_cudnn_makes_one_call_per_run_of_equal_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    aten = _aten(monkeypatch)
    lengths = (MIN_SEQLEN, MIN_SEQLEN, 5, 900, MIN_SEQLEN + 1)
    q = torch.randn(sum(lengths), 1, 8)
    CudnnKernel().forward(q, q, q, Segments(lengths, lengths, causal=True), 0.3)
    assert aten.calls == [
        "_scaled_dot_product_cudnn_attention",
        "_flash_attention_forward",
        "_scaled_dot_product_cudnn_attention",
    ]
