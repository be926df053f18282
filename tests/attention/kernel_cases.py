"""What every block kernel must compute, against dense attention in fp64.

`check_kernel` runs a kernel over one case: out and lse of a block, gradients of a causal block, and
the gradients of two key blocks from the (out, lse) of their union, which is what a ring needs.
Errors are relative, |got - want| / |want|; failures show the case, tensor and worst element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hdp.attention.kernels import BlockKernel
from hdp.attention.layout import Segments

# dtype -> largest relative error of (out, lse, gradients)
TOLERANCES = {
    torch.float64: (1e-13, 1e-13, 1e-12),
    torch.float32: (2e-6, 2e-6, 5e-6),
    torch.float16: (2e-3, 1e-4, 4e-3),
    torch.bfloat16: (8e-3, 5e-4, 2e-2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """lens_k: keys per segment, () for causal self-attention; other_k: those of a second block."""

    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...] = ()
    other_k: tuple[int, ...] = ()
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16

    @property
    def causal(self) -> bool:
        return not self.lens_k

    def scaled(self, **changes: int) -> Case:
        """The same segments with different heads."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Case(**(fields | changes))


CASES = {
    "one sequence": Case(lens_q=(37,)),
    "one token": Case(lens_q=(1,)),
    "equal sequences": Case(lens_q=(16,) * 8),
    "ragged sequences": Case(lens_q=(5, 1, 33, 8, 1, 20)),
    "long and short": Case(lens_q=(90, 3, 7)),
    "rectangle": Case(lens_q=(19,), lens_k=(40,), other_k=(13,)),
    "narrow rectangle": Case(lens_q=(33,), lens_k=(1,), other_k=(5,)),
    "equal rectangles": Case(lens_q=(9, 9, 9), lens_k=(12, 12, 12), other_k=(4, 4, 4)),
    "ragged rectangles": Case(lens_q=(7, 1, 30), lens_k=(3, 22, 9), other_k=(1, 2, 3)),
    "equal queries, ragged keys": Case(lens_q=(8, 8), lens_k=(3, 11), other_k=(6, 6)),
    "no grouping": Case(lens_q=(31, 2), kv_heads=4),
    "one KV head": Case(lens_q=(31,), kv_heads=1),
}

GPU_CASES = {
    "one sequence": Case(lens_q=(1000,)),
    "odd length": Case(lens_q=(777,)),
    "one token": Case(lens_q=(1,)),
    "128 equal": Case(lens_q=(64,) * 128),
    "many short": Case(lens_q=tuple(1 + (37 * i) % 61 for i in range(200))),
    "long and short": Case(lens_q=(1500, 3, 129, 1, 64)),
    "rectangle": Case(lens_q=(500,), lens_k=(1001,), other_k=(300,)),
    "ragged rectangles": Case(lens_q=(129, 1, 640), lens_k=(512, 7, 3), other_k=(64, 64, 1100)),
    "equal rectangles": Case(lens_q=(256,) * 3, lens_k=(384,) * 3, other_k=(128,) * 3),
}


def check_kernel(
    kernel: BlockKernel,
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    tolerances: tuple[float, float, float] | None = None,
    strided: bool = False,
) -> None:
    """Raises AssertionError where `kernel` differs from the oracle.

    strided: give q, k, v, dout as a model does, views of (heads, rows, dim) tensors.
    """
    out_limit, lse_limit, grad_limit = tolerances or TOLERANCES[dtype]
    scale = 0.7 * case.head_dim**-0.5
    lens_k = case.lens_k or case.lens_q
    blocks = [lens_k] + ([case.other_k] if case.other_k else [])
    q, dout = (_random(sum(case.lens_q), case.heads, case, dtype, device, strided) for _ in "qo")
    keys = [_random(sum(n), case.kv_heads, case, dtype, device, strided) for n in blocks]
    values = [_random(sum(n), case.kv_heads, case, dtype, device, strided) for n in blocks]
    segments = [Segments(case.lens_q, n, case.causal) for n in blocks]
    for part, k, v in zip(segments, keys, values, strict=True):
        out, lse = kernel.forward(q, k, v, part, scale)
        want_out, want_lse = dense(q, [k], [v], [part], scale)
        _expect_like(out, q, "out")
        assert lse.shape == (case.heads, q.shape[0]), f"lse {tuple(lse.shape)}"
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        _compare("out", out, want_out, out_limit)
        # a row with one key has lse near 0: make errors relative to 1, where lse differences matter
        _compare("lse", lse, want_lse, lse_limit, floor=want_lse.numel() ** 0.5)
    leaves = [x.detach().double().requires_grad_() for x in (q, *keys, *values)]
    n = len(blocks)
    full_out, full_lse = dense(leaves[0], leaves[1 : 1 + n], leaves[1 + n :], segments, scale)
    want = torch.autograd.grad(full_out, leaves, dout.double())
    got_dq = torch.zeros_like(want[0])
    for i, part in enumerate(segments):
        dq, dk, dv = kernel.backward(
            dout,
            q,
            keys[i],
            values[i],
            full_out.detach().to(dtype),
            full_lse.detach().to(lse.dtype),
            part,
            scale,
        )
        for name, grad, like in (("dq", dq, q), ("dk", dk, keys[i]), ("dv", dv, values[i])):
            _expect_like(grad, like, name)
        got_dq += dq.double()
        _compare(f"dk of block {i}", dk, want[1 + i], grad_limit, _floor(dk))
        _compare(f"dv of block {i}", dv, want[1 + n + i], grad_limit, _floor(dv))
    _compare("dq", got_dq, want[0], grad_limit, _floor(got_dq))


def dense(
    q: Tensor, keys: list[Tensor], values: list[Tensor], segments: list[Segments], scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) in fp64 over the union of key blocks, segment by segment. Differentiable."""
    outs, lses = [], []
    for i in range(len(segments[0].seqlens_q)):
        rows = slice(*segments[0].cu_seqlens_q[i : i + 2])
        spans = [slice(*part.cu_seqlens_k[i : i + 2]) for part in segments]
        k = torch.cat([x[span] for x, span in zip(keys, spans, strict=True)]).double()
        v = torch.cat([x[span] for x, span in zip(values, spans, strict=True)]).double()
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q[rows].double(), k.repeat_interleave(group, 1))
        scores = scores * scale
        if segments[0].causal:
            future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        lses.append(scores.logsumexp(-1))
        probs = scores.softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", probs, v.repeat_interleave(group, 1)))
    return torch.cat(outs), torch.cat(lses, 1)


def _random(
    rows: int, heads: int, case: Case, dtype: torch.dtype, device: str, strided: bool
) -> Tensor:
    if strided:
        x = torch.randn(heads, rows, case.head_dim, device=device, dtype=torch.float32)
        return x.to(dtype).transpose(0, 1)
    return torch.randn(rows, heads, case.head_dim, device=device, dtype=torch.float32).to(dtype)


def _floor(grad: Tensor) -> float:
    """Norm below which errors count as absolute: where a query has one key its gradient is 0."""
    return 0.05 * grad.numel() ** 0.5


def _expect_like(got: Tensor, like: Tensor, name: str) -> None:
    assert got.shape == like.shape, f"{name}: {tuple(got.shape)}, want {tuple(like.shape)}"
    assert got.dtype == like.dtype, f"{name}: {got.dtype}, want {like.dtype}"


def _compare(name: str, got: Tensor, want: Tensor, limit: float, floor: float = 0.0) -> None:
    difference = got.double() - want
    error = (difference.norm() / max(want.norm().item(), floor, 1e-30)).item()
    if error <= limit:  # NaN is not
        return
    worst = difference.abs().nan_to_num(nan=float("inf")).flatten().argmax()
    where = tuple(int(x) for x in torch.unravel_index(worst, want.shape))
    raise AssertionError(
        f"{name}: relative error {error:.2e}, allowed {limit:.0e}; worst at {where}: "
        f"{got[where].item():.6g}, want {want[where].item():.6g}"
    )
