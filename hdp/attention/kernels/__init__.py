"""Block attention: a varlen call that returns (out, lse); its backward takes global (out, lse).

A ring's attention is a sum over key blocks, joined by their log-sum-exp (lse). Every kernel here
does one block; `hdp/attention/ring.py` walks the blocks. The backward of a block takes `out` and
`lse` of the *whole* row, not of the block: then exp(score - lse) is the true probability, the
gradients of all blocks add up to the exact gradient, and nothing is rescaled (flash-attention,
arXiv 2205.14135, Algorithm 4).

    base.py                the interface, and what the flash-attention libraries have in common
    reference.py           reference           dense, fp64 inside, any device: the oracle
    cpu_flash.py           cpu-flash           torch's flash kernel for CPU
    torch_flash.py         torch-flash         FlashAttention-2 as built into torch
    flash_attn.py          flash-attn-2, -3, -4
    transformer_engine.py  transformer-engine  cuDNN's kernels, graphs cached by size class
    cudnn.py               cudnn               cuDNN's kernels through torch, a graph per shape
    select.py              which of them runs: `select_kernel(device, dtype, name)`

Each library is imported in its file when it is first asked for; none is needed. All kernels pass
the same tests against the oracle: tests/attention/test_kernels.py, on a GPU where they need one.
"""

from .base import BlockKernel, backward_block, forward_block, lse_dtype
from .select import KERNELS, Choice, KernelPicker, choose_kernel, select_kernel

__all__ = [
    "KERNELS",
    "BlockKernel",
    "Choice",
    "KernelPicker",
    "backward_block",
    "choose_kernel",
    "forward_block",
    "lse_dtype",
    "select_kernel",
]
