"""Who gets the blame: reports in, verdict out. No processes and no clock."""

from __future__ import annotations

import sys

import pytest

from hdp.distributed.monitor import HELD_LOCK_S, Monitor, Report, Verdict, spans

TIMEOUT_S, SUSPECT_S = 60.0, 5.0


def _monitor() -> Monitor:
    return Monitor(timeout_s=TIMEOUT_S, suspect_s=SUSPECT_S)


def _watch(seconds: float, reports, monitor=None, interval_s: float = 1.0):
    """(first verdict within `seconds`, when); `reports(t)` returns each rank's report at time t."""
    monitor = monitor or _monitor()
    now = 0.0
    while now <= seconds:
        monitor.hear(reports(now), interval_s)
        if verdict := monitor.verdict():
            return verdict, now
        now += interval_s
    return None, now


def _busy(t: float, **fields) -> Report:
    return Report(beat=int(t), step=12, microbatch=3, **fields)


def test_report_survives_json():
    for report in (
        Report(),
        _busy(4, ring=((0, 3), (9, 9)), waiting_for=(), stalled_s=1.5, what="x", process="h pid 1"),
        _busy(4, waiting_for=((2, 2),), error="broken", done=True, allowed_s=3.0),
    ):
        assert Report.from_json(report.to_json()) == report


def test_place_is_readable():
    assert Report().place == "start-up"
    assert Report(step=3, what="saving").place == "step 3 (saving)"
    assert _busy(0, ring=((0, 1), (5, 5))).place == "step 12 microbatch 3 (ring of ranks 0-1, 5)"
    waiting = _busy(0, ring=((0, 1),), waiting_for=((0, 0), (3, 3)))
    assert waiting.place == "step 12 microbatch 3 (waiting for ranks 0, 3)"
    assert _busy(0, waiting_for=()).place == "step 12 microbatch 3 (waiting for all ranks)"


def test_spans():
    assert spans(()) == ()
    assert spans((3, 0, 1, 2, 7, 7)) == ((0, 3), (7, 7))


def test_silent_rank_is_named():
    def reports(t):
        return {0: _busy(t), 1: _busy(min(t, 10), process="node7 pid 5")}

    verdict, when = _watch(200, reports)
    assert verdict.ranks == (1,)
    assert verdict.text == (
        "rank 1 stopped responding: last seen 61 s ago in step 12 microbatch 3, node7 pid 5"
    )
    assert 70 <= when <= 72


def test_silence_counts_sooner_once_a_collective_has_broken():
    def reports(t):
        broke = {"error": "RuntimeError: Connection closed by peer"} if t >= 12 else {}
        return {0: _busy(t, **broke), 1: _busy(min(t, 10)), 2: _busy(t)}

    verdict, when = _watch(200, reports)
    assert verdict.ranks == (1,) and when <= 18


def test_allowed_phase_is_not_a_hang_and_may_hold_the_lock():
    def reports(t):  # rank 1 is silent, stalled and allowed; rank 0's wait for it is unmarked
        return {
            0: _busy(t, stalled_s=t),
            1: _busy(min(t, 2), stalled_s=min(t, 2), allowed_s=500.0 - min(t, 2)),
        }

    # A lost rank is detected before its phase, maybe an hour long, would have ended.
    verdict, when = _watch(900, reports)
    assert verdict.ranks == (1,) and when == pytest.approx(HELD_LOCK_S + TIMEOUT_S, abs=3)

    def overdue(t):  # the same phase, but the rank keeps reporting
        return {0: _busy(t, stalled_s=t), 1: _busy(t, stalled_s=t, allowed_s=max(0.0, 500.0 - t))}

    verdict, when = _watch(900, overdue)
    assert verdict.ranks == (0, 1) and when == pytest.approx(500 + TIMEOUT_S, abs=3)


def test_after_a_slow_rank_finishes_the_others_get_their_time():
    """They wait for it in an unmarked collective; it finishes before they report progress again."""

    def reports(t, end=1e9):
        slow = _busy(t, done=t >= 300)
        return {0: _busy(t, stalled_s=t, done=t >= end), 1: slow}

    assert _watch(1000, lambda t: reports(t, end=302)) == (Verdict(), 302)
    verdict, when = _watch(1000, reports)
    assert verdict.ranks == (0,) and 300 + TIMEOUT_S < when < 303 + TIMEOUT_S


def test_after_an_allowed_phase_the_others_get_their_time():
    def reports(t):  # rank 1's phase ends at 100; rank 0, stalled since 0, moves again at 130
        allowed = {"allowed_s": 400.0} if t < 100 else {}
        moved = 130 if t >= 130 else 0
        return {0: _busy(t, stalled_s=t - moved), 1: _busy(t, stalled_s=t - moved, **allowed)}

    assert _watch(180, reports)[0] is None


def test_slow_rank_is_not_a_hang():
    def reports(t):  # rank 1 takes 50 s per microbatch; the others wait, unmarked, for all of them
        return {0: _busy(t, stalled_s=t), 1: _busy(t, stalled_s=t % 50), 2: _busy(t, stalled_s=t)}

    assert _watch(1000, reports)[0] is None


def _stalled(**by_rank: Report) -> Verdict:
    """The verdict on ranks r0, r1, ..., all stalled in the given places."""

    def reports(t):
        fields = {int(name[1:]): report for name, report in by_rank.items()}
        return {
            rank: Report(
                beat=int(t),
                stalled_s=t,
                step=r.step,
                microbatch=r.microbatch,
                ring=r.ring,
                waiting_for=r.waiting_for,
                done=r.done,
                what=r.what,
                line="train.py:7 train",
                in_collective=r.in_collective,
            )
            for rank, r in fields.items()
        }

    verdict, when = _watch(300, reports)
    assert verdict is not None and when == pytest.approx(TIMEOUT_S, abs=2)
    return verdict


def test_rank_that_does_not_wait_is_blamed():
    waits = Report(step=5, waiting_for=(), what="the gradient norm")
    verdict = _stalled(r0=waits, r1=Report(step=5, microbatch=2), r2=waits)
    assert verdict.ranks == (1,)
    expected = "rank 1 makes no progress: 61 s in step 5 microbatch 2 at train.py:7 train"
    assert verdict.text.startswith(expected)
    inside = Report(step=5, microbatch=2, in_collective=True)  # unmarked, but seen in the stack
    assert _stalled(r0=inside, r1=Report(step=5, microbatch=2)).ranks == (1,)


def test_ring_members_wait_for_the_missing_one():
    ring = ((0, 2),)
    inside = Report(step=5, microbatch=0, ring=ring)
    late = Report(step=5, microbatch=4)
    assert _stalled(r0=inside, r1=late, r2=inside, r3=Report(step=5, waiting_for=())).ranks == (1,)
    # A chain: 3 waits for 2 in one ring, 2 for 1 in another, and 1 computes.
    chain = {
        "r1": Report(step=5, microbatch=1),
        "r2": Report(step=5, microbatch=1, ring=((1, 2),)),
        "r3": Report(step=5, microbatch=7, ring=((2, 3),)),
    }
    assert _stalled(**chain).ranks == (1,)
    # If a whole ring is stalled, all its ranks are blamed.
    assert _stalled(r0=inside, r1=inside, r2=inside, r3=Report(waiting_for=())).ranks == (0, 1, 2)


def test_rank_left_behind_in_an_earlier_step_is_blamed():
    ahead = Report(step=6, microbatch=0)
    assert _stalled(r0=ahead, r1=ahead, r2=Report(step=5, microbatch=9)).ranks == (2,)
    assert _stalled(r0=ahead, r1=Report(what="import"), r2=ahead).ranks == (1,)


def test_if_all_wait_the_rank_furthest_behind_is_blamed():
    verdict = _stalled(r0=Report(step=2, waiting_for=()), r1=Report(step=1, waiting_for=((0, 0),)))
    assert verdict.ranks == (1,)
    assert "rank 1 makes no progress: 61 s in step 1 (waiting for ranks 0)" in verdict.text


def test_finished_ranks_are_not_blamed():
    verdict = _stalled(r0=Report(step=9, done=True), r1=Report(step=9, what="export"))
    assert verdict.ranks == (1,)


def test_all_done_is_a_verdict_without_culprits():
    done = Report(step=9, done=True)
    monitor = _monitor()
    monitor.hear({0: done, 1: Report(step=9)}, 1.0)
    assert monitor.verdict() is None
    monitor.hear({0: done, 1: done}, 1.0)
    assert monitor.verdict() == Verdict()


def test_broken_collective_although_all_ranks_respond():
    def network(t):
        return {0: _busy(t, error="RuntimeError: Connection reset by peer"), 1: _busy(t)}

    verdict, when = _watch(100, network)
    assert verdict.ranks == (0,) and "although all ranks respond" in verdict.text
    assert "Connection reset by peer" in verdict.text and when <= 2 * SUSPECT_S + 2

    def timed_out(t):  # rank 2 hangs, and the group's timeout is shorter than ours
        victims = {"error": "RuntimeError: Timed out waiting 30000ms", "stalled_s": t}
        return {0: _busy(t, **victims), 1: _busy(t, **victims), 2: _busy(t, stalled_s=t + 30)}

    assert _watch(100, timed_out)[0].ranks == (2,)


def _calls_for(num_ranks: int) -> int:
    """Function calls, Python's and C's, until rank 7 of one large ring is blamed."""
    monitor, calls = _monitor(), 0
    ring = ((0, num_ranks - 1),)

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    for beat in range(2):
        reports = {r: Report(beat=beat, stalled_s=99, step=1, ring=ring) for r in range(num_ranks)}
        reports[7] = Report(beat=beat, stalled_s=99, step=1, microbatch=2)
        sys.setprofile(count)
        try:
            monitor.hear(reports, 90.0)
            verdict = monitor.verdict()
        finally:
            sys.setprofile(None)
    assert verdict.ranks == (7,)
    return calls


def test_ten_thousand_ranks_are_judged_quickly():
    assert _calls_for(10_000) < 12 * _calls_for(1_000)
