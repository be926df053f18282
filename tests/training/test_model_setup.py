"""What set-up refuses or says about a model, before its data and weights are read."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json

import pytest
import torch

from hdp.config import TrainConfig
from hdp.models.export import export_model
from hdp.models.loading import build_model
from hdp.scheduler import CostModel
from hdp.training.model_setup import _cost_misfit, check_tokenizer
from tests.run_ranks import RankError, run_ranks
from tests.scheduler.batches import WITH_COMM
from tests.training.runs import MODEL, config, write_inputs

SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint with a tokenizer of bytes."""
    from hdp.data.prepare.tokenizer import ByteTokenizer

    folder = tmp_path_factory.mktemp("pretrained") / "model"
    model = build_model(MODEL, seed=1)
    export_model(model, folder, model.state_dict(), tokenizer=ByteTokenizer(), dtype=torch.bfloat16)
    return folder


def _train(rank, world, options):
    from hdp.training.loop import train

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        train(options)
    return said.getvalue()


@pytest.mark.parametrize("world", [1, 2])
def test_a_head_that_contradicts_the_config_is_refused_on_any_number_of_ranks(
    world, inputs, pretrained, tmp_path
):
    path = pretrained / "config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "tie_word_embeddings": True}))
    options = config(
        inputs,
        tmp_path / "run",
        model=str(pretrained),
        random_init=False,
        cache_dir=str(tmp_path / "cache"),
    )
    try:
        message = r"lm_head\.weight differs from .*\"tie_word_embeddings\": false"
        with pytest.raises(RankError, match=message) as caught:
            run_ranks(_train, world, options)
    finally:
        path.write_text(before)
    assert len(caught.value.ranks) == world, "all ranks refuse; none waits"
    assert not (tmp_path / "cache").exists(), "the data was tokenized first"


def test_a_vocabulary_that_is_too_small(inputs, tmp_path):
    options = config(inputs, tmp_path / "run", config_overrides='{"vocab_size": 100}')
    message = r"ids up to \d+, but model .* a vocabulary of 100"
    with pytest.raises(RankError, match=message):
        run_ranks(_train, 1, options)


@pytest.mark.parametrize(
    ("wanted", "stored"), [("auto", "bfloat16"), ("fp32", "float32"), ("fp16", "float16")]
)
def test_export_dtype(wanted, stored, inputs, pretrained, tmp_path):
    out = tmp_path / "out"
    run = {"model": str(pretrained), "random_init": False, "steps": 1, "export_dtype": wanted}
    options = config(inputs, tmp_path / "run", export_hf=str(out), **run)
    (said,) = run_ranks(_train, 1, options)
    assert json.loads((out / "config.json").read_text())["dtype"] == stored
    assert f"wrote {out} in {stored}" in said


def test_costs_of_another_model_are_said(inputs, tmp_path):
    options = config(inputs, tmp_path / "run", cost="h200", steps=1)
    (said,) = run_ranks(_train, 1, options)
    assert "--cost h200 (LLaMA-7B on H200" in said
    assert "is for 32 layers, and the model has 2: predictions and plans are those" in said
    with pytest.raises(RankError, match=r"--offload-gib 1.*is for 32 layers, and the model has 2"):
        run_ranks(_train, 1, dataclasses.replace(options, offload_gib=1.0))


def test_costs_of_another_width_are_said():
    ours = dataclasses.replace(WITH_COMM, num_layers=2, kv_bytes_per_token=2 * 2 * 2 * 8 * 8)
    given = TrainConfig(cost="cost.json")
    assert _cost_misfit(given, ours, SHAPE) == ""
    assert _cost_misfit(given, dataclasses.replace(ours, kv_bytes_per_token=0.0), SHAPE) == ""
    wider = dataclasses.replace(ours, kv_bytes_per_token=2048.0)
    assert "2,048 bytes of keys and values per token, and the model has 512" in _cost_misfit(
        given, wider, SHAPE
    )
    assert _cost_misfit(TrainConfig(), wider, SHAPE) == "", "estimated"
    assert CostModel.preset("h200").num_layers == 32


@pytest.mark.parametrize("tokenizer", ["bpe", "bpe:4096", "bytes"])
def test_a_new_tokenizer_on_pretrained_weights_is_refused(tokenizer, pretrained, tmp_path):
    def check(model, **options):
        check_tokenizer(TrainConfig(model=str(model), tokenizer=tokenizer, **options))

    check("demo")
    check(pretrained, random_init=True)
    if tokenizer == "bytes":  # the model's own
        check(pretrained)
        pretrained = tmp_path
    with pytest.raises(ValueError, match=f"--tokenizer {tokenizer} does not fit .*--random-init"):
        check(pretrained)
