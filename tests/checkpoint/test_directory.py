"""The checkpoint folder: names, order, commits, and leftovers of killed processes. No torch."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from hdp.checkpoint.directory import (
    INFO_FILE,
    CheckpointInfo,
    ChecksumStream,
    FileRecord,
    Lock,
    checksum,
    clean,
    commit,
    committed,
    next_serial,
    prune,
    saving_path,
    step_path,
)


def _save(directory: Path, step: int, content: bytes = b"data", start: str = "a") -> Path:
    """Save like the checkpointer, on one rank."""
    final = step_path(directory, step)
    path = saving_path(final, start)
    path.mkdir(parents=True)
    with open(path / "0.distcp", "wb") as file:
        stream = ChecksumStream(file)
        stream.write(content)
        stream.flush()
    record = FileRecord(num_bytes=stream.num_bytes, crc32=stream.crc32)
    CheckpointInfo(
        step=step,
        serial=next_serial(directory),
        world_size=1,
        hdp_version="0",
        torch_version="0",
        model_config={"layers": 2},
        extra={"tokens": 7},
        files={"0.distcp": record},
    ).write(path)
    commit(path, final)
    return final


def _names(directory: Path) -> list[str]:
    return [path.name for path in committed(directory)]


def test_info_round_trip(tmp_path):
    final = _save(tmp_path, 100, b"x" * 1000)
    info = CheckpointInfo.read(final)
    assert (info.step, info.serial, info.extra) == (100, 1, {"tokens": 7})
    assert info.files == {
        "0.distcp": FileRecord(num_bytes=1000, crc32=checksum(final / "0.distcp"))
    }
    info.verify(final, info.files)


def test_checkpoints_are_in_commit_order(tmp_path):
    assert committed(tmp_path / "nothing") == [] and next_serial(tmp_path) == 1
    for step in (100, 200, 110):  # went back to 100
        _save(tmp_path, step)
    assert _names(tmp_path) == ["step-00000100", "step-00000200", "step-00000110"]
    prune(tmp_path, 2)
    assert _names(tmp_path) == ["step-00000200", "step-00000110"]
    _save(tmp_path, 100_000_000)
    assert _names(tmp_path)[-1] == "step-100000000"


def test_an_unreadable_checkpoint_does_not_count_as_one_to_keep(tmp_path):
    """It sorts last; the newest one that can be read must survive."""
    (_save(tmp_path, 100) / INFO_FILE).write_text("{")
    _save(tmp_path, 200)
    _save(tmp_path, 300)
    prune(tmp_path, 1)
    assert sorted(_names(tmp_path)) == ["step-00000100", "step-00000300"]


def test_other_names_are_left_alone(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    clean(tmp_path)
    assert committed(tmp_path) == [] and len(list(tmp_path.iterdir())) == 3


def test_saving_the_same_step_again(tmp_path):
    _save(tmp_path, 10, b"first")
    _save(tmp_path, 20)
    _save(tmp_path, 10, b"second")
    assert (step_path(tmp_path, 10) / "0.distcp").read_bytes() == b"second"
    assert _names(tmp_path) == ["step-00000020", "step-00000010"]
    assert not list(tmp_path.glob(".*"))


def test_clean_removes_leftovers_of_a_kill(tmp_path):
    _save(tmp_path, 10)
    for leftover in (
        ".saving-step-00000020-a",
        ".removing-step-00000005",
        ".replaced-step-00000010",
    ):
        (tmp_path / leftover / "sub").mkdir(parents=True)
    # Killed between the two renames of saving step 30 again.
    _save(tmp_path, 30, b"old").rename(tmp_path / ".replaced-step-00000030")
    clean(tmp_path)
    assert _names(tmp_path) == ["step-00000010", "step-00000030"]
    assert (step_path(tmp_path, 30) / "0.distcp").read_bytes() == b"old"
    assert not list(tmp_path.glob(".*"))


def _damage(path: Path, text: str | bytes | None) -> None:
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode() if isinstance(text, str) else text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no hdp.json"),
        ('{"format": "hdp-che', "hdp.json is truncated or damaged"),
        ("", "hdp.json is truncated or damaged"),
        (b"\xff\xfe\x00", "hdp.json was not written by hdp"),
        ("[1, 2]", "hdp.json was not written by hdp"),
        ('{"format": "other"}', "hdp.json was not written by hdp"),
        ('{"format": "hdp-checkpoint", "version": 1}', "hdp.json was not written by hdp"),
        (
            '{"format": "hdp-checkpoint", "version": 9, "hdp_version": "3.0"}',
            "has format version 9, but this hdp reads 2; use hdp 3.0, which wrote it",
        ),
    ],
)
def test_damaged_or_foreign_info(tmp_path, text, message):
    _save(tmp_path, 10)
    final = _save(tmp_path, 20)
    _damage(final / INFO_FILE, text)
    # It stays the latest: silently resuming from step 10 would lose work.
    assert _names(tmp_path)[-1] == "step-00000020" and next_serial(tmp_path) == 2
    with pytest.raises(ValueError, match=message) as info:
        CheckpointInfo.read(final)
    if "version" not in str(info.value):
        assert "remove it to resume from step-00000010" in str(info.value)


def test_no_bit_flip_of_the_info_file_is_another_state(tmp_path):
    """Each byte with one bit flipped: refused, or the same values in another layout."""
    final = _save(tmp_path, 10)
    path, want = final / INFO_FILE, CheckpointInfo.read(final)
    text = path.read_bytes()
    refused = 0
    for i in range(len(text)):
        for bit in (0, 1, 5):
            flipped = bytearray(text)
            flipped[i] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                assert CheckpointInfo.read(final) == want, f"byte {i} bit {bit}"
            except ValueError:
                refused += 1
    assert refused > 2 * len(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "x"),
        ("step", -5),
        ("step", 7.5),
        ("step", None),
        ("step", True),
        ("world_size", 0),
        ("serial", "1"),
        ("extra", [1]),
        ("model_config", None),
        ("files", {"../../x": {"num_bytes": 1, "crc32": 1}}),
        ("files", {"x": {"num_bytes": "1", "crc32": 1}}),
        ("files", [1]),
    ],
)
def test_values_that_no_save_writes_are_refused(tmp_path, name, value):
    """In files of version 1, which have no checksum."""
    final = _save(tmp_path, 10)
    data = json.loads((final / INFO_FILE).read_text())
    del data["crc32"]
    (final / INFO_FILE).write_text(json.dumps({**data, "version": 1}))
    assert CheckpointInfo.read(final).step == 10
    (final / INFO_FILE).write_text(json.dumps({**data, "version": 1, name: value}))
    with pytest.raises(ValueError, match=r"hdp\.json was not written by hdp"):
        CheckpointInfo.read(final)


def test_deep_nesting_is_refused(tmp_path):
    final = _save(tmp_path, 10)
    (final / INFO_FILE).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is truncated or damaged"):
        CheckpointInfo.read(final)


def test_missing_checkpoint(tmp_path):
    _save(tmp_path, 10)
    with pytest.raises(ValueError, match=r"nothing does not exist; .* folder: step-00000010"):
        CheckpointInfo.read(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "0.distcp is missing"),
        (b"dat", "0.distcp is truncated or replaced: it has 3 bytes, but 4 were written"),
        (b"dota", "0.distcp is damaged: its checksum differs"),
    ],
)
def test_damaged_file(tmp_path, content, message):
    final = _save(tmp_path, 10)
    info = CheckpointInfo.read(final)
    _damage(final / "0.distcp", content)
    with pytest.raises(ValueError, match=f"{message}.*; remove it to start from scratch"):
        info.verify(final, info.files)


def test_info_file_is_json_that_others_can_read(tmp_path):
    info = json.loads((_save(tmp_path, 10) / INFO_FILE).read_text())
    assert (info["format"], info["version"]) == ("hdp-checkpoint", 2)
    assert (info["step"], info["serial"], info["world_size"]) == (10, 1, 1)
    assert (info["model_config"], info["extra"]) == ({"layers": 2}, {"tokens": 7})
    assert info["files"] == {"0.distcp": {"num_bytes": 4, "crc32": zlib.crc32(b"data")}}


_HOLD = """
import sys
from pathlib import Path
from hdp.checkpoint.directory import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_lock_is_held_by_one_process_and_dies_with_it(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=rf"in use by another run \(.* pid {holder.pid}\)"):
        Lock(tmp_path)
    holder.kill()
    holder.wait()
    Lock(tmp_path).close()
    Lock(tmp_path).close()


def test_one_more_checkpoint_is_kept_by_its_step(tmp_path):
    for step in (10, 20, 30, 40):
        _save(tmp_path, step)
    prune(tmp_path, 1, keep_step=20)
    assert _names(tmp_path) == ["step-00000020", "step-00000040"]
    prune(tmp_path, 1, keep_step=99)
    assert _names(tmp_path) == ["step-00000040"]
