"""A compiled merge equals the merge; where compilation fails, it runs uncompiled."""

from __future__ import annotations

import warnings

import pytest
import torch

from hdp.ops import native as ops
from hdp.ops.compiled import Compiled
from hdp.ops.reference import join_, merge, merge_lse_reference_


def partial_results(rows: int, device: str = "cpu", seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out, block = torch.randn(2, rows, 4, 16, generator=generator)
    lse, block_lse = 3 * torch.randn(2, 4, rows, generator=generator)
    return [x.to(device) for x in (out, lse, block.bfloat16(), block_lse)]


def check_merges(join: Compiled, device: str = "cpu") -> None:
    """Merge whole tensors, parts of them, one row: all in place, leaving other rows alone."""
    for seed, (rows, spans) in enumerate(
        [
            (48, [(0, 48)]),
            (33, [(5, 32)]),
            (64, [(0, 9), (10, 11), (40, 64)]),
            (7, [(6, 7)]),
            (1, [(0, 1)]),
        ]
    ):
        out, lse, block, block_lse = partial_results(rows, device, seed)
        want_out, want_lse = out.double(), lse.double()
        taken = torch.cat([torch.arange(*span) for span in spans]).to(device)
        args = block[: len(taken)].double(), block_lse[:, : len(taken)].double()
        merged = merge(want_out[taken], want_lse[:, taken], *args)
        want_out[taken], want_lse[:, taken] = merged
        merge_lse_reference_(out, lse, block[: len(taken)], block_lse[:, : len(taken)], spans, join)
        assert join.failure is None, join.failure
        torch.testing.assert_close(out.double(), want_out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def test_compiled_merge_equals_the_merge() -> None:
    """Traced and functionalized as on a GPU, but without generating C++, which takes 60 s."""
    torch._dynamo.reset()
    join = Compiled(join_, varying=(0, 1, 0, 1))
    join._compiled = torch.compile(join_, fullgraph=True, backend="aot_eager")
    check_merges(join)


@pytest.mark.gpu
def test_gpu_compiled_merge_equals_the_merge() -> None:
    check_merges(ops.COMPILED_JOIN, "cuda")


def test_many_lengths_share_few_graphs() -> None:
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(inputs)
        return graph.forward

    join = Compiled(join_, varying=(0, 1, 0, 1))
    join._compiled = torch.compile(join_, fullgraph=True, backend=backend)
    for rows in range(2, 40):
        join(*partial_results(rows))
        out, lse, block, block_lse = partial_results(2 * rows)
        join(out[rows:], lse[:, rows:], block[:rows], block_lse[:, :rows])
    assert join.failure is None
    assert len(seen) <= 4, f"{len(seen)} graphs for 38 lengths"


def test_where_it_cannot_compile_it_runs_and_warns_once(monkeypatch) -> None:
    def broken(*args, **kwargs):
        def run(*tensors):
            raise RuntimeError("Failed to find C compiler\nPlease specify via CC")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    join = Compiled(join_, varying=(0, 1, 0, 1))
    results = [partial_results(5), partial_results(5)]
    with pytest.warns(UserWarning, match="join_ runs uncompiled: Failed to find C compiler$"):
        join(*results[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        join(*partial_results(9))
    join_(*results[1])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_out_of_memory_is_not_hidden(monkeypatch) -> None:
    def full(*args, **kwargs):
        def run(*tensors):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    monkeypatch.setattr(torch, "compile", full)
    with pytest.raises(torch.OutOfMemoryError):
        Compiled(join_, varying=(0, 1, 0, 1))(*partial_results(5))
