"""Checkpoints that do not fit their config, or are damaged, are refused before weights are read."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hdp.models.export import export_model
from hdp.models.huggingface import load_tokenizer, model_from_checkpoint
from hdp.models.loading import build_model, check_model, load_model
from tests.tiny_models import tiny_model

WEIGHTS = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{tied: a checkpoint}"""
    folders = {}
    for tied in (False, True):
        model = tiny_model(dtype=torch.float32, tie_word_embeddings=tied)
        folders[tied] = tmp_path_factory.mktemp("saved") / "model"
        export_model(model, folders[tied], model.state_dict(), dtype=None)
    return folders


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A function that copies a checkpoint with changes to its config and weights."""

    def make(config=None, weights=None, *, tied=False):
        folder = tmp_path / "model"
        shutil.copytree(saved[tied], folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        if weights:
            tensors = load_file(folder / WEIGHTS)
            weights(tensors)
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return make


def refused(folder, message, monkeypatch, **options):
    """Both load_model and check_model refuse, in one line, before transformers reads weights."""

    def forbidden(*args, **kwargs):
        raise AssertionError("weights are read")

    for call in (load_model, check_model):
        with monkeypatch.context() as patch:
            patch.setattr("hdp.models.loading.model_from_checkpoint", forbidden)
            with pytest.raises(ValueError, match=message) as caught:
                call(folder, **options)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"tie_word_embeddings": True}, None, r"lm_head.weight differs from model.embed_tokens"),
        ({}, lambda x: x.pop(HEAD), r"lacks lm_head.weight.*\"tie_word_embeddings\": true"),
        ({"vocab_size": 64}, None, r"safetensors: model\.embed.* shape \(61, 32\).*\(64, 32\)"),
        ({"num_hidden_layers": 1}, None, "has 9 weights .*layers.1.*num_hidden_layers=1"),
        ({"num_hidden_layers": 3}, None, "lacks 9 weights .*model.layers.2"),
        (
            {},
            lambda x: x.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            "first model.layers.0.self_attn.q_proj.bias: its config turns this bias off",
        ),
        ({}, lambda x: x.update({"a.lora_A.weight": torch.ones(2)}), "merge the adapter"),
        ({}, lambda x: x.update({"score.weight": torch.ones(2)}), "first score.weight"),
        ({}, lambda x: x.update({EMBEDDING: x[EMBEDDING].to(torch.int8)}), "stored as I8"),
        (
            {},
            lambda x: x.update({EMBEDDING: x[EMBEDDING].to(torch.float8_e4m3fn)}),
            "is quantized .*stored as F8_E4M3",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, None, "is quantized .*: fp8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, None, "quantized.*: gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, None, "quantized.*: awq"),
        ({"quantization_config": {"load_in_4bit": True}}, None, "is quantized"),
        ({"quantization_config": "4 bits"}, None, "invalid config entries"),
        (
            {"model_type": "my_own", "auto_map": {"AutoConfig": "mine.MyConfig"}},
            None,
            "'my_own' is defined by Python code .*which is not run",
        ),
        ({"model_type": None}, None, "config.json has no model_type"),
    ],
)
def test_weights_that_contradict_the_config(checkpoint, config, weights, message, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on stdin"))
    refused(checkpoint(config, weights), message, monkeypatch)


def test_the_remedies_for_tied_weights_work(checkpoint):
    folder = checkpoint({"tie_word_embeddings": True})
    model = load_model(folder, config_overrides={"tie_word_embeddings": False}).model
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    shutil.rmtree(folder)
    folder = checkpoint(weights=lambda x: x.pop(HEAD))
    model = load_model(folder, config_overrides={"tie_word_embeddings": True}).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def base_model(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("tied", "weights"),
    [
        (True, lambda x: x.update({HEAD: x[EMBEDDING].clone()})),  # says the same twice
        (
            False,
            lambda x: x.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ),
        (True, base_model),
    ],
    ids=["same head", "inv_freq", "base model"],
)
def test_harmless_differences_are_accepted(saved, checkpoint, tied, weights):
    got, want = load_model(checkpoint(weights=weights, tied=tied)), load_model(saved[tied])
    for name, x in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], x), name


def shards(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    path = folder / f"{WEIGHTS}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def test_shards(checkpoint, monkeypatch):
    folder = checkpoint()
    index = shards(folder)
    load_model(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "names 2 files, and 1 of them are missing, first model-00002", monkeypatch)
    for text in ("{", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}'):
        index.write_text(text)
        refused(folder, r"model\.safetensors\.index\.json .*again", monkeypatch)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "is damaged or incomplete .*download or copy"),
        (lambda data: b"", "is damaged or incomplete"),
        (lambda data: b"x" * 1000, "is damaged or incomplete"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
    ids=["truncated", "empty", "garbage", "pointer"],
)
def test_damaged_weights(checkpoint, damage, message, monkeypatch):
    folder = checkpoint()
    path = folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    refused(folder, f"{WEIGHTS} .*{message}" if "git" not in message else message, monkeypatch)


class _Code:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_pytorch_files(checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = checkpoint()
    tensors, path = load_file(folder / WEIGHTS), folder / "pytorch_model.bin"
    (folder / WEIGHTS).unlink()
    torch.save(tensors, path)
    load_model(folder)
    path.write_bytes(path.read_bytes()[:1000])
    refused(folder, "pytorch_model.bin is damaged or incomplete", monkeypatch)
    torch.save({"a": _Code()}, path)
    refused(folder, "Python objects other than weights", monkeypatch)
    path.write_bytes(pickle.dumps(_Code()))
    refused(folder, r"pytorch_model\.bin", monkeypatch)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "not a valid JSON"), ("{}", "no model_type"), ("[]", "not an object"), (None, "has no")],
)
def test_damaged_config(checkpoint, text, message, monkeypatch):
    folder = checkpoint()
    path = folder / "config.json"
    path.unlink() if text is None else path.write_text(text)
    refused(folder, message, monkeypatch)


def test_adapters_are_refused(checkpoint, monkeypatch):
    """transformers would load the base model that an adapter names, from wherever it is."""
    folder = checkpoint()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    refused(folder, "holds an adapter .*merge it", monkeypatch)


def test_errors_while_reading_weights_are_one_line(saved, monkeypatch):
    """Whatever else goes wrong inside transformers."""
    import transformers

    def fails(*args, **kwargs):
        raise RuntimeError("no good\n  at all\n  Traceback ...")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails)
    config = build_model(saved[False], skeleton=True).config
    with pytest.raises(ValueError, match=r"cannot load weights from .*: no good$"):
        model_from_checkpoint(saved[False], config, dtype=torch.float32, attention="hdp")


@pytest.mark.parametrize(
    "case", ["truncated", "empty", "object", "pointer", "config", "none", "code"]
)
def test_damaged_tokenizers(case, tmp_path, monkeypatch):
    from tests.models.test_causal_lm import _tokenizer

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on stdin"))
    _tokenizer(tmp_path)
    folder = tmp_path / "tokenizer"
    file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    cut = file.read_text()[:80]
    map_to_code = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    path, text, message = {
        "truncated": (file, cut, "tokenizer.json is damaged"),
        "empty": (file, "", "tokenizer.json is damaged"),
        "object": (file, "{}", "tokenizer.json is not a tokenizer"),
        "pointer": (file, "version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        "config": (config, "[]", "tokenizer_config.json is damaged"),
        "none": (config, "{}", "the folder has no tokenizer.json"),
        "code": (config, json.dumps(map_to_code), "custom code"),
    }[case]
    path.write_text(text)
    if case == "none":
        file.unlink()
    with pytest.raises(ValueError, match=f"no tokenizer at .*{message}.*bpe:SIZE") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_large_model_is_refused_without_building_it(monkeypatch):
    """The default gemma3 has 4B weights."""
    biggest = []
    empty = torch.empty

    def watched(*args, **kwargs):
        made = empty(*args, **kwargs)
        biggest.append(0 if made.is_meta else made.numel())
        return made

    monkeypatch.setattr(torch, "empty", watched)
    for model_type in ("gemma3", "gemma3_text"):
        with pytest.raises(ValueError, match="cannot run under ring attention"):
            build_model({"model_type": model_type})
    assert max(biggest, default=0) < 1 << 20


def test_weights_that_do_not_fit_into_memory():
    from tests.tiny_models import tiny_config

    with pytest.raises(ValueError, match="you tried to allocate"):
        build_model(tiny_config(vocab_size=10**13))
