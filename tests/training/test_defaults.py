"""`hdp train` with its own defaults trains: the demo data is cut to what the ranks hold."""

from __future__ import annotations

import pytest

from hdp.config import TrainConfig
from hdp.training.data_setup import DEMO_LENGTH, limit_demo_data
from hdp.training.loop import train


def test_the_demo_data_is_limited_unless_a_limit_is_given():
    bare = TrainConfig()
    limited = limit_demo_data(bare, 1, say=False)
    assert (limited.max_length, limited.overlong) == (DEMO_LENGTH, "split")
    assert limit_demo_data(bare, 8, say=False) == limited, (
        "the batches depend on the number of ranks"
    )
    few = TrainConfig(max_tokens_per_rank=500)
    assert limit_demo_data(few, 2, say=False).max_length == 1000
    auto = TrainConfig(max_tokens_per_rank="auto")
    assert limit_demo_data(auto, 2, say=False).max_length == DEMO_LENGTH
    for own in (TrainConfig(max_length=100), TrainConfig(data="texts")):
        assert limit_demo_data(own, 1, say=False) is own


def test_the_defaults_run(tmp_path, capsys):
    """On a part of the data, for one step: the whole takes a minute."""
    pytest.importorskip("tokenizers")
    config = TrainConfig(
        pattern="t*.py",
        steps=1,
        batch_tokens=512,
        cache_dir=str(tmp_path / "cache"),
        run_dir=str(tmp_path / "run"),
        device="cpu",
        tensorboard=False,
    )
    [metrics] = train(config)
    assert metrics.step == 1 and metrics.hdp_size == 1
    err = capsys.readouterr().err
    assert "data stdlib: --max-length 2048 --overlong split, because" in err
    assert "documents over 2,048 tokens, split: " in err
    assert "weight decay: 0.1 for 29 tensors" in err and "none for 9 tensors, 1,152" in err
