"""--dry-run refuses what a run would refuse, prints what it would do, and leaves no trace."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from hdp.cli import run_training
from hdp.config import TrainConfig
from hdp.config_file import load_config
from hdp.scheduler import plan
from hdp.training.loop import train
from tests.training.runs import config, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_what_is_printed_is_a_configuration_of_the_same_run(inputs, tmp_path, capsys):
    options = config(inputs, tmp_path / "run", hdp_size=3, max_tokens_per_rank=250, dry_run=True)
    assert train(options) == []
    captured = capsys.readouterr()
    (tmp_path / "run.yaml").write_text(captured.out)
    again = load_config(tmp_path / "run.yaml", TrainConfig)
    assert again == dataclasses.replace(options, dry_run=False)
    for part in (
        "3 ranks on cpu",
        "memory of one rank with 250 tokens: about ",
        "1 epoch = ",
        "lr: 2.0e-03 at step 1, 1.0e-02 at step 6, cosine, from step 6 on down to 1.0e-03, ",
        " at the last step",
        "first batch: ",
        "no checkpoint, so the run starts from step 1",
    ):
        assert part in captured.err, part
    assert not (tmp_path / "run").exists()


def test_auto_is_resolved_with_its_arithmetic(inputs, tmp_path, capsys):
    options = config(inputs, tmp_path / "run", max_tokens_per_rank="auto", dry_run=True)
    assert run_training(options) == 0
    captured = capsys.readouterr()
    assert "--max-tokens-per-rank auto: " in captured.err and "AdamW, 1/1" in captured.err
    assert "\nmax_tokens_per_rank: 16384 " in captured.out


def test_a_model_of_any_size_is_checked_without_weights(inputs, tmp_path, capsys, monkeypatch):
    """8B parameters, and a machine that could not hold them."""
    monkeypatch.setattr("hdp.training.dry_run.free_bytes", lambda device: (16e9, 0.0))
    (tmp_path / "big").mkdir()
    big = {
        **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"vocab_size": 128256},
    }
    (tmp_path / "big" / "config.json").write_text(json.dumps(big))
    options = config(inputs, tmp_path / "run", model=str(tmp_path / "big"), dry_run=True)
    assert run_training(options) == 0
    err = capsys.readouterr().err
    assert "8,030.3M parameters" in err and "(too little)" in err
    auto = dataclasses.replace(options, max_tokens_per_rank="auto")
    assert run_training(auto) == 2
    assert "GiB before any token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens_per_rank": 100}, "do not fit"),
        ({"model": "nowhere"}, "nowhere"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"export_hf": __file__}, "is a file; choose a folder"),
        ({"export_ema": __file__, "ema_decay": 0.9}, "is a file; choose a folder"),
        ({"cost": "nowhere.json"}, "nowhere.json"),
        ({"policy": "static", "cp_size": 1, "hdp_size": 2, "max_tokens_per_rank": 400}, "cp_size"),
    ],
)
def test_what_a_run_refuses_is_refused(inputs, tmp_path, capsys, change, message):
    options = config(inputs, tmp_path / "run", dry_run=True, **change)
    assert run_training(options) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("hdp: error: ")
    assert "Traceback" not in captured.err and not (tmp_path / "run").exists()


def test_what_will_not_come_is_said(inputs, tmp_path, capsys):
    options = config(inputs, tmp_path / "run", steps=4, warmup_steps=9, trace_step=7, dry_run=True)
    assert run_training(options) == 0
    err = capsys.readouterr().err
    assert "the warm-up is longer than the run: 9 steps of 4, 4.4e-03 at the last step" in err
    assert "--trace-step 7: the run trains steps 1 to 4, so nothing would be traced" in err
    assert err.count("4 steps") == 1 and "1 rank on cpu" in err
    assert run_training(dataclasses.replace(options, warmup_steps=0, trace_step=4)) == 0
    err = capsys.readouterr().err
    assert "lr: 1.0e-02 at step 1, cosine, " in err and "--trace-step" not in err


def test_evaluation_data_are_planned_too(inputs, tmp_path, monkeypatch):
    planned = []

    def record(seqlens, **options):
        planned.append(seqlens.tolist())
        return plan(seqlens, **options)

    monkeypatch.setattr("hdp.training.dry_run.plan", record)
    options = config(inputs, tmp_path / "run", eval_share=0.2, dry_run=True)
    assert train(options) == []
    assert [len(lengths) for lengths in planned[:2]] == [1, 1] and len(planned) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_run_for_gpus_is_planned_without_one(inputs, tmp_path, capsys):
    options = config(inputs, tmp_path / "run", device="cuda", hdp_size=16, dry_run=True)
    assert run_training(options) == 0
    err = capsys.readouterr().err
    assert "16 ranks on cuda" in err and "compute in bfloat16" in err
    assert "GiB; no CUDA device is visible here" in err
    assert run_training(dataclasses.replace(options, max_tokens_per_rank="auto")) == 2
    assert "its memory is unknown; give a number" in capsys.readouterr().err
