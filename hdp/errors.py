"""The exceptions of this package, under one base class. Loads no torch.

    try:
        hdp.train(config)
    except hdp.NonFiniteError: ...         # what to do about one of them
    except hdp.HDPError as error: ...      # what a run with sound arguments can run into

Each class also derives from the built-in exception that fits, so code that knows nothing of hdp
(`except RuntimeError`) catches it as well.

Arguments that cannot work (a shape, a length, a missing file, ranks started with different options)
raise plain ValueError, as everywhere in Python. They are mistakes of the caller, to be fixed and
not handled: code that catches HDPError to restart or skip must not restart because of a typo.
"""

from __future__ import annotations


class HDPError(Exception):
    """Base class of the exceptions of hdp. Bad arguments are plain ValueErrors instead."""


class NonFiniteError(HDPError, FloatingPointError):
    """The loss or a gradient is inf or nan.

    Raised on all ranks, before the optimizer has stepped: the weights are still good. The message
    names the microbatches and sequences, or the parameters.
    """


class RankFailure(HDPError, RuntimeError):
    """Another rank died, hung or failed; `ranks` are the culprits."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


class CheckpointError(HDPError, RuntimeError):
    """A save failed; the checkpoints before it are intact. Raised on all ranks."""


class OffloadMemoryError(HDPError, MemoryError):
    """A forward wanted more host memory than its pool may have. Says how much, and what fits."""


class OffloadFreedError(HDPError, RuntimeError):
    """Backward asked for an offloaded tensor after it was freed or its engine was closed."""


class OffloadModifiedError(HDPError, RuntimeError):
    """A tensor that backward needs was modified in place after it was saved."""


class ChatTemplateError(HDPError, ValueError):
    """The assistant's turns cannot be told apart in what a chat template renders."""
