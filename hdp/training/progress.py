"""Progress: how far a run has come, and whether it should stop."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Progress:
    """The state of a run that changes with every step. Checkpoints store the first two fields."""

    step: int = 0  # the last step that was trained
    total_tokens: int = 0  # trained on since the start of the run
    started_s: float = field(default_factory=time.monotonic)  # of this process
    first_step: int = 1  # the first step that this process trains
    stop_reason: str = ""  # why the run ended early; "" while it runs and when it is complete
    stop_signal: int = 0  # the signal that ended it, such as 15; 0: none
    _request: str = ""

    def stop(self, reason: str) -> None:
        """Ask the run to stop, with a checkpoint, after the current step.

        One rank's request stops all ranks after the same step.
        """
        self._request = self._request or reason

    @property
    def stop_code(self) -> int:
        """0: go on; 1: this rank asks to stop. Larger is stronger; see `settle_stop`."""
        return 1 if self._request else 0

    def settle_stop(self, code: int) -> bool:
        """Adopt the code that all ranks agreed on; returns whether to stop.

        code: the maximum over ranks of `stop_code` and 1 + the number of a received signal.
        """
        if code > 1:
            self.stop_signal = code - 1
            self.stop_reason = f"received {signal.Signals(self.stop_signal).name}"
        elif code == 1:
            self.stop_reason = self._request or "requested by another rank"
        return bool(self.stop_reason)
