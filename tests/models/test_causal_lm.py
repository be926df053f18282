"""Hugging Face models under ring attention: they equal the plain model, or are rejected by name."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import hdp.data.pack
import hdp.models.logprobs
from hdp.attention.comm import RingComm
from hdp.data.pack import pack_rank
from hdp.models.causal_lm import transformer_shape
from hdp.models.export import export_model
from hdp.models.huggingface import load_tokenizer
from hdp.models.loading import build_model, load_model
from hdp.models.support import SUPPORTED_MODELS
from hdp.scheduler import StepPlan
from tests.run_ranks import run_ranks
from tests.tiny_models import (
    VOCAB,
    keep_norms_exact,
    local_batch,
    plain_logprobs,
    plain_model,
    random_samples,
    tiny_config,
    tiny_model,
)

SEQLENS = (5, 1, 17, 30)


def _gradients(logprobs, model):
    coefficients = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(9))
    (coefficients.to(logprobs.dtype) * logprobs).sum().backward()
    return {name.removeprefix("model."): x.grad for name, x in model.named_parameters()}


def _assert_equal(got, want, tolerance, label):
    assert got.shape == want.shape, label
    if not want.numel():
        return
    error = (got.double() - want.double()).abs()
    scale = max(1.0, want.abs().max().item())
    assert error.max() <= tolerance * scale, (
        f"{label}: off by {error.max():.3g} of {scale:.3g} at {int(error.argmax())}"
    )


def _compare(model, samples, plain, tolerance):
    logprobs = model(local_batch(samples))
    expected = torch.cat(plain_logprobs(plain, samples))
    _assert_equal(logprobs, expected, tolerance, "logprobs")
    grads = _gradients(logprobs, model)
    expected_grads = _gradients(expected, nn.ModuleDict({"model": plain}))
    assert grads.keys() == expected_grads.keys()
    for name, want in expected_grads.items():
        _assert_equal(grads[name], want, tolerance, name)


# ---- equality with the plain model ----


@pytest.mark.parametrize("model_type", sorted(SUPPORTED_MODELS))
def test_equals_plain_model(model_type):
    model = keep_norms_exact(tiny_model(model_type))
    plain = keep_norms_exact(plain_model(model))
    _compare(model, random_samples(SEQLENS), plain, 1e-12)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_equals_eager_model(model_type):
    # transformers' eager attention rounds the softmax to fp32 in any dtype.
    model = tiny_model(model_type)
    _compare(model, random_samples(SEQLENS), plain_model(model, "eager"), 3e-6)


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 24},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 4.0,
                "rope_theta": 1e4,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ],
    ids=lambda overrides: json.dumps(overrides)[:60],
)
def test_equals_plain_model_with(overrides):
    model = keep_norms_exact(tiny_model("llama", **overrides))
    plain = keep_norms_exact(plain_model(model))
    _compare(model, random_samples(SEQLENS), plain, 1e-12)


def test_equals_plain_model_in_fp32():
    model = tiny_model(dtype=torch.float32)
    _compare(model, random_samples(SEQLENS), plain_model(model), 1e-5)


def test_bf16_is_close_to_fp32():
    samples = random_samples((64, 9, 33))
    model = tiny_model(dtype=torch.bfloat16)
    logprobs = model(local_batch(samples))
    assert logprobs.dtype == torch.float32
    want = torch.cat(plain_logprobs(plain_model(model).float(), samples))
    assert (logprobs - want).norm() / want.norm() < 1e-2


def _run_on_ring(rank, world_size, model_type, seqlens, rings, microbatches):
    torch.manual_seed(0)
    plan = StepPlan.from_lists(seqlens, rings, microbatches, max_tokens_per_rank=1000)
    samples = random_samples(seqlens)
    model = keep_norms_exact(tiny_model(model_type))
    comm = RingComm()
    expected = plain_logprobs(keep_norms_exact(plain_model(model)), samples)
    for index, microbatch in enumerate(plan.microbatches(rank)):
        batch = pack_rank(plan, rank, samples)[index]
        with torch.no_grad():
            logprobs = model(batch, comm)
        row = 0
        for i, start, stop in batch.layout.spans():
            want = expected[microbatch.pieces[i].seq][start:stop]
            _assert_equal(
                logprobs[row : row + stop - start], want, 1e-12, f"rank {rank} microbatch {index}"
            )
            row += stop - start
        assert row == len(logprobs) or not batch.layout.num_ring_tokens


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_equals_plain_model_on_a_ring(model_type):
    seqlens, rings = [40, 7, 3, 1], [[2, 0, 1], [1], [0, 1], [0]]
    run_ranks(_run_on_ring, 3, model_type, seqlens, rings, [[[0, 3], [2]], [[0], [2], [1]], [[0]]])


def test_no_mask_is_built(monkeypatch):
    """transformers neither builds a mask nor searches position ids for boundaries (a GPU sync)."""
    from transformers import masking_utils

    def forbidden(*args, **kwargs):
        raise AssertionError("transformers searches the position ids to build a mask")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", forbidden)
    tiny_model()(local_batch(random_samples(SEQLENS)))


def test_unlabeled_batch_reaches_every_parameter():
    model = tiny_model()
    model(local_batch(random_samples((4,), masked=1.1))).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name


# ---- building, loading, exporting ----


def test_same_seed_same_weights():
    first, again, other = (build_model(tiny_config(), seed=seed) for seed in (5, 5, 6))
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    build_model(tiny_config(), seed=11)
    assert torch.equal(torch.rand(1), want)


def test_skeleton_has_the_same_names_and_no_memory():
    skeleton = build_model(tiny_config(), dtype=torch.float32, skeleton=True)
    full = build_model(tiny_config(), dtype=torch.float32)
    assert {n: (x.shape, x.dtype) for n, x in skeleton.state_dict().items()} == {
        n: (x.shape, x.dtype) for n, x in full.state_dict().items()
    }
    assert all(p.is_meta for p in skeleton.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_export_loads_as_plain_model(tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_model("qwen3", dtype=torch.float32, tie_word_embeddings=tied)
    model.model.generation_config.temperature = 0.3
    model.model.generation_config.do_sample = True
    folder = tmp_path / "out"
    tokenizer = _tokenizer(tmp_path)
    export_model(model, folder, model.state_dict(), tokenizer=tokenizer, dtype=None)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.float32
    assert plain.generation_config.temperature == 0.3
    for name, x in model.model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], x), name
    assert AutoTokenizer.from_pretrained(folder).encode("ab") == tokenizer.encode("ab")
    config = json.loads((folder / "config.json").read_text())
    assert "hdp" not in json.dumps(config)
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    samples = random_samples(SEQLENS)
    again = load_model(folder)
    assert again.training
    assert torch.equal(again(local_batch(samples)), model(local_batch(samples)))
    # A second export replaces the first, in another dtype.
    export_model(again, folder, again.state_dict())
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_tokenizer_that_auto_tokenizer_misreads(tmp_path):
    """transformers replaces any tokenizer saved next to a qwen2 model with its Qwen2Tokenizer."""
    model, tokenizer = tiny_model("qwen2", dtype=torch.float32), _tokenizer(tmp_path)
    with pytest.warns(UserWarning, match="AutoTokenizer loads a Qwen2Tokenizer"):
        export_model(model, tmp_path / "out", model.state_dict(), tokenizer=tokenizer)
    assert load_tokenizer(tmp_path / "out").encode("ab a") == tokenizer.encode("ab a")


def _tokenizer(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = {"a": 0, "b": 1, "<unk>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    return load_tokenizer(folder / "tokenizer")


def test_export_refuses_to_destroy_other_files(tmp_path):
    model = tiny_model()
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("")
    with pytest.raises(ValueError, match="holds files that no export wrote"):
        export_model(model, precious, model.state_dict())
    # A config.json does not make it an export: runs and other people's models have one too.
    (precious / "config.json").write_text("{}")
    message = r"holds files that no export wrote \(chapter1.txt, config.json\)"
    with pytest.raises(ValueError, match=message):
        export_model(model, precious, model.state_dict())
    assert sorted(p.name for p in precious.iterdir()) == ["chapter1.txt", "config.json"]
    export_model(model, tmp_path / "out", model.state_dict())
    (tmp_path / "out" / "notes.md").write_text("")
    with pytest.raises(ValueError, match=r"no export wrote \(notes.md\)"):
        export_model(model, tmp_path / "out", model.state_dict())
    state = dict(model.state_dict())
    del state["model.model.norm.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 weights, first model\.norm\.weight"):
        export_model(model, tmp_path / "new", state)
    assert not (tmp_path / "new").exists()


def test_checkpoint_with_missing_weights_is_rejected(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model(dtype=torch.float32)
    export_model(model, tmp_path / "out", model.state_dict())
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj"):
        load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 8}, "config has no model_type"),
        ({"model_type": "lama"}, "unknown model_type 'lama'"),
        (
            {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 5},
            "invalid config entries: .*hidden size .32. is not a multiple of .* heads .5.",
        ),
        ("/no/such/folder", "neither a folder with a valid config.json nor a hub model"),
        ({"model_type": "t5"}, "cannot build a causal LM of model type 't5'"),
    ],
)
def test_bad_config_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        build_model(config)


def test_missing_paths_are_named():
    with pytest.raises(ValueError, match="/no/such/folder"):
        load_model("/no/such/folder")
    with pytest.raises(ValueError, match=r"no tokenizer at '/no/such/folder': .* bpe:SIZE"):
        load_tokenizer("/no/such/folder")


def test_a_config_alone_has_no_weights(tmp_path):
    path = tmp_path / "config.json"
    tiny_model("qwen3").config.save_pretrained(tmp_path)
    for where, reason in ((path, "a config file has no weights"), (tmp_path, "no file named")):
        with pytest.raises(ValueError, match=f"cannot load weights from .*{reason}.*--random-init"):
            load_model(where)
        assert build_model(where).config.model_type == "qwen3"


@pytest.mark.parametrize("source", ["folder", "mapping", "config"])
def test_overrides_that_nothing_reads_are_rejected(source, tmp_path):
    """transformers drops rope_theta, which moved to rope_parameters, and any misspelled entry."""
    config = tiny_model("qwen3").config
    config.save_pretrained(tmp_path)
    given = {"folder": tmp_path, "mapping": {"model_type": "qwen3"}, "config": config}[source]
    for name in ("rope_theta", "num_hidden_layer"):
        near = {"rope_theta": "rope_parameters", "num_hidden_layer": "num_hidden_layers"}[name]
        message = f"'qwen3' have no entry '{name}'.* close matches: .*{near}"
        with pytest.raises(ValueError, match=message):
            build_model(given, skeleton=True, config_overrides={name: 1})
    model = build_model(given, skeleton=True, config_overrides={"num_hidden_layers": 1})
    assert len(model.layers) == 1


def test_transformer_shape():
    assert transformer_shape(tiny_model("qwen3")) == {
        "num_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
    }


def test_ignore_index_is_the_same_everywhere():
    assert hdp.models.logprobs.IGNORE_INDEX == hdp.data.pack.IGNORE_INDEX


def test_progress_bars_stay_out_of_logs(monkeypatch):
    import io
    import sys

    from transformers.utils import logging

    from hdp.models import huggingface

    was_on = logging.is_progress_bar_enabled()
    try:
        logging.enable_progress_bar()
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        huggingface._keep_bars_out_of_logs()
        assert not logging.is_progress_bar_enabled()
    finally:
        (logging.enable_progress_bar if was_on else logging.disable_progress_bar)()
