"""gather_rows and scatter_rows_ by spans, compared with indexing."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hdp.ops import native as ops
from tests.ops.op_cases import close, to_device

# The function-scoped fixture `where` is the same for all examples of a test.
RELAXED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@RELAXED
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
    got = ops.gather_rows(to_device(where, x), spans, dim)
    assert got.is_contiguous() and torch.equal(got.cpu(), x.index_select(dim, index))
    values = _rows(dim, len(index), inner, dtype)
    put = to_device(where, x.clone())
    ops.scatter_rows_(put, to_device(where, values), spans, dim)
    assert torch.equal(put.cpu(), x.clone().index_copy_(dim, index, values))


@RELAXED
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
    got = to_device(where, x.clone())
    ops.scatter_rows_(got, to_device(where, values), spans, dim, accumulate=True)
    want = x.double().index_add_(dim, index, values.double())
    close(got, want, dtype)


def test_rows_with_hundreds_of_spans(where):
    spans = [(i, i + 2) for i in range(0, 900, 3)]
    x = torch.randn(2, 901, 4, 16).bfloat16()
    got = ops.gather_rows(to_device(where, x), spans, 1)
    assert torch.equal(got.cpu(), x[:, _index(spans)])
    total = to_device(where, torch.zeros(901, 4, 16))
    ops.scatter_rows_(total, got[0].contiguous(), spans, accumulate=True)
    want = torch.zeros(901, 4, 16).index_add_(0, _index(spans), x[0, _index(spans)].float())
    assert torch.equal(total.cpu(), want)


def test_rows_of_views(where):
    """Any alignment, gaps between outer slices, and strides that only the reference supports."""
    big = torch.randn(14, 50, 9)
    spans = [(1, 3), (5, 9)]
    for view in (big[1:12], big[:, 3:20], big[1, 2:30], big.transpose(0, 1)[3:30], big[..., 2:4]):
        for dim in range(view.dim() - 1):
            there = to_device(where, big).as_strided(
                view.shape, view.stride(), view.storage_offset()
            )
            got = ops.gather_rows(there, spans, dim)
            assert torch.equal(got.cpu(), view.index_select(dim, _index(spans)))
    target, values = to_device(where, big.clone()), torch.randn(6, 9)
    ops.scatter_rows_(target[1, 7:], to_device(where, values), spans)
    big[1, 7:][_index(spans)] = values
    assert torch.equal(target.cpu(), big)


def test_gather_rows_gradcheck(where):
    x = to_device(where, torch.randn(9, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.gather_rows(t, [(1, 3), (6, 9)]), (x,))
    y = to_device(where, torch.randn(2, 7, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.gather_rows(t, [(0, 2), (5, 6)], 1), (y,))
