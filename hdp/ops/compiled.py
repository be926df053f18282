"""Compiled: a small function under torch.compile that falls back to eager instead of failing.

Triton needs a C compiler at run time, and some clusters have none. The first failure to compile
causes one warning, and from then on the function runs uncompiled. Running out of memory does not
count as such a failure and still raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class Compiled:
    """`function(*tensors) -> None`, compiled once for all sizes of one dimension per tensor.

    function: modifies its arguments in place. varying: for each argument, the dimension whose size
    changes between calls; all other sizes are constants of the kernel.
    """

    def __init__(self, function: Callable[..., None], *, varying: tuple[int, ...]) -> None:
        self._function = function
        self._varying = varying
        self._compiled: Callable[..., None] | None = None
        self.failure: str | None = None  # why it is not compiled

    def __call__(self, *tensors: Tensor) -> None:
        if self.failure is not None:
            return self._function(*tensors)
        if self._compiled is None:
            self._compiled = torch.compile(self._function, fullgraph=True)
        for tensor, dim in zip(tensors, self._varying, strict=True):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        try:
            return self._compiled(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilation failed, so nothing has run yet
            self.failure = str(error).strip().partition("\n")[0] or type(error).__name__
            warnings.warn(
                f"{self._function.__name__} runs uncompiled: {self.failure}", stacklevel=2
            )
            return self._function(*tensors)
