"""Sealed directories: built once, complete or absent, even if processes are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hdp.data.prepare import sealed
from hdp.data.prepare.sealed import build_once, read_seal
from tests.patience import patience, wait_for

# Builds a directory of two files, sleeps wait_s in between, and logs each build that starts.
CHILD = """
import sys, time
from pathlib import Path
from hdp.data.prepare.sealed import build_once

path, log, wait_s = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def fill(directory):
    with open(log, "a") as file:
        file.write("build\\n")
    (directory / "a.bin").write_bytes(b"a" * 1000)
    time.sleep(wait_s)
    (directory / "b.bin").write_bytes(b"b" * 1000)
    return {"who": "child"}

print(build_once(path, fill), (path / "b.bin").stat().st_ino, flush=True)
"""


def start_child(path: Path, wait_s: float = 0.0) -> subprocess.Popen:
    log = path.parent / "log"
    arguments = [sys.executable, "-c", CHILD, str(path), str(log), str(wait_s)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def fill(directory: Path) -> dict:
    (directory / "a.bin").write_bytes(b"a" * 1000)
    return {"who": "test"}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_built_once(tmp_path):
    children = [start_child(tmp_path / "cache", wait_s=0.5) for _ in range(6)]
    answers = [child.communicate(timeout=patience(60))[0].split() for child in children]
    assert sorted(built for built, _ in answers) == ["False"] * 5 + ["True"]
    assert len({inode for _, inode in answers}) == 1
    assert (tmp_path / "log").read_text() == "build\n"
    assert names(tmp_path) == ["cache", "cache.lock", "log"]


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_killed_build_leaves_nothing(tmp_path, sig):
    path = tmp_path / "cache"
    child = start_child(path, wait_s=60)
    wait_for(lambda: list(tmp_path.glob("cache.tmp-*/a.bin")))
    child.send_signal(sig)
    child.wait()
    assert not path.exists() and read_seal(path) is None
    assert build_once(path, fill)
    assert read_seal(path)["who"] == "test"
    assert names(tmp_path) == ["cache", "cache.lock", "log"]


def test_waiting_process_takes_over_from_a_killed_builder(tmp_path):
    path = tmp_path / "cache"
    first = start_child(path, wait_s=60)
    wait_for(lambda: list(tmp_path.glob("cache.tmp-*/a.bin")))
    second = start_child(path)
    time.sleep(0.3)  # until it waits for the lock; if it is late, it just waits less
    first.kill()
    assert second.communicate(timeout=patience(30))[0].startswith("True")
    assert read_seal(path)["who"] == "child"


@pytest.mark.parametrize("size", [0, 999, 1001])
def test_truncation_is_detected(tmp_path, size):
    path = tmp_path / "cache"
    build_once(path, fill)
    os.truncate(path / "a.bin", size)
    assert read_seal(path) is None
    assert build_once(path, fill)
    assert read_seal(path)["files"] == {"a.bin": 1000}
    assert not build_once(path, fill)


@pytest.mark.parametrize("seal", ["", "{", "[]", "null", '{"files": 3}', '{"files": {"x": 1}}'])
def test_broken_seal_is_rebuilt(tmp_path, seal):
    path = tmp_path / "cache"
    build_once(path, fill)
    (path / "meta.json").write_text(seal)
    assert read_seal(path) is None
    assert build_once(path, fill) and read_seal(path) is not None


def test_missing_file_and_file_in_the_way(tmp_path):
    path = tmp_path / "deep" / "cache"
    build_once(path, fill)
    (path / "a.bin").unlink()
    assert build_once(path, fill)
    other = tmp_path / "file"
    other.write_text("in the way")
    assert build_once(other, fill) and read_seal(other) is not None


def test_folder_that_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"cannot write to .*file .*--cache-dir"):
        build_once(tmp_path / "file" / "cache", fill)


def test_failing_build_leaves_nothing(tmp_path):
    path = tmp_path / "cache"

    def fail(directory: Path) -> dict:
        fill(directory)
        raise KeyError("reason")

    with pytest.raises(KeyError, match="reason"):
        build_once(path, fail)
    assert names(tmp_path) == ["cache.lock"]


def test_readers_of_a_replaced_cache_keep_their_files(tmp_path):
    import numpy as np

    path = tmp_path / "cache"
    build_once(path, fill)
    mapped = np.memmap(path / "a.bin", dtype="u1", mode="r")
    (path / "meta.json").write_text("broken")
    build_once(path, fill)
    assert bytes(mapped) == b"a" * 1000


def test_without_locks_the_first_rename_wins(tmp_path, monkeypatch):
    """Without locks (some network mounts), both build, one copy is kept, and both see it."""

    def no_lock(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(sealed.fcntl, "flock", no_lock)
    path, gate, results = tmp_path / "cache", threading.Barrier(2), []

    def slow(directory: Path) -> dict:
        fill(directory)
        gate.wait(timeout=patience(20))
        return {}

    def build() -> None:
        results.append(build_once(path, slow))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=patience(30))
    assert len(results) == 2 and read_seal(path) is not None
    assert names(tmp_path) == ["cache", "cache.lock"]
