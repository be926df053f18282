"""merge_lse_ joins two partial attention results in place."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hdp.ops import native as ops
from tests.ops.op_cases import close, merged, partial_results, to_device

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
    out, lse, block_out, block_lse = partial_results(rows, packed, heads, dim, dtype, block_dtype)
    want, want_lse = merged(out, lse, block_out, block_lse, spans)
    got, got_lse = to_device(where, out.clone(), lse.clone())
    ops.merge_lse_(got, got_lse, *to_device(where, block_out, block_lse), spans)
    close(got, want, dtype, "out")
    close(got_lse, want_lse, dtype, "lse")
    others = torch.ones(rows, dtype=torch.bool)
    for start, stop in spans:
        others[start:stop] = False
    assert torch.equal(got.cpu()[others], out[others]), "a row outside the spans changed"


def test_merge_of_key_blocks_is_attention_over_all_keys(where):
    """The purpose of the op: join partial softmaxes over disjoint keys, in any order."""
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
        out, lse = to_device(where, *(x.contiguous() for x in partial(slice(*order[0]))))
        for block in order[1:]:
            ops.merge_lse_(out, lse, *to_device(where, *partial(slice(*block))))
        close(out, want, torch.float64)
        close(lse, scores.logsumexp(-1), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_extreme_lse(where, dtype):
    """lse of +-700 and beyond, and of -inf (no keys) on one or both sides: exact, never NaN."""
    inf = float("inf")
    values = [0.0, 1e-30, 700.0, -700.0, 1e5, -1e5, -inf]
    pairs = torch.cartesian_prod(torch.tensor(values), torch.tensor(values)).to(dtype)
    lse, block_lse = (x[None].contiguous() for x in pairs.T)
    out, block_out = torch.full((len(pairs), 1, 4), 2.0, dtype=dtype), None
    block_out = torch.full_like(out, -3.0)
    got, got_lse = to_device(where, out.clone(), lse.clone())
    ops.merge_lse_(got, got_lse, *to_device(where, block_out, block_lse))
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got_lse.cpu(), torch.logaddexp(lse, block_lse))
    weight = torch.where(lse == block_lse, 0.5, torch.sigmoid(block_lse - lse))
    torch.testing.assert_close(got.cpu()[:, 0, 0], 2.0 - 5.0 * weight[0])


def test_merge_keeps_nan(where):
    out, lse, block_out, block_lse = partial_results(4, 4, 2, 8, torch.float32, torch.float32)
    block_lse[1, 2], block_out[0, 0, 3] = float("nan"), float("nan")
    got, got_lse = to_device(where, out, lse)
    ops.merge_lse_(got, got_lse, *to_device(where, block_out, block_lse))
    assert torch.isnan(got_lse[1, 2]) and torch.isnan(got[2, 1]).all() and torch.isnan(got[0, 0, 3])
    assert torch.isnan(got).sum() == 9 and torch.isnan(got_lse).sum() == 1


def test_merge_into_views(where):
    """As the ring calls it: with rows of a larger out and a larger lse, at any alignment."""
    out, lse, block_out, block_lse = partial_results(30, 7, 3, 8, torch.float32, torch.bfloat16)
    for rows in (slice(0, 7), slice(3, 10), slice(23, 30)):
        want, want_lse = merged(out[rows], lse[:, rows], block_out, block_lse, [(0, 7)])
        big, big_lse = to_device(where, out.clone(), lse.clone())
        ops.merge_lse_(big[rows], big_lse[:, rows], *to_device(where, block_out, block_lse))
        close(big[rows], want, torch.float32)
        close(big_lse[:, rows], want_lse, torch.float32)
    wide = torch.zeros(7, 5, 8)
    wide[:, 1:4] = out[:7]
    view, view_lse = to_device(where, wide)[:, 1:4], to_device(where, lse[:, :7].clone())
    ops.merge_lse_(view, view_lse, *to_device(where, block_out, block_lse))
    close(view, merged(out[:7], lse[:, :7], block_out, block_lse, [(0, 7)])[0], torch.float32)
