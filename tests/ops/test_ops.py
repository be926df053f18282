"""All ops of csrc/ together: determinism, opcheck, compilation, bad inputs, and their callers.

Each test runs the Python reference, the CPU library if it is built (`python csrc/build.py`), and
the CUDA kernels if there is a GPU; `where` selects one. test_merge.py, test_rows.py and
test_cross_entropy.py check the results of each op.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch.library import opcheck

from hdp.models.logprobs import chunked_logprobs
from hdp.ops import native as ops
from tests.ops.op_cases import (
    CUDA_BUILT,
    NATIVE,
    close,
    logits_and_labels,
    native_only,
    partial_results,
    statistics_dtype,
    to_device,
)

# ---- same input, same bits ----


def _everything(where):
    """Results of every op on inputs large enough for several threads and blocks."""
    out, lse, block_out, block_lse = to_device(
        where, *partial_results(700, 500, 4, 64, torch.float32, torch.bfloat16)
    )
    spans = [(10, 210), (300, 600)]
    ops.merge_lse_(out, lse, block_out, block_lse, spans)
    total = to_device(where, torch.ones(700, 4, 64))
    ops.scatter_rows_(total, block_out, spans, accumulate=True)
    logits, labels = to_device(where, *logits_and_labels(64, 4099, torch.float32))
    logprobs, row_lse = ops.softmax_cross_entropy(logits, labels)
    grads = ops.softmax_cross_entropy_backward_(
        logits, labels, row_lse, logprobs, grad_dtype=torch.bfloat16
    )
    return [out, lse, total, ops.gather_rows(total, spans), logprobs, row_lse, grads.clone()]


def test_deterministic(where):
    first = _everything(where)
    for _ in range(3):
        for a, b in zip(first, _everything(where), strict=True):
            assert torch.equal(a, b)


@NATIVE
def test_threads_do_not_change_results():
    first = _everything("cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for a, b in zip(first, _everything("cpu"), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


# ---- schemas, fake kernels, tracing ----


def _samples(where):
    """(op, arguments) that opcheck runs."""
    names = torch.ops.hdp
    merge = to_device(where, *partial_results(6, 5, 2, 4, torch.float32, torch.bfloat16))
    x, values = to_device(where, torch.randn(2, 7, 3), torch.randn(2, 4, 3))
    logits, labels = to_device(where, *logits_and_labels(5, 9, torch.float32))
    lse, grad = to_device(where, *torch.randn(2, 5))
    spans = [0, 1, 3, 6]
    return [
        (names.merge_lse_, (*merge, [0, 2, 3, 6])),
        (names.gather_rows, (x.clone().requires_grad_(), spans, 1)),
        (names.scatter_rows_, (x, values, spans, 1, False)),
        (names.scatter_rows_, (x, values.bfloat16(), spans, 1, True)),
        (names.softmax_cross_entropy, (logits.clone().requires_grad_(), labels, 0.0)),
        (names.softmax_cross_entropy, (logits.bfloat16(), labels, 2.0)),
        (names.softmax_cross_entropy_backward_, (logits, labels, lse, grad, None, 0.0, None)),
        (
            names.softmax_cross_entropy_backward_,
            (logits, labels, lse, grad, grad, 2.0, torch.bfloat16),
        ),
    ]


@native_only
@pytest.mark.parametrize("sample", range(8))
def test_opcheck(where, sample):
    op, args = _samples(where)[sample]
    opcheck(op.default, args)


@native_only
def test_ops_can_be_compiled(where):
    """No graph breaks; traced ops have the right shapes and mutate what their schemas declare."""

    def step(x, out, lse, block_out, block_lse, logits, labels):
        ops.merge_lse_(out, lse, block_out, block_lse, ((1, 6),))
        rows = ops.gather_rows(x, ((0, 2), (3, 5)))
        logprobs, _ = ops.softmax_cross_entropy(logits, labels)
        return out.sum() + rows.sum() + logprobs.sum()

    def inputs():
        merge = partial_results(6, 5, 2, 4, torch.float32, torch.float32)
        return to_device(where, torch.ones(5, 3), *merge, *logits_and_labels(5, 9, torch.float32))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), step(*inputs()))


# ---- bad inputs ----


def _merge_inputs(**changes):
    out, lse, block_out, block_lse = partial_results(6, 5, 2, 4, torch.float32, torch.float32)
    given = {"out": out, "lse": lse, "block_out": block_out, "block_lse": block_lse}
    given["spans"] = [1, 6]
    for name, change in changes.items():
        given[name] = change(given[name])
    return tuple(given.values())


def _entropy_inputs(**changes):
    logits, labels = logits_and_labels(5, 9, torch.float32)
    lse, grad = torch.randn(2, 5)
    given = {"logits": logits, "labels": labels, "lse": lse, "grad": grad, "grad_lse": None}
    given |= {"softcap": 0.0, "grad_dtype": None}
    for name, change in changes.items():
        given[name] = change(given[name])
    return tuple(given.values())


BAD = {
    "out is bf16": ("merge_lse_", _merge_inputs(out=lambda x: x.bfloat16()), "fp32 or fp64"),
    "out is integer": ("merge_lse_", _merge_inputs(out=lambda x: x.int()), "expected fp64, fp32"),
    "out has two dimensions": ("merge_lse_", _merge_inputs(out=lambda x: x[0]), "rows, heads, dim"),
    "heads are not dense": (
        "merge_lse_",
        _merge_inputs(out=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        r"out Float\(6, 2, 4\) with strides \(8, 1, 2\).* must be dense; pass out.contiguous\(\)",
    ),
    "rows overlap": (
        "merge_lse_",
        _merge_inputs(out=lambda x: x[:1].expand(6, 2, 4)),
        "rows overlap and it is written to",
    ),
    "lse is transposed": (
        "merge_lse_",
        _merge_inputs(lse=lambda x: x.t().contiguous().t()),
        r"lse Float\(2, 6\) with strides \(1, 2\).* dense",
    ),
    "lse of another dtype": ("merge_lse_", _merge_inputs(lse=lambda x: x.double()), "dtype of out"),
    "lse of other rows": (
        "merge_lse_", _merge_inputs(lse=lambda x: x[:, :5]), r"expected shape \(2, 6\)",
    ),
    "block of other rows": (
        "merge_lse_", _merge_inputs(block_out=lambda x: x[:4]), r"expected shape \(5, 2, 4\)",
    ),
    "fp64 block into fp32": (
        "merge_lse_", _merge_inputs(block_out=lambda x: x.double()), "cannot join",
    ),
    "span outside": (
        "merge_lse_", _merge_inputs(spans=lambda x: [2, 7]), r"span \[2, 7\) after row 0 of 6",
    ),
    "rows are not dense": (
        "gather_rows", (torch.zeros(4, 6)[:, :3], [0, 2], 0), r"strides \(6, 1\).* dense",
    ),
    "spans out of order": ("gather_rows", (torch.zeros(9), [4, 6, 1, 2], 0), "sorted, disjoint"),
    "spans that overlap": ("gather_rows", (torch.zeros(9), [1, 4, 3, 6], 0), "sorted, disjoint"),
    "half a span": ("gather_rows", (torch.zeros(9), [1, 4, 6], 0), "start, stop"),
    "a third dimension": ("gather_rows", (torch.zeros(9, 2, 2), [0, 1], 2), "dimension 0 or 1"),
    "values of other rows": (
        "scatter_rows_", (torch.zeros(9, 2), torch.zeros(4, 2), [0, 3], 0, False), r"\(3, 2\)",
    ),
    "values of another dtype": (
        "scatter_rows_", (torch.zeros(9), torch.zeros(3).half(), [0, 3], 0, False), "dtype of x",
    ),
    "fp32 added to bf16": (
        "scatter_rows_", (torch.zeros(9).bfloat16(), torch.zeros(3), [0, 3], 0, True), "cannot add",
    ),
    "integers added": (
        "scatter_rows_", (torch.zeros(9).int(), torch.zeros(3).int(), [0, 3], 0, True), "expected",
    ),
    "logits transposed": (
        "softmax_cross_entropy",
        (torch.zeros(9, 5).t(), torch.zeros(5, dtype=torch.int64), 0.0),
        r"pass logits.contiguous\(\)",
    ),
    "labels are int32": (
        "softmax_cross_entropy", (torch.zeros(5, 9), torch.zeros(5).int(), 0.0), "expected int64",
    ),
    "labels of other rows": (
        "softmax_cross_entropy", (torch.zeros(5, 9), torch.zeros(4).long(), 0.0), r"shape \(5\)",
    ),
    "no vocabulary": (
        "softmax_cross_entropy", (torch.zeros(5, 0), torch.zeros(5).long(), 0.0), "rows, vocab",
    ),
    "integer logits": (
        "softmax_cross_entropy", (torch.zeros(5, 9).int(), torch.zeros(5).long(), 0.0), "expected",
    ),
    "lse is bf16": (
        "softmax_cross_entropy_backward_",
        _entropy_inputs(lse=lambda x: x.bfloat16()),
        "expected fp64 for fp64 logits, else fp32",
    ),
    "gradients of other rows": (
        "softmax_cross_entropy_backward_", _entropy_inputs(grad=lambda x: x[1:]), r"shape \(5\)",
    ),
    "expanded gradients": (
        "softmax_cross_entropy_backward_",
        _entropy_inputs(grad=lambda x: x[:1].expand(5)),
        "must be dense",
    ),
    "wider gradients": (
        "softmax_cross_entropy_backward_",
        _entropy_inputs(logits=lambda x: x.bfloat16(), grad_dtype=lambda _: torch.float32),
        "fp32 ones in bf16 or fp16",
    ),
    "expanded logits": (
        "softmax_cross_entropy_backward_",
        _entropy_inputs(logits=lambda x: x[:1].expand(5, 9)),
        "rows overlap",
    ),
}  # fmt: skip


@native_only
@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_named(where, case):
    name, args, message = BAD[case]
    args = [to_device(where, x) if isinstance(x, torch.Tensor) else x for x in args]
    kept = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.hdp, name)(*args)
    assert re.search(message, str(caught.value)), f"{caught.value!s:.300} lacks {message!r}"
    assert name in str(caught.value)
    for before, after in zip(kept, args, strict=True):
        assert not isinstance(before, torch.Tensor) or torch.equal(before, after)


@pytest.mark.gpu
@CUDA_BUILT
def test_tensors_on_two_devices_are_rejected():
    with pytest.raises(RuntimeError, match=r"different devices|same device"):
        torch.ops.hdp.softmax_cross_entropy(
            torch.zeros(5, 9, device="cuda"), torch.zeros(5, dtype=torch.int64), 0.0
        )


# ---- how the runtime uses the ops ----


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_losses_with_and_without_the_library_agree(monkeypatch, dtype, softcap):
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (
        torch.randn(n, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (50, 300)
    )
    bias = torch.randn(300, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(300, (50,), generator=generator)

    def run():
        logprobs = chunked_logprobs(
            hidden, weight, labels, bias=bias, chunk_tokens=7, softcap=softcap
        )
        return logprobs, *torch.autograd.grad(logprobs.tanh().sum(), (hidden, weight, bias))

    with_library = run()
    nothing = dataclasses.replace(ops.LIBRARY, devices=frozenset())
    monkeypatch.setattr(ops, "LIBRARY", nothing)
    without = run()
    for a, b, kind in zip(
        with_library, without, [statistics_dtype(dtype)] + [dtype] * 3, strict=True
    ):
        close(a, b.detach(), kind)


@pytest.mark.gpu
@CUDA_BUILT
def test_backward_of_the_loss_holds_no_second_logits_tensor():
    """Only a chunk of fp32 logits and the matmuls' results; bf16 gradients reuse the logits."""
    tokens, vocab, hidden_size = 2048, 65536, 256
    hidden, weight = (
        torch.randn(n, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for n in (tokens, vocab)
    )
    labels = torch.randint(vocab, (tokens,), device="cuda")
    logprobs = chunked_logprobs(hidden, weight, labels, chunk_tokens=tokens)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logprobs.sum().backward()
    chunk = tokens * vocab * 4
    weight_grads = vocab * hidden_size * (4 + 4 + 2)  # fp32 sum, fp32 product, rounded result
    assert torch.cuda.max_memory_allocated() - before < chunk + weight_grads + (32 << 20)


@pytest.mark.gpu
@CUDA_BUILT
def test_ops_run_on_the_current_stream():
    """On a non-default stream, the result is ready when that stream has finished."""
    stream = torch.cuda.Stream()
    logits = torch.randn(512, 50000, device="cuda")
    labels = torch.randint(50000, (512,), device="cuda")
    want = ops.softmax_cross_entropy(logits, labels)[1].clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        copy = logits.clone()
        got = ops.softmax_cross_entropy(copy, labels)[1]
    assert not stream.query(), "the op waited for the device"
    stream.synchronize()
    assert torch.equal(got, want)


def test_describe_names_the_implementation(monkeypatch):
    for devices, device, choice, why in [
        (set(), "cpu", "plain torch", "not built"),
        ({"cpu"}, "cpu", "csrc", "not built"),
        ({"cpu"}, "cuda", "plain torch", "--mode cuda"),
        ({"cpu", "cuda"}, "cuda", "csrc", "not built"),
    ]:
        library = ops.Library(devices=frozenset(devices), text="csrc is not built")
        monkeypatch.setattr(ops, "LIBRARY", library)
        chosen = ops.describe(device)
        assert chosen[0] == choice and why in chosen[1]
