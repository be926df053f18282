"""Block attention: varlen kernels that return (out, lse); backward takes the global (out, lse).

Ring attention is a sum over key blocks, merged by log-sum-exp (lse). Each kernel here computes one
block; `hdp/attention/ring.py` loops over the blocks. The backward of a block takes `out` and
`lse` of the *whole* row, not of the block: exp(score - lse) is then the true probability, and the
blocks' gradients add up to the exact gradient without rescaling (flash-attention, arXiv 2205.14135,
Algorithm 4).

    base.py                the interface, and code shared by the flash-attention libraries
    reference.py           reference           dense, fp64 internally, any device: the oracle
    cpu_flash.py           cpu-flash           torch's flash kernel for CPU
    torch_flash.py         torch-flash         FlashAttention-2 as built into torch
    flash_attn.py          flash-attn-2, -3, -4
    transformer_engine.py  transformer-engine  cuDNN's kernels, graphs cached by size class
    cudnn.py               cudnn               cuDNN's kernels through torch, a graph per shape
    select.py              picks one: `select_kernel(device, dtype, name)`

Each library is optional, and is imported in its file on first use. All kernels pass the same tests
against the oracle: tests/attention/test_kernels.py, on a GPU for those that need one.
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
