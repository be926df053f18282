"""A checkpoint may come from a stranger: reading it runs no code from it."""

from __future__ import annotations

import json
import os
import pickle
import zlib
from pathlib import Path

import pytest
import torch

from hdp.checkpoint.checkpointer import Checkpointer
from hdp.checkpoint.directory import INFO_FILE, CheckpointInfo
from hdp.checkpoint.files import read_metadata
from hdp.distributed.mesh import HDPMesh
from tests.checkpoint.checkpoints import CONFIG, build, saver_for


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def mesh():
    with HDPMesh.create(device="cpu") as mesh:
        yield mesh


def _saved(mesh, folder: Path) -> Path:
    model, optimizer = build(mesh)
    with saver_for(folder, mesh) as saver:
        saver.save(1, model=model, optimizer=optimizer)
    return folder / "step-00000001"


def _reseal(checkpoint: Path) -> None:
    """Make the checksums right again, as an attacker would."""
    path = checkpoint / INFO_FILE
    data = json.loads(path.read_text())
    for name, record in data["files"].items():
        content = (checkpoint / name).read_bytes()
        record.update(num_bytes=len(content), crc32=zlib.crc32(content))
    del data["crc32"]
    path.write_text(json.dumps({**data, "version": 1}))
    CheckpointInfo.read(checkpoint)


def _load(mesh, folder: Path) -> None:
    model, optimizer = build(mesh)
    with Checkpointer(folder, mesh=mesh, model_config=CONFIG) as saver:
        saver.load(model=model, optimizer=optimizer)


@pytest.mark.parametrize("wrap", [lambda attack: attack, lambda attack: {"x": [attack]}])
def test_metadata_runs_no_code(mesh, tmp_path, wrap):
    checkpoint = _saved(mesh, tmp_path / "run")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(wrap(Attack(tmp_path / "attacked"))))
    _reseal(checkpoint)
    with pytest.raises(ValueError, match=r"metadata was not written by torch \(it refers to posix"):
        _load(mesh, tmp_path / "run")
    assert not (tmp_path / "attacked").exists()


def test_metadata_cannot_have_code_compiled(mesh, tmp_path):
    """`dataclass`, which torch's module imports, would `exec` the names of a class's fields."""
    module = "torch.distributed.checkpoint.metadata"
    attack = f'x:__import__("os").mkdir({str(tmp_path / "attacked")!r})'

    def name(of: str, what: str) -> bytes:
        return f"c{of}\n{what}\n".encode()

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    options = b"".join(text(option) + b"\x89s" for option in ("init", "repr", "compare"))
    field = name(module, "field") + b")R" + b"N}" + options + b"\x86b"
    annotations = text("__annotations__") + b"}" + text(attack) + name("builtins", "set") + b"ss"
    state = b"N}" + annotations + text(attack) + field + b"s\x86b"
    program = name(module, "dataclass") + name(module, "ChunkStorageMetadata") + state + b"\x85R."
    checkpoint = _saved(mesh, tmp_path / "run")
    (checkpoint / ".metadata").write_bytes(b"\x80\x02" + program)
    with pytest.raises(ValueError, match=r"it refers to torch.*\.dataclass"):
        read_metadata(checkpoint)
    assert not (tmp_path / "attacked").exists()


def test_a_value_that_is_no_tensor_runs_no_code(mesh, tmp_path):
    """torch unpickles the optimizer's plain numbers; here one of them is an attack."""
    checkpoint = _saved(mesh, tmp_path / "run")
    metadata = read_metadata(checkpoint)
    where = next(
        where
        for index, where in metadata.storage_data.items()
        if type(metadata.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata"
    )
    shard = checkpoint / where.relative_path
    content = shard.read_bytes()
    torch.save(Attack(tmp_path / "attacked"), tmp_path / "attack.pt")
    attack = (tmp_path / "attack.pt").read_bytes()
    where.offset, where.length = len(content), len(attack)
    shard.write_bytes(content + attack)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    _reseal(checkpoint)
    with pytest.raises(Exception, match=r"reading .*step-00000001 failed"):
        _load(mesh, tmp_path / "run")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", pickle.dumps([1])])
def test_damaged_metadata_is_one_line(mesh, tmp_path, content):
    checkpoint = _saved(mesh, tmp_path / "run")
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"metadata was not written by torch .*; remove it"):
        read_metadata(checkpoint)
