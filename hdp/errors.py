"""The exceptions of this package, under one base class. Does not import torch.

    try:
        hdp.train(config)
    except hdp.NonFiniteError: ...         # handle one kind
    except hdp.HDPError as error: ...      # anything that can fail with valid arguments

Each class also derives from the matching built-in exception, so code that knows nothing about hdp
(`except RuntimeError`) catches it as well.

Invalid arguments (a shape, a length, a missing file, ranks started with different options) raise
plain ValueError, as usual in Python. They are bugs to fix, not failures to handle: code that
catches HDPError to restart or skip must not restart because of a typo.
"""

from __future__ import annotations


class HDPError(Exception):
    """Base class of hdp's exceptions. Invalid arguments raise plain ValueError instead."""


class NonFiniteError(HDPError, FloatingPointError):
    """The loss or a gradient is inf or nan.

    Raised on all ranks before the optimizer steps, so the weights are still good. The message names
    the microbatches and sequences, or the parameters.
    """


class RankFailure(HDPError, RuntimeError):
    """Another rank died, hung or failed; `ranks` lists which."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


class CheckpointError(HDPError, RuntimeError):
    """A save failed; earlier checkpoints are intact. Raised on all ranks."""


class OffloadMemoryError(HDPError, MemoryError):
    """A forward needed more host memory than its pool allows. Says how much, and what fits."""


class OffloadFreedError(HDPError, RuntimeError):
    """Backward needs an offloaded tensor that was freed, or whose engine was closed."""


class OffloadModifiedError(HDPError, RuntimeError):
    """A tensor that backward needs was modified in place after it was saved."""


class ChatTemplateError(HDPError, ValueError):
    """The assistant's turns cannot be located in the output of a chat template."""
