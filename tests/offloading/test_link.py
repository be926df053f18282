"""The link: data arrive intact under any timing, and every wait is needed."""

from __future__ import annotations

import random

import pytest
import torch

from hdp.errors import OffloadFreedError
from hdp.offloading.link import Link
from hdp.offloading.streams import IN, OUT
from hdp.offloading.types import PoolFull
from tests.offloading.offload_engines import GRANULE, KINDS, open_link
from tests.offloading.twin_streams import TwinStreams
from tests.training.test_overlap import tool

every_kind = pytest.mark.parametrize("kind", KINDS)


def data_of(size, value):
    return (torch.arange(size) * 7 + value).to(torch.uint8)


def run_program(link, seed, steps=60, largest=3 * GRANULE):
    """Send, fetch and free at random; each side's memory is reused as soon as the contract allows.

    Returns [(destination, what must be in it when all copies are done)].
    """
    choose = random.Random(seed)
    stream, live, arriving = link.stream(), [], []
    for step in range(steps):
        action = choose.random()
        if action < 0.45 or not live:
            source = data_of(choose.randint(1, largest), step)
            block = link.send(source, stream)
            if choose.random() < 0.5:
                link.sent(block, stream)
                live.append((block, source.clone(), None))
                source.fill_(99)  # its memory has a new owner now
            else:
                live.append((block, source.clone(), source))
        elif action < 0.8:
            block, value, _ = choose.choice(live)
            out = torch.empty_like(value)
            link.fetch(block, out, stream)
            link.fetched(block, stream)
            assert torch.equal(out, value)
        else:
            block, value, source = live.pop(choose.randrange(len(live)))
            if choose.random() < 0.7:
                arriving.append((torch.empty_like(value), value))
                link.fetch(block, arriving[-1][0], stream)
            if source is not None:
                link.sent(block, stream)
            link.free(block)  # while it is read
    for block, _, _ in live:
        link.sent(block, stream)
        link.free(block)
    return arriving


@every_kind
@pytest.mark.parametrize("seed", range(12))
def test_sent_data_comes_back(kind, seed):
    link, streams = open_link(kind, seed=seed)
    arriving = run_program(link, seed)
    stats = link.stats()
    assert stats.in_use_bytes == 0 and stats.held_bytes >= stats.peak_in_use_bytes
    assert stats.held_bytes <= stats.peak_in_use_bytes + 4 * GRANULE
    link.close()  # waits for copies in flight
    for out, value in arriving:
        assert torch.equal(out, value)
    assert streams is None or not streams.races, streams.races[:3]


class Forgetful(TwinStreams):
    """Leaves out the waits of one kind: (who waits, whose event)."""

    def __init__(self, forgotten, **options):
        super().__init__(**options)
        self._forgotten = forgotten

    def wait(self, stream, event):
        if (stream, event.stream) != self._forgotten:
            super().wait(stream, event)


@pytest.mark.parametrize(
    "forgotten",
    [
        (OUT, "caller"),  # the copy out starts before what it copies is computed
        (OUT, IN),  # host memory is overwritten while it is read
        (IN, OUT),  # it is read before it is written
        (IN, "caller"),  # device memory is written while its former user's kernels run
        ("caller", OUT),  # device memory is reused while it is read
        ("caller", IN),  # ... and used before it is written
    ],
    ids=str,
)
def test_every_wait_is_needed(forgotten):
    """Without any one kind of wait, the race detector or the data shows an error."""
    found = 0
    for seed in range(6):
        streams = Forgetful(forgotten, order="random", seed=seed)
        link = Link(streams, max_bytes=64 << 20, slab_bytes=4 * GRANULE, num_threads=1)
        try:
            arriving = run_program(link, seed)
            streams.synchronize()
            assert all(torch.equal(out, value) for out, value in arriving)
        except AssertionError:
            found += 1
        else:
            found += bool(streams.races)
    assert found == 6, f"forgetting {forgotten} went unseen in {6 - found} of 6 programs"


@every_kind
def test_use_after_free(kind):
    link, _ = open_link(kind)
    stream, data = link.stream(), data_of(1000, 0)
    block = link.send(data, stream)
    link.sent(block, stream)
    link.free(block)
    for use in (
        lambda: link.free(block),
        lambda: link.sent(block, stream),
        lambda: link.fetch(block, torch.empty(1000, dtype=torch.uint8), stream),
        lambda: link.fetched(block, stream),
    ):
        with pytest.raises(OffloadFreedError, match="1000 bytes was used after it was freed"):
            use()
    link.close()
    link.close()
    with pytest.raises(OffloadFreedError, match="closed"):
        link.send(data, stream)


@every_kind
def test_a_full_pool(kind):
    link, _ = open_link(kind, max_bytes=8 * GRANULE)
    stream, data = link.stream(), data_of(5 * GRANULE, 0)
    block = link.send(data, stream)
    with pytest.raises(PoolFull) as error:
        link.send(data, stream)
    assert error.value.max_bytes == 8 * GRANULE and error.value.in_use_bytes == 5 * GRANULE
    link.sent(block, stream)
    link.free(block)
    block = link.send(data, stream)
    link.sent(block, stream)
    link.close()


@every_kind
def test_host_memory_is_allocated_in_advance(kind):
    link, _ = open_link(kind, max_bytes=16 * GRANULE)
    link.prepare(6 * GRANULE)
    block = link.send(data_of(GRANULE, 0), link.stream())
    link.sent(block, link.stream())
    assert link.stats().held_bytes == 8 * GRANULE  # two slabs
    link.prepare(1 << 40)  # no more than the pool may have
    block = link.send(data_of(GRANULE, 0), link.stream())
    link.sent(block, link.stream())
    assert link.stats().held_bytes <= 16 * GRANULE
    link.close()


@pytest.mark.parametrize("kind", ["twin", "timed"])
def test_simulated_streams_keep_time(kind):
    """Copies in one direction are serial; a caller that waits stalls for the remaining time."""
    timed = tool("timed_streams").TimedStreams
    streams = TwinStreams(bytes_per_s=1000.0) if kind == "twin" else timed(1000.0)
    link = Link(streams, max_bytes=1 << 20, slab_bytes=GRANULE, num_threads=1)
    stream, first, second = link.stream(), data_of(1000, 1), data_of(500, 2)
    a, b = link.send(first, stream), link.send(second, stream)
    streams.compute(0.25)
    link.sent(a, stream)  # left at 1.0
    assert streams.now_s == pytest.approx(1.0) and streams.stalled_s == pytest.approx(0.75)
    streams.compute(2.0)
    link.sent(b, stream)  # left at 1.5, long ago
    assert streams.now_s == pytest.approx(3.0) and streams.stalled_s == pytest.approx(0.75)
    out = torch.empty(1000, dtype=torch.uint8)
    link.fetch(a, out, stream)
    link.fetched(a, stream)
    assert streams.now_s == pytest.approx(4.0)
    link.close()
