"""Exports: each weight once, in the right dtype, and never at the cost of somebody's files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hdp.models import export_folder
from hdp.models.export import export_dtype, export_model
from hdp.models.export_folder import check_target, new_export
from hdp.models.loading import build_model, load_model
from hdp.models.support import SUPPORTED_MODELS
from tests.tiny_models import tiny_config, tiny_model

WEIGHTS = "model.safetensors"


def export(model, folder, **options):
    export_model(model, folder, model.state_dict(), **{"dtype": torch.float32, **options})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- what is written ----


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_a_tied_head_is_not_written(model_type, tmp_path):
    model = tiny_model(model_type, dtype=torch.float32, tie_word_embeddings=True)
    state = {name: x.clone() for name, x in model.state_dict().items()}  # as gathered from shards
    export_model(model, tmp_path / "out", state)
    assert "model.lm_head.weight" in state
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert not written.keys() & {"lm_head.weight", "embed_out.weight"}
    assert len(written) == len(state) - 1
    assert load_model(tmp_path / "out").state_dict().keys() == state.keys()


@pytest.mark.parametrize("model_type", sorted(SUPPORTED_MODELS))
def test_every_supported_model_can_be_loaded_again(model_type, tmp_path):
    """Some types have other names in files (gpt_neox: embed_out), which the check must know."""
    model = tiny_model(model_type, dtype=torch.float32, tie_word_embeddings=False)
    export(model, tmp_path / "out")
    again = load_model(tmp_path / "out").state_dict()
    for name, x in model.state_dict().items():
        assert torch.equal(again[name], x), name


def test_the_config_keeps_no_trace_of_its_origin(tmp_path):
    config = build_model(tiny_config(), skeleton=True).config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.auto_map = {"AutoConfig": "mine.MyConfig"}
    model = build_model(config)
    export(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not written.keys() & {"quantization_config", "auto_map"}
    load_model(tmp_path / "out")


def test_generation_settings_are_kept_as_they_are(tmp_path):
    """save_pretrained refuses some combinations that from_pretrained accepts."""
    model = tiny_model(dtype=torch.float32)
    model.model.generation_config.temperature = 0.5
    model.model.generation_config.do_sample = False
    export(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["temperature"] == 0.5


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_the_dtype_of_the_checkpoint(stored, tmp_path):
    fresh = tiny_model(dtype=torch.float32)
    assert export_dtype(fresh, "auto") == torch.float32
    export(fresh, tmp_path / "in", dtype=stored)
    loaded = load_model(tmp_path / "in")
    assert next(loaded.parameters()).dtype == torch.float32
    assert export_dtype(loaded, "auto") == stored
    assert export_dtype(loaded, "bf16") == torch.bfloat16
    export(loaded, tmp_path / "out", dtype=export_dtype(loaded, "auto"))
    assert {x.dtype for x in load_file(tmp_path / "out" / WEIGHTS).values()} == {stored}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(stored).removeprefix("torch.")


def test_values_that_fp16_cannot_hold(tmp_path):
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"lm_head\.weight has values up to 1e\+06.*bf16"):
        export(model, tmp_path / "out", dtype=torch.float16)
    assert names(tmp_path) == []


# ---- where it is written ----


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_earlier_export(tmp_path, monkeypatch):
    model, out = tiny_model(dtype=torch.float32), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(
            OSError, match=r"cannot export to .*out: no space left.*nothing is left"
        ):
            export(model, out)
    assert names(tmp_path) == []
    export(model, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(type(model.model), "save_pretrained", full_disk)
    message = r"cannot export to .*out: No space left on device; the earlier export .* unchanged"
    with pytest.raises(OSError, match=message) as caught:
        export(tiny_model(dtype=torch.float32, seed=1), out)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert names(tmp_path) == ["out"]


def test_an_export_that_cannot_be_renamed_keeps_the_earlier_one(tmp_path, monkeypatch):
    model, out = tiny_model(dtype=torch.float32), tmp_path / "out"
    export(model, out)
    before = (out / WEIGHTS).read_bytes()
    rename = type(out).rename

    def fails(self, target):
        if self.name.endswith(".hdp-new"):
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(type(out), "rename", fails)
    with pytest.raises(OSError, match="Permission denied"):
        export(tiny_model(dtype=torch.float32, seed=1), out)
    assert (out / WEIGHTS).read_bytes() == before and names(tmp_path) == ["out"]


def test_folders_of_similar_names_are_left_alone(tmp_path):
    for name in ("out.partial", "out.replaced", ".out.x.hdp-new", ".out.x.hdp-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".hdp-export-in-progress").write_text("")
    (tmp_path / ".out.link.hdp-new").symlink_to(tmp_path / "elsewhere")
    before = names(tmp_path)
    for _ in range(2):
        export(tiny_model(dtype=torch.float32), tmp_path / "out")
    assert names(tmp_path) == sorted([*before, "out"])
    assert names(tmp_path / "elsewhere") == [".hdp-export-in-progress"]
    for name in ("out.partial", "out.replaced", ".out.x.hdp-new", ".out.x.hdp-old"):
        assert (tmp_path / name / "thesis.txt").read_text() == "mine"


def test_what_a_killed_export_left_is_removed(tmp_path):
    target = tmp_path / "out"
    killed = os.fork()
    if not killed:
        with new_export(target) as folder:
            (folder / "half").write_text("")
            os._exit(0)
    os.waitpid(killed, 0)
    assert len(names(tmp_path)) == 1
    with new_export(target) as folder:
        (folder / "whole").write_text("")
        with new_export(tmp_path / "out") as other:  # a second export at the same time
            assert folder.exists() and other != folder
            (other / "whole").write_text("")
        assert folder.exists(), "its lock is held"
    assert names(tmp_path) == ["out"]
    assert names(target) == ["hdp_export.json", "whole"]


def test_links_are_refused(tmp_path):
    export(tiny_model(dtype=torch.float32), tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match="is a link; pass the folder"):
        check_target(tmp_path / "link")
    (tmp_path / "scratch").symlink_to(tmp_path)  # above the target, links are common
    assert check_target(tmp_path / "scratch" / "real") == tmp_path / "real"


def test_files_below_an_export_are_seen(tmp_path):
    export(tiny_model(dtype=torch.float32), tmp_path / "out")
    weights = tmp_path / "out" / WEIGHTS
    weights.unlink()
    weights.mkdir()  # has the name of a file of the export
    (weights / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no export wrote \(model\.safetensors/thesis\.txt\)"):
        check_target(tmp_path / "out")


def test_targets_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in ("file", "file/out"):
        with pytest.raises(ValueError, match=r"is a file; choose|cannot write to .*/file"):
            check_target(tmp_path / path)
    with pytest.raises(ValueError, match=r"holds files that no export wrote|cannot write"):
        check_target("/")
    monkeypatch.setattr(export_folder.os, "access", lambda *args: False)
    with pytest.raises(ValueError, match=r"cannot write to .*; choose another folder"):
        check_target(tmp_path / "out")


def test_the_folder_has_ordinary_permissions(tmp_path):
    export(tiny_model(dtype=torch.float32), tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
