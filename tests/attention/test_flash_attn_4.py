"""The real flash-attn 4 accepts our adapter's calls and compiles its kernels, without a GPU.

flash-attn 4 compiles its kernels from Python on the first call; under torch's fake tensors it
compiles without launching. So its argument checks and its compiler run on any machine with the
wheels (pip install flash-attn-4, 300 MB); without them, these tests are skipped. Their results need
a GPU: tests/attention/test_kernels.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.patience import patience

ROOT = Path(__file__).resolve().parents[2]


def calls(head_dim: int, heads: int, kv_heads: int) -> None:
    """Forward and backward through the adapter, on fake CUDA tensors (in a process of its own)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from hdp.attention.kernels.flash_attn import FlashAttn4Kernel, _flash_attn_4
    from hdp.attention.layout import Segments

    assert _flash_attn_4()._flash_attn_fwd
    cases = [
        Segments((1000,), (1000,), causal=True),
        Segments((1000,), (500,), causal=False),
        Segments((100, 37, 1), (100, 37, 1), causal=True),
        Segments((100, 37, 1), (5, 600, 20), causal=False),
        Segments((40,), (40,), causal=True),  # one tile: a separate kernel
    ]
    with FakeTensorMode():
        for segments in cases:
            rows, keys = sum(segments.seqlens_q), sum(segments.seqlens_k)
            strided = torch.empty(heads, rows, head_dim, device="cuda", dtype=torch.bfloat16)
            q = strided.transpose(0, 1)  # as a model gives it
            kv = torch.empty(2, keys + 9, kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
            k, v = kv.narrow(1, 3, keys).unbind()  # as a ring step gives it
            offsets = torch.empty(
                2, len(segments.seqlens_q) + 1, device="cuda", dtype=torch.int32
            ).unbind()
            segments._on_device[q.device] = offsets
            kernel = FlashAttn4Kernel()
            out, lse = kernel.forward(q, k, v, segments, 0.1)
            assert (out.shape, out.dtype) == (q.shape, q.dtype)
            assert (lse.shape, lse.dtype) == ((heads, rows), torch.float32)
            dout = torch.empty_like(q)
            grads = kernel.backward(dout, q, k, v, out, lse, segments, 0.1)
            for grad, like in zip(grads, (q, k, v), strict=True):
                assert (grad.shape, grad.dtype) == (like.shape, like.dtype)
    print("compiled", len(cases))


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "deterministic"),
    [(128, 8, 2, False), (128, 8, 8, True), (64, 8, 2, True), (256, 8, 2, False)],
)
def test_flash_attn_4_takes_our_calls(head_dim, heads, kv_heads, deterministic) -> None:
    """For Hopper only: for Blackwell its scheduler queries the driver about the GPU."""
    pytest.importorskip("flash_attn.cute.interface", exc_type=ImportError)
    code = (
        "import torch; from tests.attention.test_flash_attn_4 import calls;"
        f"torch.use_deterministic_algorithms({deterministic}, warn_only=True);"
        "torch.cuda.current_device = lambda: 0;"
        f"calls({head_dim}, {heads}, {kv_heads})"
    )
    environ = {
        **os.environ,
        "FLASH_ATTENTION_ARCH": "sm_90",
        "CUTE_DSL_ARCH": "sm_90a",
        "FLASH_ATTENTION_NUM_SMS": "132",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=patience(900),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "compiled 5" in done.stdout
