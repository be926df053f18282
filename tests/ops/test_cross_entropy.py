"""Softmax cross-entropy, forward and backward, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hdp.ops import native as ops
from tests.ops.op_cases import (
    FLOATS,
    close,
    dense,
    dense_grad,
    logits_and_labels,
    native_only,
    statistics_dtype,
    to_device,
)

VOCABULARIES = [1, 2, 4, 7, 255, 1000, 1023, 1024, 1025, 2060, 8195]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_cross_entropy_equals_fp64(where, dtype, softcap, vocab):
    logits, labels = logits_and_labels(9, vocab, dtype)
    logprobs, lse = ops.softmax_cross_entropy(*to_device(where, logits, labels), softcap)
    statistics = statistics_dtype(dtype)
    assert logprobs.dtype == lse.dtype == statistics
    want, want_lse = dense(logits.double(), labels, softcap)
    # The logits count as exact, so half-precision inputs get the same tolerance.
    close(logprobs, want, statistics, "logprobs")
    close(lse, want_lse, statistics, "lse")
    assert (logprobs.cpu()[labels == ops.IGNORE_INDEX] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [*((dtype, None) for dtype in FLOATS), *((torch.float32, half) for half in FLOATS[2:])],
)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_cross_entropy_backward_equals_fp64(where, dtype, grad_dtype, softcap, with_lse, vocab):
    logits, labels = logits_and_labels(9, vocab, dtype)
    _, lse = dense(logits.double(), labels, softcap)
    grad, grad_lse = torch.randn(2, 9, generator=torch.Generator().manual_seed(1)).double()
    grad_lse = grad_lse if with_lse else None
    buffer = to_device(where, logits.clone())
    got = ops.softmax_cross_entropy_backward_(
        buffer,
        *to_device(
            where, labels, lse.to(statistics_dtype(dtype)), grad.to(statistics_dtype(dtype))
        ),
        grad_lse=None
        if grad_lse is None
        else to_device(where, grad_lse.to(statistics_dtype(dtype))),
        softcap=softcap,
        grad_dtype=grad_dtype,
    )
    assert got.dtype == (grad_dtype or dtype)
    want = dense_grad(logits, labels, softcap, grad, grad_lse)
    close(got, want, grad_dtype or dtype)
    assert (got.cpu()[labels == ops.IGNORE_INDEX] == 0).all()
    if where != "reference":
        assert got.data_ptr() == buffer.data_ptr(), "the gradient is not in the logits' memory"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", range(5))
def test_cross_entropy_of_padded_rows(where, dtype, offset):
    """Rows of a wider tensor, at any alignment; the columns around them must not change."""
    logits, labels = logits_and_labels(6, 300, dtype)
    wide = torch.full((6, 317), 9.0, dtype=dtype)
    columns = slice(offset, offset + 300)
    wide[:, columns] = logits
    wide = to_device(where, wide)
    logprobs, lse = ops.softmax_cross_entropy(wide[:, columns], to_device(where, labels))
    close(logprobs, dense(logits.double(), labels, None)[0], statistics_dtype(dtype))
    grad = torch.ones(6, dtype=statistics_dtype(dtype))
    got = ops.softmax_cross_entropy_backward_(
        wide[:, columns], *to_device(where, labels, lse.cpu(), grad)
    )
    close(got, dense_grad(logits, labels, None, grad, None), dtype)
    if where != "reference":
        padding = torch.ones(317, dtype=torch.bool)
        padding[columns] = False
        assert (wide.cpu()[:, padding] == 9.0).all()


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
    logprobs, lse = ops.softmax_cross_entropy(*to_device(where, logits, labels))
    want, want_lse = dense(logits.double(), labels, None)
    torch.testing.assert_close(lse.cpu(), want_lse.float())
    if where == "reference":  # it subtracts the lse, whose last bit is 2^-10 here
        torch.testing.assert_close(logprobs[:4], want[:4].float(), atol=1e-3, rtol=1e-6)
    else:
        torch.testing.assert_close(logprobs.cpu(), want.float(), atol=1e-6, rtol=1e-6)
    buffer, grad = to_device(where, logits[:4].clone(), torch.ones(4))
    got = ops.softmax_cross_entropy_backward_(buffer, to_device(where, labels[:4]), lse[:4], grad)
    softmax = logits[:4].double().softmax(1)
    error = (got.cpu().double() - (F.one_hot(labels[:4], 4) - softmax)).abs().amax(1)
    assert error[:2].max() < 1e-3 and error[2:].max() < 1e-6, error


def test_cross_entropy_of_non_finite_logits_is_not_finite(where):
    """All logits -inf, or a NaN or +inf among them: the step must stop instead of training."""
    nan, inf = float("nan"), float("inf")
    logits = torch.zeros(4, 1500)
    logits[0] = -inf
    logits[1, 1400] = nan
    logits[2, 3] = inf
    logprobs, lse = ops.softmax_cross_entropy(*to_device(where, logits, torch.tensor([0, 1, 2, 3])))
    assert torch.isfinite(logprobs).tolist() == [False, False, False, True]
    assert torch.isfinite(lse).tolist() == [False, False, False, True]
    assert lse[0] == -inf


@native_only
def test_label_outside_of_the_vocabulary(where):
    logits, labels = to_device(where, torch.zeros(3, 5), torch.tensor([0, 5, -1]))
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


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy_gradcheck(where, softcap):
    logits, labels = logits_and_labels(5, 8, torch.float64, ignored=0.3)
    kept = to_device(where, logits.clone())
    leaf = to_device(where, logits).requires_grad_()
    labels = to_device(where, labels)
    assert torch.autograd.gradcheck(
        lambda x: ops.softmax_cross_entropy(x, labels, softcap), (leaf,)
    )
    ops.softmax_cross_entropy(leaf, labels, softcap)[0].sum().backward()
    assert torch.equal(leaf.detach(), kept), "backward overwrote the caller's logits"


@pytest.mark.parametrize("vocab", [1, 5000])
def test_no_rows(where, vocab):
    empty, none = to_device(where, torch.zeros(0, vocab), torch.zeros(0, dtype=torch.int64))
    logprobs, lse = ops.softmax_cross_entropy(empty, none)
    assert logprobs.shape == lse.shape == (0,)
    assert ops.softmax_cross_entropy_backward_(empty, none, lse, logprobs).shape == (0, vocab)
