"""The pool of host memory: extents, growth, and reads in flight."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdp.offloading.memory import (
    available_host_bytes,
    cpus_near,
    host_bytes_per_rank,
    touched_pages,
)
from hdp.offloading.pool import GRANULE_BYTES, HostPool, Read, Slabs
from hdp.offloading.streams import _pci_address
from hdp.offloading.types import PoolFull

SLAB = 4 * GRANULE_BYTES


def make_pool(max_slabs=1000):
    grown = []
    return HostPool(grown.append, slab_bytes=SLAB, max_bytes=max_slabs * SLAB), grown


class Model:
    """What is taken, byte by byte of granules."""

    def __init__(self):
        self.owner = {}  # granule -> name
        self.last_read = {}  # granule -> number of the last read when it was freed

    def granules(self, extents):
        for e in extents:
            base = e.slab * SLAB
            assert e.start % GRANULE_BYTES == e.stop % GRANULE_BYTES == 0
            assert 0 <= e.start < e.stop <= SLAB
            yield from range((base + e.start) // GRANULE_BYTES, (base + e.stop) // GRANULE_BYTES)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5 * SLAB)), max_size=60), st.data())
def test_extents_are_disjoint_and_reads_are_remembered(steps, data):
    pool, grown = make_pool()
    model, live, reads = Model(), {}, 0
    most = 0
    for name, (action, size) in enumerate(steps):
        if action or not live:
            extents, after = pool.take(size)
            granules = list(model.granules(extents))
            assert len(granules) == -(-size // GRANULE_BYTES)
            assert granules == sorted(set(granules)), "lowest first, none twice"
            for granule in granules:
                assert granule not in model.owner, "an address was handed out twice"
                assert model.last_read.get(granule, 0) <= (after.number if after else 0)
                model.owner[granule] = name
            live[name] = extents
        else:
            key = data.draw(st.sampled_from(sorted(live)))
            read = None
            if data.draw(st.booleans()):
                reads += 1
                read = Read(reads, None)
            extents = live.pop(key)
            for granule in model.granules(extents):
                del model.owner[granule]
                model.last_read[granule] = read.number if read else 0
            pool.give(extents, read)
        in_use = len(model.owner) * GRANULE_BYTES
        most = max(most, in_use)
        assert pool.in_use_bytes == in_use and pool.peak_in_use_bytes == most
        assert pool.held_bytes == -(-most // SLAB) * SLAB  # held_is_peak_in_use
    assert grown == sorted(set(grown)) and (not grown or grown[-1] * SLAB == pool.held_bytes)


def test_held_is_peak_in_use():
    """50 steps of random lengths and numbers of microbatches, some live at once in any order."""
    rng = np.random.default_rng(0)
    pool, _ = make_pool()
    for _ in range(50):
        live = []
        for _ in range(rng.integers(1, 6)):
            tokens = int(rng.lognormal(5, 1.5)) + 1
            live.append([pool.take(tokens * width * 40)[0] for width in (8, 8, 8, 22, 22)])
            if len(live) > rng.integers(1, 4):  # first in, first out
                for extents in live.pop(0):
                    pool.give(extents, None)
        for blocks in live:
            for extents in reversed(blocks):
                pool.give(extents, None)
        assert pool.in_use_bytes == 0
    assert pool.held_bytes <= pool.peak_in_use_bytes + SLAB
    assert pool.held_bytes <= 1.25 * pool.peak_in_use_bytes


def test_a_full_pool_takes_nothing():
    pool, grown = make_pool(max_slabs=3)
    first, _ = pool.take(2 * SLAB)
    with pytest.raises(PoolFull) as error:
        pool.take(SLAB + 1)
    assert (error.value.wanted_bytes, error.value.in_use_bytes) == (SLAB + 1, 2 * SLAB)
    assert pool.in_use_bytes == 2 * SLAB and grown == [2]
    pool.give(first, None)
    pool.take(3 * SLAB)


def test_growth_that_fails_leaves_the_pool_as_it_was():
    def fail(count):
        raise MemoryError("no more")

    pool = HostPool(fail, slab_bytes=SLAB, max_bytes=10 * SLAB)
    with pytest.raises(MemoryError):
        pool.take(1)
    assert pool.held_bytes == pool.in_use_bytes == 0


@pytest.mark.parametrize("slab_bytes", [0, GRANULE_BYTES - 1, GRANULE_BYTES + 1])
def test_slab_sizes(slab_bytes):
    with pytest.raises(ValueError, match="slab_bytes"):
        HostPool(lambda n: None, slab_bytes=slab_bytes, max_bytes=1 << 30)


def test_slabs_are_created_in_threads_in_advance():
    slabs = Slabs(lambda n: bytearray(n), slab_bytes=100, num_threads=3)
    slabs.prepare(4)
    slabs.grow(2)
    assert [len(slabs[i]) for i in range(4)] == [100] * 4
    assert len(slabs) == 4
    assert len(slabs.close()) == 4


def test_a_failed_slab_raises_when_needed():
    def make(num_bytes):
        raise MemoryError("no memory")

    slabs = Slabs(make, slab_bytes=100, num_threads=2)
    slabs.prepare(3)
    with pytest.raises(MemoryError, match="no memory"):
        slabs.grow(1)
    assert slabs.close() == []


# ---- available memory ----


def _machine(tmp_path, available_kib, **cgroup):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {available_kib} kB\n")
    folder = tmp_path / "sys/fs/cgroup"
    (folder / "memory").mkdir(parents=True)
    for name, text in cgroup.items():
        (folder / name.replace("__", "/").replace("_dot_", ".")).write_text(text)
    return tmp_path


def test_available_memory_is_the_machines_or_the_containers(tmp_path, monkeypatch):
    free = _machine(tmp_path / "a", 1000) if (tmp_path / "a").mkdir() is None else None
    assert available_host_bytes(free) == 1000 << 10
    (tmp_path / "b").mkdir()
    limited = _machine(
        tmp_path / "b",
        1000,
        memory_dot_max="500000",
        memory_dot_current="400000",
        memory_dot_stat="anon 1\ninactive_file 50000\n",
    )
    assert available_host_bytes(limited) == 150000
    (tmp_path / "c").mkdir()
    unlimited = _machine(tmp_path / "c", 1000, memory_dot_max="max", memory_dot_current="400000")
    assert available_host_bytes(unlimited) == 1000 << 10
    (tmp_path / "d").mkdir()
    old = _machine(
        tmp_path / "d",
        1000,
        memory__memory_dot_limit_in_bytes="300000",
        memory__memory_dot_usage_in_bytes="100000",
    )
    assert available_host_bytes(old) == 200000


def test_ranks_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr("hdp.offloading.memory.available_host_bytes", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert host_bytes_per_rank() == 300
    assert available_host_bytes() > 1 << 20


def test_cpus_near_a_device(tmp_path):
    folder = tmp_path / "sys/bus/pci/devices/0000:3b:00.0"
    folder.mkdir(parents=True)
    for text, want in (("0-3,8-9\n", {0, 1, 2, 3, 8, 9}), ("5\n", {5}), ("\n", set())):
        (folder / "local_cpulist").write_text(text)
        assert cpus_near("0000:3B:00.0", tmp_path) == want
    assert cpus_near("0000:3c:00.0", tmp_path) == set()


@pytest.mark.parametrize("cpus", [set(), {0}, {4095}], ids=["any", "one", "none of ours"])
def test_pages_are_writable_and_the_thread_stays_where_it_was(cpus):
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    pages = touched_pages(3 * GRANULE_BYTES, cpus)
    pages.fill_(7)
    assert pages.dtype == torch.uint8 and pages.tolist() == [7] * 3 * GRANULE_BYTES
    if before is not None:
        assert os.sched_getaffinity(0) == before


def test_the_pci_address_of_a_device(monkeypatch):
    """In sysfs form, from torch's three numbers, or empty if torch has none."""
    found = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: found)
    assert _pci_address(torch.device("cuda", 0)) == "0000:3b:00.0"
    del found.pci_bus_id
    assert _pci_address(torch.device("cuda", 0)) == ""
