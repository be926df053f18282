"""Runs over epochs and mixtures: the same on any number of ranks and after a resume."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections import Counter

import numpy as np
import pytest

from hdp.config import DEFAULT_STEPS, TrainConfig
from hdp.training.callbacks import Callback
from tests.run_ranks import RankError, run_ranks
from tests.training.runs import config, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = write_inputs(tmp_path_factory.mktemp("inputs"))
    rows = [
        [{"role": "user", "content": "q" * (1 + i % 20)}, {"role": "assistant", "content": f"a{i}"}]
        for i in range(30)
    ]
    lines = [json.dumps({"messages": row}) + "\n" for row in rows]
    (root / "chats.jsonl").write_text("".join(lines))
    return root


class Order(Callback):
    """Writes down the sequences of each step, in the order of training."""

    def __init__(self):
        self.batches, self.before = [], None

    def on_train_start(self, run, progress):
        self.before = run.sampler.position

    def on_step_end(self, run, progress, metrics):
        ids, after = run.sampler.batch_at(self.before)
        assert after == run.sampler.position and metrics.num_seqs == len(ids)
        assert metrics.num_loss_tokens == int(run.dataset.num_loss_tokens[ids].sum())
        self.before = after
        self.batches.append(ids.tolist())
        self.losses = [*getattr(self, "losses", []), metrics.loss]
        self.lengths = run.dataset.seqlens


def _train(rank, world, options):
    from hdp.training.loop import train

    order = Order()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        train(options, [order])
    return order.batches, getattr(order, "losses", []), said.getvalue(), order


def mixture(inputs, run_dir, **options):
    data = (f"{inputs / 'text'}:0.7", f"{inputs / 'chats.jsonl'}:0.2")
    return config(inputs, run_dir, data=data, **{"steps": 12, **options})


@pytest.mark.parametrize("by", ["tokens", "sequences"])
def test_a_mixture_is_the_same_on_any_number_of_ranks_and_after_a_resume(inputs, tmp_path, by):
    whole = {}
    for world, held in ((1, 704), (2, 352), (4, 176)):
        options = mixture(inputs, tmp_path / str(world), mix_by=by, max_tokens_per_rank=held)
        whole[world] = run_ranks(_train, world, options)[0]
        assert whole[world][0] == whole[1][0]
        np.testing.assert_allclose(whole[world][1], whole[1][1], rtol=1e-4)
    batches, losses, said, order = whole[1]
    assert "0.7" not in said.split("mixture")[1].split("\n")[0].split("%")[0]
    assert f"mixture, shares of {by}: " in said and "the weights add up to 0.9, scaled to 1" in said
    assert " 77.8%, " in said and "epochs of each data set so far: " in said
    ids = np.concatenate(batches)
    cost = order.lengths[ids] if by == "tokens" else np.ones(len(ids))
    assert abs(cost[ids < 60].sum() / cost.sum() - 7 / 9) < cost.max() / cost.sum()
    mixed = [batch for batch in batches if min(batch) < 60 <= max(batch)]
    assert mixed, "texts without and chats with a loss mask come in one batch"
    part = mixture(inputs, tmp_path / "part", mix_by=by, steps=5)
    first = run_ranks(_train, 2, part)[0]
    second = run_ranks(_train, 3, dataclasses.replace(part, steps=12))[0]
    assert first[0] + second[0] == batches
    np.testing.assert_allclose((first[1] + second[1])[5:6], losses[5:6], rtol=0.2)


@pytest.mark.parametrize("extra", [{}, {"curriculum": "short-first"}])
def test_epochs_see_each_sequence_once_across_a_resume_on_other_ranks(inputs, tmp_path, extra):
    """Two epochs, of data in two places; stopped in the first, with another batch size after."""
    data = (str(inputs / "text"), str(inputs / "chats.jsonl"))
    options = config(inputs, tmp_path, data=data, steps=DEFAULT_STEPS, epochs=0.6, **extra)
    first = run_ranks(_train, 2, options)[0]
    more = dataclasses.replace(options, epochs=2.0, batch_tokens=1300)
    second = run_ranks(_train, 3, more)[0]
    counts = Counter(np.concatenate(first[0] + second[0]).tolist())
    assert counts == dict.fromkeys(range(90), 2)
    steps = len(first[0]) + len(second[0])
    assert f"step {steps}/{steps}" in second[2] and "1 epoch = " in second[2]
    assert "rounded up to whole steps: " in first[2] and "rounded up" not in second[2]
    again = run_ranks(_train, 1, more)[0]
    assert not again[0] and f"all {steps} steps are done: raise --epochs" in again[2]
    if extra:
        lengths = [first[3].lengths[batch].max() for batch in first[0]]
        assert lengths == sorted(lengths)


def test_held_out_documents_are_not_in_an_epoch(inputs, tmp_path):
    options = config(inputs, tmp_path, steps=DEFAULT_STEPS, epochs=1, eval_share=0.25, log_every=1)
    batches, _, said, _ = run_ranks(_train, 2, options)[0]
    assert Counter(np.concatenate(batches).tolist()) == dict.fromkeys(range(45), 1)
    assert "25.00% of the documents, held out: 15 sequences" in said
    with pytest.raises(
        RankError, match=r"belongs to other data .*num_sequences 45 -> 60.*held-out"
    ):
        run_ranks(_train, 1, dataclasses.replace(options, eval_share=None, epochs=2))


def test_the_context_lengthens_on_time_and_after_a_resume(inputs, tmp_path):
    options = {"context_schedule": "0:40,4:120,8:1K"}
    whole = run_ranks(_train, 1, config(inputs, tmp_path / "whole", steps=12, **options))[0]
    longest = [int(whole[3].lengths[batch].max()) for batch in whole[0]]
    assert max(longest[:3]) <= 40 < max(longest[3:7]) <= 120 < max(longest[7:])
    assert "from step 4 on: sequences of at most 120 tokens" in whole[2]
    part = config(inputs, tmp_path / "part", steps=5, **options)
    first = run_ranks(_train, 2, part)[0]
    second = run_ranks(_train, 1, dataclasses.replace(part, steps=12))[0]
    assert first[0] + second[0] == whole[0]


def test_a_tokenizer_is_trained_on_all_data_sets(inputs, tmp_path):
    from hdp.training.data_setup import open_training_data

    (tmp_path / "zebra.jsonl").write_text(json.dumps({"text": "zebrafish " * 2000}) + "\n")
    names = (str(inputs / "text"), str(tmp_path / "zebra.jsonl"))
    options = config(inputs, tmp_path / "run", data=names, tokenizer="bpe:300")
    both = open_training_data(options)
    assert both[0].tokenizer.fingerprint() == both[1].tokenizer.fingerprint()
    assert both[0].vocab_size == both[1].vocab_size
    alone = open_training_data(dataclasses.replace(options, data=names[0]))
    text = ["zebrafish zebrafish"]
    num = [len(data[0].tokenizer.encode_texts(text)[0]) for data in (both, alone)]
    assert num[0] * 3 < num[1]
    again = open_training_data(options)[0].tokenizer
    assert again.fingerprint() == both[0].tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1.0, "steps": 31}, "--steps 31 and --epochs 1.0: give only one"),
        ({"epochs": 0.0}, "--epochs must be above 0, got 0.0"),
        ({"epochs": float("nan")}, "--epochs must be a finite number"),
        ({"context_schedule": "0-5"}, "'0-5' is not STEP:TOKENS; write it like 0:4096,1000:16K"),
        ({"context_schedule": "5:100"}, "must start at step 0"),
        ({"context_schedule": "0:100,9:100"}, "must ascend"),
        ({"context_schedule": "0:100,9:200,7:300"}, "must ascend"),
    ],
)
def test_bad_flags(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_data_may_be_a_list_and_one_item_is_a_name():
    assert TrainConfig(data=["a", "b"]).data == ("a", "b")
    assert TrainConfig(data=("a",)).data == "a"
    assert TrainConfig(**json.loads(TrainConfig(data=("a", "b")).to_json())).data == ("a", "b")
    assert TrainConfig(context_schedule="0:4K,1000:16384").context_limits == (
        (0, 4096),
        (999, 16384),
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--data", "a:1", "b:2", "--lr", "1"],
        ["--data", "a:1", "--lr", "1", "--data", "b:2"],
        ["--data=a:1", "--data=b:2", "--lr=1"],
    ],
)
def test_several_data_flags_are_a_mixture(argv):
    pytest.importorskip("tyro")
    from hdp.cli import parse_config

    parsed = parse_config(TrainConfig, argv)
    assert (parsed.data, parsed.lr) == (("a:1", "b:2"), 1.0)
    assert parse_config(TrainConfig, ["--data", "a"]).data == "a"
    assert parse_config(TrainConfig, []).data == "stdlib"


def test_a_limit_that_admits_nothing_is_an_error(inputs, tmp_path):
    options = mixture(inputs, tmp_path, context_schedule="0:2")
    with pytest.raises(RankError, match=r"no sequence has at most 2 tokens, the first limit"):
        run_ranks(_train, 1, options)
