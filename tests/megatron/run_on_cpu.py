"""Run a script that imports Megatron on CPU ranks, on the shim:

torchrun --nproc-per-node 4 -m tests.megatron.run_on_cpu SCRIPT [its arguments]
"""

from __future__ import annotations

import runpy
import sys

from tests.megatron import cuda_shim


def main() -> None:
    cuda_shim.install()
    import megatron.core.datasets.utils

    # Some wheels have the compiled helpers but no Makefile: pretrain() would call make and exit.
    megatron.core.datasets.utils.compile_helpers = lambda: None
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
