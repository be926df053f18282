"""Monitor: decides from the ranks' reports who is to blame when the job cannot continue.

It is pure: it receives reports and elapsed times, and has no clock, thread or connection of its own
(watchdog.py has those). The first rule that applies decides:

1. silent    A rank's reports stopped for `timeout_s` (it was killed or stopped, or its node is
             gone). In an allowed phase it gets a minute more, because it may hold the interpreter
             lock. Once a collective has broken, some rank must be gone, so `suspect_s` is enough.
2. broken    A collective broke but all ranks respond: blame the ranks that had already stalled, or
             else the network.
3. stalled   NO rank has made progress for `timeout_s`, and none is in an allowed phase. One slow
             rank is not a hang, however long the others wait for it; when it finishes, the others
             get another `timeout_s` to finish too.

Among stalled ranks, the blame goes to those that are not waiting for others: the end of the chain.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

HELD_LOCK_S = 60.0  # how long an allowed phase may keep the reporting thread from running
Spans = tuple[tuple[int, int], ...]  # ranks as runs (first, last), since a ring may have thousands


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rank reports about itself in every interval."""

    beat: int = 0  # increases by one with each report
    stalled_s: float = 0.0  # time since the last sign of progress
    allowed_s: float = 0.0  # time left of an allowed phase
    step: int | None = None
    microbatch: int | None = None
    ring: Spans = ()  # ranks that share this microbatch
    waiting_for: Spans | None = None  # (): for all ranks; None: computing
    what: str = ""
    line: str = ""  # the training thread's position in the code, if it is stalled
    in_collective: bool = False  # that position is inside torch.distributed: it is waiting
    process: str = ""  # host and pid
    error: str = ""  # how a collective broke here, which is another rank's fault
    done: bool = False

    @property
    def waits(self) -> bool:
        return self.in_collective or self.waiting_for is not None

    @property
    def place(self) -> str:
        """Where the rank is, as "step 12 microbatch 3 (waiting for ranks 0, 3-5)"."""
        text = "start-up" if self.step is None else f"step {self.step}"
        if self.microbatch is not None:
            text += f" microbatch {self.microbatch}"
        notes = [self.what] if self.what else []
        if self.waiting_for is not None:
            whom = f"ranks {_join(self.waiting_for)}" if self.waiting_for else "all ranks"
            notes.append(f"waiting for {whom}")
        elif self.ring:
            notes.append(f"ring of ranks {_join(self.ring)}")
        return f"{text} ({', '.join(notes)})" if notes else text

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        fields = json.loads(text)
        for name in ("ring", "waiting_for"):
            if fields[name] is not None:
                fields[name] = tuple((first, last) for first, last in fields[name])
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why the job ends: culprits and a line to print. Without culprits, all ranks are done."""

    ranks: tuple[int, ...] = ()
    text: str = ""


class Monitor:
    """Turns successive reports into a Verdict. The caller supplies the elapsed time."""

    def __init__(self, *, timeout_s: float, suspect_s: float) -> None:
        self.timeout_s = timeout_s
        self.suspect_s = suspect_s  # silence that counts once a collective has broken
        self._reports: dict[int, Report] = {}
        self._silent_s: dict[int, float] = {}
        self._broken_s = 0.0  # since the first broken collective
        self._unallowed_s = 0.0  # since the last rank left an allowed phase
        self._num_done = 0
        self._since_done_s = 0.0  # since the last rank finished

    def hear(self, reports: dict[int, Report], elapsed_s: float, *, broken: bool = False) -> None:
        """Take in each rank's latest report. `broken`: whether a collective has failed anywhere."""
        for rank, report in reports.items():
            known = self._reports.get(rank)
            heard = known is None or known.beat != report.beat
            self._silent_s[rank] = 0.0 if heard else self._silent_s[rank] + elapsed_s
        self._reports = reports
        broken = broken or any(report.error for report in reports.values())
        self._broken_s = self._broken_s + elapsed_s if broken else 0.0
        allowed = any(report.allowed_s > 0 for report in reports.values())
        self._unallowed_s = 0.0 if allowed else self._unallowed_s + elapsed_s
        num_done = sum(report.done for report in reports.values())
        self._since_done_s = 0.0 if num_done > self._num_done else self._since_done_s + elapsed_s
        self._num_done = num_done

    def verdict(self) -> Verdict | None:
        """The verdict by the rules above, or None if the job is fine."""
        active = {rank: report for rank, report in self._reports.items() if not report.done}
        if not active:
            return Verdict()
        return self.silent() or self._stalled(active)

    def silent(self) -> Verdict | None:
        """Blame ranks whose reports stopped. A done rank keeps reporting until all are done."""

        def limit_s(report: Report) -> float:
            if self._broken_s:
                return self.suspect_s
            return self.timeout_s + min(report.allowed_s, HELD_LOCK_S)

        ranks = [r for r, report in self._reports.items() if self._silent_s[r] > limit_s(report)]
        if not ranks:
            return None
        details = "; ".join(
            f"last seen {self._silent_s[rank]:.0f} s ago in {self._reports[rank].place}, "
            f"{self._reports[rank].process}"
            for rank in ranks[:4]
        )
        return Verdict(ranks=tuple(ranks), text=f"{_ranks(ranks)} stopped responding: {details}")

    def _stalled(self, active: dict[int, Report]) -> Verdict | None:
        """Blame someone if no rank makes progress, or a collective broke while all respond."""
        victims = [rank for rank, report in active.items() if report.error]
        if victims and self._broken_s > 2 * self.suspect_s:
            suspects = {
                rank: report
                for rank, report in active.items()
                if rank not in victims and report.stalled_s > self.suspect_s
            }
            if not suspects:
                first = active[victims[0]]
                text = f"a collective failed on {_ranks(victims)} although all ranks respond: "
                return Verdict(ranks=tuple(victims), text=f"{text}{first.error} in {first.place}")
        else:
            stalled_s = min(report.stalled_s for report in active.values())
            if min(stalled_s, self._unallowed_s, self._since_done_s) <= self.timeout_s:
                return None
            suspects = active
        ranks = _furthest_behind(suspects)
        details = "; ".join(
            f"{report.stalled_s:.0f} s in {report.place} at {report.line}, {report.process}"
            for report in (suspects[rank] for rank in ranks[:4])
        )
        verb = "makes" if len(ranks) == 1 else "make"
        return Verdict(ranks=ranks, text=f"{_ranks(ranks)} {verb} no progress: {details}")


def _furthest_behind(stalled: dict[int, Report]) -> tuple[int, ...]:
    """The stalled ranks that the others are waiting for, longest stalled first."""
    at_place: dict[tuple[int | None, Spans], set[int]] = {}
    for rank, report in stalled.items():
        at_place.setdefault((report.step, report.ring), set()).add(rank)
    # Rings with a stalled member elsewhere: the members that are here wait for it in attention.
    incomplete = {
        place
        for place, here in at_place.items()
        if any(r in stalled and r not in here for r in _members(place[1]))
    }
    computing = [rank for rank, report in stalled.items() if not report.waits]
    chosen = [r for r in computing if (stalled[r].step, stalled[r].ring) not in incomplete]
    chosen = chosen or computing or list(stalled)
    steps = {rank: -1 if (step := stalled[rank].step) is None else step for rank in chosen}
    chosen = [rank for rank in chosen if steps[rank] == min(steps.values())]
    return tuple(sorted(chosen, key=lambda rank: (-round(stalled[rank].stalled_s, 1), rank)))


def spans(ranks: Iterable[int]) -> Spans:
    """Runs of consecutive ranks: (3, 0, 1, 2, 7) -> ((0, 3), (7, 7))."""
    runs: list[tuple[int, int]] = []
    for rank in sorted(set(ranks)):
        if runs and runs[-1][1] == rank - 1:
            runs[-1] = (runs[-1][0], rank)
        else:
            runs.append((rank, rank))
    return tuple(runs)


def _members(runs: Spans) -> Iterable[int]:
    return (rank for first, last in runs for rank in range(first, last + 1))


def _join(runs: Spans) -> str:
    listed = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:8]]
    return ", ".join(listed + ["..."] * (len(runs) > 8))


def _ranks(ranks: Iterable[int]) -> str:
    """The ranks as text: "rank 2" or "ranks 0-3, 7"."""
    runs = spans(ranks)
    single = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"{'rank' if single else 'ranks'} {_join(runs)}"
