"""Compiled: one small function under torch.compile, which must not be able to stop a run.

Triton needs a C compiler at run time, and clusters exist without one. The first failure to compile
is said once, and from then on the function runs as it is written. Out of memory is no such failure
and is raised.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class Compiled:
    """`function(*tensors) -> None`, compiled once for all sizes of one dimension of each tensor.

    function: changes its arguments in place. varying: for each argument the dimension whose size
    changes from call to call; the others are constants of the kernel.
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
        except Exception as error:  # raised before anything has run
            self.failure = str(error).strip().partition("\n")[0] or type(error).__name__
            warnings.warn(
                f"{self._function.__name__} is not compiled: {self.failure}", stacklevel=2
            )
            return self._function(*tensors)
