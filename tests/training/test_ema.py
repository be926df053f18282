"""The average of the weights: dense on any number of ranks, swapped and resumed exactly."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from hdp.config import TrainConfig
from hdp.distributed.fsdp import full_state_dict, set_microbatch, shard, unshard_all
from hdp.training.callbacks import Callback
from hdp.training.ema import EMA
from hdp.training.optim import build_optimizer
from tests.run_ranks import run_ranks
from tests.training.runs import config, write_inputs

DECAY = 0.8


def _model():
    torch.manual_seed(0)
    # 5 and 3 rows: uneven shards, and empty ones on four ranks
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def _copies(model):
    """On one rank, the full tensors are the parameters themselves."""
    return {name: x.clone() for name, x in full_state_dict(model).items()}


def _walk(rank, world_size):
    """Five steps: the weights after each, the averages at the end, and the weights again."""
    model = _model()
    shard(model, init_device_mesh("cpu", (world_size,)), layers=list(model))
    optimizer = build_optimizer(model, lr=0.1)
    ema = EMA(model, DECAY)
    walked = [_copies(model)]
    for step in range(5):
        unshard_all(model)
        set_microbatch(model, reduce=True)
        x = torch.arange(7, dtype=torch.float64) * (step + 1) / (1 + rank)
        model(x[None]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        walked.append(_copies(model))
    with ema.applied(model):
        averaged = _copies(model)
    return walked, averaged, _copies(model)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_dense(world_size):
    walked, averaged, after = run_ranks(_walk, world_size)[0]
    want = {name: x.clone() for name, x in walked[0].items()}
    for state in walked[1:]:
        want = {name: DECAY * want[name] + (1 - DECAY) * state[name] for name in want}
    for name, x in averaged.items():
        torch.testing.assert_close(x, want[name], rtol=1e-13, atol=1e-13)
        assert not torch.equal(x, walked[-1][name])
        assert torch.equal(after[name], walked[-1][name]), "swap_is_exact"


def test_only_trainable_parameters_are_averaged_and_steps_inside_are_refused():
    model = _model()
    model[0].weight.requires_grad_(False)
    ema = EMA(model, DECAY)
    assert "0.weight" not in ema.averages and len(ema.averages) == 5
    assert ema.num_bytes == 8 * (5 + 5 + 5 + 15 + 3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with ema.applied(model), pytest.raises(AssertionError, match="leave applied"):
        ema.update(model)
    with pytest.raises(KeyError), ema.applied(model):
        raise KeyError("the weights come back after an error too")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, float("nan")])
def test_bad_decays_are_named(decay):
    with pytest.raises(ValueError, match=r"decay=.* must be above 0 and below 1"):
        EMA(_model(), decay)


# ---- whole runs ----


class _Averages(Callback):
    def on_train_end(self, run, progress):
        with run.ema.applied(run.model):
            self.averages = _copies(run.model)
        self.weights = _copies(run.model)


def _train(rank, world, options):
    import contextlib
    import io

    from hdp.training.loop import train

    kept = _Averages()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        train(options, [kept])
    return kept.averages, kept.weights, said.getvalue()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_resume_is_exact(inputs, tmp_path):
    """Whole and resumed averages are the same bits; on another number of ranks, the same values."""
    common = {"ema_decay": 0.7, "schedule": "constant", "max_tokens_per_rank": 704}
    whole = config(inputs, tmp_path / "whole", steps=6, **common)
    part = config(inputs, tmp_path / "part", steps=3, **common)
    want, _, said = run_ranks(_train, 2, whole)[0]
    assert "EMA of the weights, decay 0.7 (about the last 3 steps)" in said
    run_ranks(_train, 2, part)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "part", other)
    longer = dataclasses.replace(part, steps=6)
    got, weights, _ = run_ranks(_train, 2, longer)[0]
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert any(not torch.equal(got[name], weights[name]) for name in want)
    moved, _, _ = run_ranks(_train, 1, dataclasses.replace(longer, run_dir=str(other)))[0]
    for name in want:
        torch.testing.assert_close(moved[name], want[name], rtol=1e-3, atol=1e-4)


def test_an_average_may_begin_later_and_is_exported(inputs, tmp_path):
    """A checkpoint without an average is a start, and one with it loads without."""
    plain = config(inputs, tmp_path / "run", steps=2)
    run_ranks(_train_plainly, 1, plain)
    out = tmp_path / "average"
    more = dataclasses.replace(plain, steps=4, ema_decay=0.5, export_ema=str(out))
    averages, _, said = run_ranks(_train, 1, more)[0]
    assert "has no average of the weights: it starts from its weights" in said
    transformers = pytest.importorskip("transformers")
    exported = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(exported[name], averages[f"model.{name}"], rtol=0, atol=0)
    run_ranks(_train_plainly, 1, dataclasses.replace(plain, steps=5))


def _train_plainly(rank, world, options):
    from hdp.training.loop import train

    train(options)


def test_options_are_checked_together():
    with pytest.raises(ValueError, match="--export-ema out requires --ema-decay"):
        TrainConfig(export_ema="out")
    with pytest.raises(ValueError, match=r"--ema-decay must be in \[0, 1\), got 1\.0"):
        TrainConfig(ema_decay=1.0)
    with pytest.raises(ValueError, match="choose two folders"):
        TrainConfig(export_ema="out", export_hf="out", ema_decay=0.9)
