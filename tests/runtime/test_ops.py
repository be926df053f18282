"""The ops of csrc/ against fp64: every dtype, odd sizes, many spans, extreme values, bad inputs.

Each test runs the Python reference, the CPU library where it is built (`python csrc/build.py`) and
the CUDA kernels where there is a GPU.
"""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from hdp import ops
from hdp.losses import chunked_logprobs

NATIVE = pytest.mark.skipif("cpu" not in ops.LIBRARY.devices, reason=ops.LIBRARY.text)
CUDA_BUILT = pytest.mark.skipif("cuda" not in ops.LIBRARY.devices, reason=ops.LIBRARY.text)
WHERE = [
    "reference",
    pytest.param("cpu", marks=NATIVE),
    pytest.param("cuda", marks=[pytest.mark.gpu, CUDA_BUILT]),
]
native_only = pytest.mark.parametrize("where", WHERE[1:])
everywhere = pytest.mark.parametrize("where", WHERE)

# Relative to the largest value; half precision is that of the inputs, the arithmetic is fp32.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def _choose(request, monkeypatch):
    """`where` = reference: as if the library were not there."""
    params = getattr(request.node, "callspec", None)
    if params is not None and params.params.get("where") == "reference":
        nothing = dataclasses.replace(ops.LIBRARY, devices=frozenset())
        monkeypatch.setattr(ops, "LIBRARY", nothing)


def _to(where, *tensors):
    device = "cuda" if where == "cuda" else "cpu"
    return tensors[0].to(device) if len(tensors) == 1 else tuple(x.to(device) for x in tensors)


def _close(got, want, dtype, what="result"):
    assert got.shape == want.shape
    if not want.numel():
        return
    got, want = got.detach().double().cpu(), want.double()
    error = (got - want).abs().max() / max(1.0, want.abs().max())
    assert error <= TOLERANCE[dtype], f"{what}: off by {error:.2e}, allowed {TOLERANCE[dtype]}"


# ---- merge ----


def _partial(rows, packed, heads, dim, dtype, block_dtype, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    out, lse = normal(rows, heads, dim).to(dtype), normal(heads, rows).mul(spread).to(dtype)
    block_out = normal(packed, heads, dim).to(block_dtype)
    return out, lse, block_out, normal(heads, packed).mul(spread).to(dtype)


def _merged(out, lse, block_out, block_lse, spans):
    """The definition, in fp64."""
    out, lse = out.double().clone(), lse.double().clone()
    index = torch.cat([torch.arange(0), *(torch.arange(*span) for span in spans)])
    both = torch.stack((lse[:, index], block_lse.double()))
    weights = both.softmax(0)[..., None].transpose(1, 2)  # (2, packed, heads, 1)
    out[index] = weights[0] * out[index] + weights[1] * block_out.double()
    lse[:, index] = both.logsumexp(0)
    return out, lse


MERGES = {
    "typical": (40, 4, 64, [(0, 40)]),
    "late half": (40, 8, 128, [(20, 40)]),
    "odd everything": (37, 3, 13, [(1, 4), (4, 4), (10, 31)]),
    "one head, one number": (5, 1, 1, [(0, 1), (4, 5)]),
    "head size of 80": (9, 5, 80, [(0, 9)]),
    "more heads than a block": (11, 19, 24, [(2, 11)]),
    "more spans than a launch": (400, 2, 8, [(i, i + 1) for i in range(0, 399, 3)]),
    "no rows": (0, 2, 8, []),
    "no spans": (6, 2, 8, []),
    "no heads": (6, 0, 8, [(1, 3)]),
    "no dim": (6, 2, 0, [(1, 3)]),
}


@everywhere
@pytest.mark.parametrize("case", MERGES)
@pytest.mark.parametrize(
    ("dtype", "block_dtype"),
    [
        (torch.float64, torch.float64),
        *((torch.float32, block) for block in (torch.float32, torch.bfloat16, torch.float16)),
    ],
)
def test_merge_equals_fp64(where, case, dtype, block_dtype):
    rows, heads, dim, spans = MERGES[case]
    packed = sum(stop - start for start, stop in spans)
    out, lse, block_out, block_lse = _partial(rows, packed, heads, dim, dtype, block_dtype)
    want, want_lse = _merged(out, lse, block_out, block_lse, spans)
    got, got_lse = _to(where, out.clone(), lse.clone())
    ops.merge_lse_(got, got_lse, *_to(where, block_out, block_lse), spans)
    _close(got, want, dtype, "out")
    _close(got_lse, want_lse, dtype, "lse")
    others = torch.ones(rows, dtype=torch.bool)
    for start, stop in spans:
        others[start:stop] = False
    assert torch.equal(got.cpu()[others], out[others]), "a row outside of the spans changed"


@everywhere
def test_merge_of_key_blocks_is_attention_over_all_keys(where):
    """The reason for the op: partial softmaxes over disjoint keys, joined in any order."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 50, 2, 16, generator=generator, dtype=torch.float64)
    scores = torch.einsum("qhd,khd->hqk", q, k)
    want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    bounds = [0, 1, 17, 18, 40, 50]
    blocks = list(pairwise(bounds))

    def partial(keys):
        part = scores[:, :, keys]
        return torch.einsum("hqk,khd->qhd", part.softmax(-1), v[keys]), part.logsumexp(-1)

    for order in (blocks, blocks[::-1], blocks[2:] + blocks[:2]):
        out, lse = _to(where, *(x.contiguous() for x in partial(slice(*order[0]))))
        for block in order[1:]:
            ops.merge_lse_(out, lse, *_to(where, *partial(slice(*block))))
        _close(out, want, torch.float64)
        _close(lse, scores.logsumexp(-1), torch.float64)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_extreme_lse(where, dtype):
    """+-700 and further apart, no keys at all (-inf) on either side or both: exact, never NaN."""
    inf = float("inf")
    values = [0.0, 1e-30, 700.0, -700.0, 1e5, -1e5, -inf]
    pairs = torch.cartesian_prod(torch.tensor(values), torch.tensor(values)).to(dtype)
    lse, block_lse = (x[None].contiguous() for x in pairs.T)
    out, block_out = torch.full((len(pairs), 1, 4), 2.0, dtype=dtype), None
    block_out = torch.full_like(out, -3.0)
    got, got_lse = _to(where, out.clone(), lse.clone())
    ops.merge_lse_(got, got_lse, *_to(where, block_out, block_lse))
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got_lse.cpu(), torch.logaddexp(lse, block_lse))
    weight = torch.where(lse == block_lse, 0.5, torch.sigmoid(block_lse - lse))
    torch.testing.assert_close(got.cpu()[:, 0, 0], 2.0 - 5.0 * weight[0])


@everywhere
def test_merge_keeps_nan(where):
    out, lse, block_out, block_lse = _partial(4, 4, 2, 8, torch.float32, torch.float32)
    block_lse[1, 2], block_out[0, 0, 3] = float("nan"), float("nan")
    got, got_lse = _to(where, out, lse)
    ops.merge_lse_(got, got_lse, *_to(where, block_out, block_lse))
    assert torch.isnan(got_lse[1, 2]) and torch.isnan(got[2, 1]).all() and torch.isnan(got[0, 0, 3])
    assert torch.isnan(got).sum() == 9 and torch.isnan(got_lse).sum() == 1


@everywhere
def test_merge_into_views(where):
    """What the ring passes: rows of a larger lse, and of a larger out, at any alignment."""
    out, lse, block_out, block_lse = _partial(30, 7, 3, 8, torch.float32, torch.bfloat16)
    for rows in (slice(0, 7), slice(3, 10), slice(23, 30)):
        want, want_lse = _merged(out[rows], lse[:, rows], block_out, block_lse, [(0, 7)])
        big, big_lse = _to(where, out.clone(), lse.clone())
        ops.merge_lse_(big[rows], big_lse[:, rows], *_to(where, block_out, block_lse))
        _close(big[rows], want, torch.float32)
        _close(big_lse[:, rows], want_lse, torch.float32)
    wide = torch.zeros(7, 5, 8)
    wide[:, 1:4] = out[:7]
    view, view_lse = _to(where, wide)[:, 1:4], _to(where, lse[:, :7].clone())
    ops.merge_lse_(view, view_lse, *_to(where, block_out, block_lse))
    _close(view, _merged(out[:7], lse[:, :7], block_out, block_lse, [(0, 7)])[0], torch.float32)


# ---- rows by spans ----


@st.composite
def _spans(draw, most=6):
    spans, at = [], 0
    for gap, size in draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=most)):
        spans.append((at + gap, at + gap + size))
        at += gap + size
    return spans, at + draw(st.integers(0, 3))


def _index(spans):
    return torch.tensor([i for start, stop in spans for i in range(start, stop)]).long()


ROW_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def _rows(dim, num_rows, inner, dtype):
    shape = (num_rows, *inner) if dim == 0 else (3, num_rows, *inner)
    return (torch.randn(shape, dtype=torch.float64) * 50).abs().to(dtype)


@everywhere
@settings(max_examples=60)
@given(
    case=_spans(),
    dim=st.sampled_from([0, 1]),
    inner=st.sampled_from([(), (1,), (3,), (2, 5), (8,), (4, 32)]),
    dtype=st.sampled_from(ROW_DTYPES),
)
def test_gather_and_scatter_equal_indexing(where, case, dim, inner, dtype):
    spans, num_rows = case
    index = _index(spans)
    x = _rows(dim, num_rows, inner, dtype)
    got = ops.gather_rows(_to(where, x), spans, dim)
    assert got.is_contiguous() and torch.equal(got.cpu(), x.index_select(dim, index))
    values = _rows(dim, len(index), inner, dtype)
    put = _to(where, x.clone())
    ops.scatter_rows_(put, _to(where, values), spans, dim)
    assert torch.equal(put.cpu(), x.clone().index_copy_(dim, index, values))


@everywhere
@settings(max_examples=60)
@given(
    case=_spans(),
    dim=st.sampled_from([0, 1]),
    inner=st.sampled_from([(), (3,), (2, 5), (8,), (4, 32)]),
    dtypes=st.sampled_from(
        [(dtype, dtype) for dtype in ROW_DTYPES[:4]]
        + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
    ),
)
def test_accumulate_equals_indexing(where, case, dim, inner, dtypes):
    spans, num_rows = case
    index, (dtype, values_dtype) = _index(spans), dtypes
    x, values = _rows(dim, num_rows, inner, dtype), _rows(dim, len(index), inner, values_dtype)
    got = _to(where, x.clone())
    ops.scatter_rows_(got, _to(where, values), spans, dim, accumulate=True)
    want = x.double().index_add_(dim, index, values.double())
    _close(got, want, dtype)


@everywhere
def test_rows_with_hundreds_of_spans(where):
    spans = [(i, i + 2) for i in range(0, 900, 3)]
    x = torch.randn(2, 901, 4, 16).bfloat16()
    got = ops.gather_rows(_to(where, x), spans, 1)
    assert torch.equal(got.cpu(), x[:, _index(spans)])
    total = _to(where, torch.zeros(901, 4, 16))
    ops.scatter_rows_(total, got[0].contiguous(), spans, accumulate=True)
    want = torch.zeros(901, 4, 16).index_add_(0, _index(spans), x[0, _index(spans)].float())
    assert torch.equal(total.cpu(), want)


@everywhere
def test_rows_of_views(where):
    """Any alignment, gaps between the outer slices, and strides that only the reference walks."""
    big = torch.randn(14, 50, 9)
    spans = [(1, 3), (5, 9)]
    for view in (big[1:12], big[:, 3:20], big[1, 2:30], big.transpose(0, 1)[3:30], big[..., 2:4]):
        for dim in range(view.dim() - 1):
            there = _to(where, big).as_strided(view.shape, view.stride(), view.storage_offset())
            got = ops.gather_rows(there, spans, dim)
            assert torch.equal(got.cpu(), view.index_select(dim, _index(spans)))
    target, values = _to(where, big.clone()), torch.randn(6, 9)
    ops.scatter_rows_(target[1, 7:], _to(where, values), spans)
    big[1, 7:][_index(spans)] = values
    assert torch.equal(target.cpu(), big)


@everywhere
def test_gather_rows_gradcheck(where):
    x = _to(where, torch.randn(9, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.gather_rows(t, [(1, 3), (6, 9)]), (x,))
    y = _to(where, torch.randn(2, 7, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.gather_rows(t, [(0, 2), (5, 6)], 1), (y,))


# ---- cross-entropy ----


def _logits(rows, vocab, dtype, seed=0, ignored=0.2, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = ops.IGNORE_INDEX
    return logits.to(dtype), labels


def _dense(logits, labels, softcap):
    """(logprobs, lse) in fp64, differentiable."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    ignored = labels == ops.IGNORE_INDEX
    logprobs = -F.cross_entropy(logits, labels, ignore_index=ops.IGNORE_INDEX, reduction="none")
    return logprobs, logits.logsumexp(1).masked_fill(ignored, 0.0)


def _dense_grad(logits, labels, softcap, grad_logprobs, grad_lse):
    exact = logits.double().requires_grad_()
    grads = [grad_logprobs.double()] + ([] if grad_lse is None else [grad_lse.double()])
    results = _dense(exact, labels, softcap)[: len(grads)]
    return torch.autograd.grad(results, exact, grads)[0]


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [1, 2, 4, 7, 255, 1000, 1023, 1024, 1025, 2060, 8195]


def _statistics(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@everywhere
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_cross_entropy_equals_fp64(where, dtype, softcap, vocab):
    logits, labels = _logits(9, vocab, dtype)
    logprobs, lse = ops.softmax_cross_entropy(*_to(where, logits, labels), softcap)
    statistics = _statistics(dtype)
    assert logprobs.dtype == lse.dtype == statistics
    want, want_lse = _dense(logits.double(), labels, softcap)
    # The logits count as exact: half precision is no excuse.
    _close(logprobs, want, statistics, "logprobs")
    _close(lse, want_lse, statistics, "lse")
    assert (logprobs.cpu()[labels == ops.IGNORE_INDEX] == 0).all()


@everywhere
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [*((dtype, None) for dtype in FLOATS), *((torch.float32, half) for half in FLOATS[2:])],
)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_cross_entropy_backward_equals_fp64(where, dtype, grad_dtype, softcap, with_lse, vocab):
    logits, labels = _logits(9, vocab, dtype)
    _, lse = _dense(logits.double(), labels, softcap)
    grad, grad_lse = torch.randn(2, 9, generator=torch.Generator().manual_seed(1)).double()
    grad_lse = grad_lse if with_lse else None
    buffer = _to(where, logits.clone())
    got = ops.softmax_cross_entropy_backward_(
        buffer,
        *_to(where, labels, lse.to(_statistics(dtype)), grad.to(_statistics(dtype))),
        grad_lse=None if grad_lse is None else _to(where, grad_lse.to(_statistics(dtype))),
        softcap=softcap,
        grad_dtype=grad_dtype,
    )
    assert got.dtype == (grad_dtype or dtype)
    want = _dense_grad(logits, labels, softcap, grad, grad_lse)
    _close(got, want, grad_dtype or dtype)
    assert (got.cpu()[labels == ops.IGNORE_INDEX] == 0).all()
    if where != "reference":
        assert got.data_ptr() == buffer.data_ptr(), "the gradient is not in the logits' memory"


@everywhere
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", range(5))
def test_cross_entropy_of_padded_rows(where, dtype, offset):
    """Rows of a wider tensor, starting at any alignment; what lies beside them does not change."""
    logits, labels = _logits(6, 300, dtype)
    wide = torch.full((6, 317), 9.0, dtype=dtype)
    columns = slice(offset, offset + 300)
    wide[:, columns] = logits
    wide = _to(where, wide)
    logprobs, lse = ops.softmax_cross_entropy(wide[:, columns], _to(where, labels))
    _close(logprobs, _dense(logits.double(), labels, None)[0], _statistics(dtype))
    grad = torch.ones(6, dtype=_statistics(dtype))
    got = ops.softmax_cross_entropy_backward_(
        wide[:, columns], *_to(where, labels, lse.cpu(), grad)
    )
    _close(got, _dense_grad(logits, labels, None, grad, None), dtype)
    if where != "reference":
        beside = torch.ones(317, dtype=torch.bool)
        beside[columns] = False
        assert (wide.cpu()[:, beside] == 9.0).all()


@everywhere
def test_cross_entropy_extreme_logits(where):
    inf = float("inf")
    rows = [
        [1e4, -1e4, 0.0, 1e4],
        [-1e4, -1e4, -1e4, -1e4],
        [-inf, 3.0, -inf, 2.0],
        [-inf, -inf, 88.0, -88.0],
        [3e38, -3e38, 3e38, 0.0],
        [-3.4028e38, -3.4028e38, -3.4028e38, -inf],
    ]
    logits, labels = torch.tensor(rows), torch.tensor([0, 2, 0, 2, 0, 1])
    logprobs, lse = ops.softmax_cross_entropy(*_to(where, logits, labels))
    want, want_lse = _dense(logits.double(), labels, None)
    torch.testing.assert_close(lse.cpu(), want_lse.float())
    if where == "reference":  # it takes the difference with lse, whose last bit is 2^-10 here
        torch.testing.assert_close(logprobs[:4], want[:4].float(), atol=1e-3, rtol=1e-6)
    else:
        torch.testing.assert_close(logprobs.cpu(), want.float(), atol=1e-6, rtol=1e-6)
    buffer, grad = _to(where, logits[:4].clone(), torch.ones(4))
    got = ops.softmax_cross_entropy_backward_(buffer, _to(where, labels[:4]), lse[:4], grad)
    softmax = logits[:4].double().softmax(1)
    error = (got.cpu().double() - (F.one_hot(labels[:4], 4) - softmax)).abs().amax(1)
    assert error[:2].max() < 1e-3 and error[2:].max() < 1e-6, error


@everywhere
def test_cross_entropy_of_nothing_possible_is_not_finite(where):
    """All logits -inf, or a NaN or +inf among them: the step must stop, not train on it."""
    nan, inf = float("nan"), float("inf")
    logits = torch.zeros(4, 1500)
    logits[0] = -inf
    logits[1, 1400] = nan
    logits[2, 3] = inf
    logprobs, lse = ops.softmax_cross_entropy(*_to(where, logits, torch.tensor([0, 1, 2, 3])))
    assert torch.isfinite(logprobs).tolist() == [False, False, False, True]
    assert torch.isfinite(lse).tolist() == [False, False, False, True]
    assert lse[0] == -inf


@native_only
def test_label_outside_of_the_vocabulary(where):
    logits, labels = _to(where, torch.zeros(3, 5), torch.tensor([0, 5, -1]))
    if where == "cpu":
        with pytest.raises(
            RuntimeError, match="label 5 of row 1 is outside of the vocabulary of 5"
        ):
            ops.softmax_cross_entropy(logits, labels)
    else:
        logprobs, lse = ops.softmax_cross_entropy(logits, labels)
        assert torch.isnan(logprobs).tolist() == [False, True, True]
        got = ops.softmax_cross_entropy_backward_(logits, labels, lse, torch.ones_like(lse))
        assert torch.isnan(got).all(1).tolist() == [False, True, True]


@everywhere
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy_gradcheck(where, softcap):
    logits, labels = _logits(5, 8, torch.float64, ignored=0.3)
    kept = _to(where, logits.clone())
    leaf = _to(where, logits).requires_grad_()
    labels = _to(where, labels)
    assert torch.autograd.gradcheck(
        lambda x: ops.softmax_cross_entropy(x, labels, softcap), (leaf,)
    )
    ops.softmax_cross_entropy(leaf, labels, softcap)[0].sum().backward()
    assert torch.equal(leaf.detach(), kept), "backward used up logits that are the caller's"


@everywhere
@pytest.mark.parametrize("vocab", [1, 5000])
def test_no_rows(where, vocab):
    empty, none = _to(where, torch.zeros(0, vocab), torch.zeros(0, dtype=torch.int64))
    logprobs, lse = ops.softmax_cross_entropy(empty, none)
    assert logprobs.shape == lse.shape == (0,)
    assert ops.softmax_cross_entropy_backward_(empty, none, lse, logprobs).shape == (0, vocab)


# ---- same input, same bits ----


def _everything(where):
    """Results of every op on inputs large enough for several threads and blocks."""
    out, lse, block_out, block_lse = _to(
        where, *_partial(700, 500, 4, 64, torch.float32, torch.bfloat16)
    )
    spans = [(10, 210), (300, 600)]
    ops.merge_lse_(out, lse, block_out, block_lse, spans)
    total = _to(where, torch.ones(700, 4, 64))
    ops.scatter_rows_(total, block_out, spans, accumulate=True)
    logits, labels = _to(where, *_logits(64, 4099, torch.float32))
    logprobs, row_lse = ops.softmax_cross_entropy(logits, labels)
    grads = ops.softmax_cross_entropy_backward_(
        logits, labels, row_lse, logprobs, grad_dtype=torch.bfloat16
    )
    return [out, lse, total, ops.gather_rows(total, spans), logprobs, row_lse, grads.clone()]


@everywhere
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


# ---- what torch needs to know ----


def _samples(where):
    """(op, arguments) that opcheck runs."""
    names = torch.ops.hdp
    merge = _to(where, *_partial(6, 5, 2, 4, torch.float32, torch.bfloat16))
    x, values = _to(where, torch.randn(2, 7, 3), torch.randn(2, 4, 3))
    logits, labels = _to(where, *_logits(5, 9, torch.float32))
    lse, grad = _to(where, *torch.randn(2, 5))
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
    """No graph break; what is traced has the right shapes and mutates what it says."""

    def step(x, out, lse, block_out, block_lse, logits, labels):
        ops.merge_lse_(out, lse, block_out, block_lse, ((1, 6),))
        rows = ops.gather_rows(x, ((0, 2), (3, 5)))
        logprobs, _ = ops.softmax_cross_entropy(logits, labels)
        return out.sum() + rows.sum() + logprobs.sum()

    def inputs():
        merge = _partial(6, 5, 2, 4, torch.float32, torch.float32)
        return _to(where, torch.ones(5, 3), *merge, *_logits(5, 9, torch.float32))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), step(*inputs()))


# ---- bad inputs ----


def _merge_inputs(**changes):
    out, lse, block_out, block_lse = _partial(6, 5, 2, 4, torch.float32, torch.float32)
    given = {"out": out, "lse": lse, "block_out": block_out, "block_lse": block_lse}
    given["spans"] = [1, 6]
    for name, change in changes.items():
        given[name] = change(given[name])
    return tuple(given.values())


def _entropy_inputs(**changes):
    logits, labels = _logits(5, 9, torch.float32)
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
    args = [_to(where, x) if isinstance(x, torch.Tensor) else x for x in args]
    kept = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.hdp, name)(*args)
    assert re.search(message, str(caught.value)), f"{caught.value!s:.300} lacks {message!r}"
    assert name in str(caught.value)
    for before, after in zip(kept, args, strict=True):
        assert not isinstance(before, torch.Tensor) or torch.equal(before, after)


@pytest.mark.gpu
@CUDA_BUILT
def test_tensors_on_two_devices_are_refused():
    with pytest.raises(RuntimeError, match=r"different devices|same device"):
        torch.ops.hdp.softmax_cross_entropy(
            torch.zeros(5, 9, device="cuda"), torch.zeros(5, dtype=torch.int64), 0.0
        )


# ---- where the runtime uses them ----


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_losses_are_the_same_with_and_without(monkeypatch, dtype, softcap):
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
    for a, b, kind in zip(with_library, without, [_statistics(dtype)] + [dtype] * 3, strict=True):
        _close(a, b.detach(), kind)


@pytest.mark.gpu
@CUDA_BUILT
def test_backward_of_the_loss_holds_no_second_logits_tensor():
    """One chunk of fp32 logits and what the matmuls return; bf16 gradients lie in the logits."""
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
    weight_grads = vocab * hidden_size * (4 + 4 + 2)  # the fp32 sum, a product, the rounded one
    assert torch.cuda.max_memory_allocated() - before < chunk + weight_grads + (32 << 20)


@pytest.mark.gpu
@CUDA_BUILT
def test_ops_run_on_the_current_stream():
    """A stream that is not the default one: the result is ready when that stream is."""
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


def test_what_runs_is_announced(monkeypatch):
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
