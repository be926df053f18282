"""Names that are paths never reach the hub; a hub that cannot be reached is asked once."""

from __future__ import annotations

import shutil
import socket
import time

import pytest
import torch

from hdp.models import hub
from hdp.models.export import export_model
from hdp.models.huggingface import load_tokenizer
from hdp.models.loading import build_model, load_model
from tests.tiny_models import tiny_model

pytest.importorskip("huggingface_hub")


@pytest.fixture
def lookups(monkeypatch, tmp_path):
    """Host names that were looked up; each look-up fails, and waiting is an error."""
    import huggingface_hub.constants

    names: list[str] = []

    def fails(host, *args, **kwargs):
        names.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    hub._unreachable.cache_clear()
    yield names
    hub._unreachable.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        *("models/nope", "./nope", "../nope", "/nope", "~/nope", "a/b/c", "a b", "a//b", "nope/"),
        *("nope.json", "nope.gguf", "here/nope"),
    ],
)
def test_paths_do_not_reach_the_hub(name, lookups, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for call in (build_model, load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"no such file or folder \(looked for /") as caught:
            call(name)
        assert "\n" not in str(caught.value)
    assert not lookups


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_model().config.save_pretrained(tmp_path / "model")
    assert build_model("~/model", skeleton=True).config.model_type == "llama"


def test_without_network_the_hub_is_asked_once(lookups):
    for call in (build_model, load_model, load_tokenizer, build_model):
        with pytest.raises(ValueError, match=r"hub cannot be reached .*hf download") as caught:
            call("somebody/something")
        assert "\n" not in str(caught.value)
    assert len(lookups) <= 1


def test_without_network_the_cache_is_used(lookups, tmp_path):
    model = tiny_model(dtype=torch.float32)
    export_model(model, tmp_path / "model", model.state_dict(), dtype=None)
    repository = tmp_path / "hub" / "models--somebody--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tmp_path / "model", repository / "snapshots" / ("0" * 40))
    loaded = load_model("somebody/something")
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x), name
    assert len(lookups) <= 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "hub has no model 'somebody/some', or it is private"),
        ("GatedRepoError", "access to 'somebody/some' is restricted: request it"),
    ],
)
def test_a_hub_that_refuses(error, message, lookups, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)
    made = kind.__new__(kind)

    def refuses(*args, **kwargs):
        raise made

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuses)
    with pytest.raises(ValueError, match=message):
        build_model("somebody/some")
