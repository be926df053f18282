"""Evaluation: exact on any number of ranks, no trace in training; best, early stop, resume."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hdp.config import TrainConfig
from hdp.training.callbacks import Callback
from hdp.training.data_setup import open_run_data
from hdp.training.evaluate import Evaluation
from hdp.training.evaluation_state import evaluation_state
from hdp.training.progress import Progress
from tests.run_ranks import RankError, run_ranks
from tests.tiny_models import keep_norms_exact
from tests.training.runs import MODEL, config, train_and_listen, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = write_inputs(tmp_path_factory.mktemp("inputs"))
    chats = [("one", "a longer answer than the others " * 4), ("two " * 30, "short"), ("x", "y")]
    rows = [
        [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        for user, answer in chats
    ]
    lines = [json.dumps({"messages": row}) + "\n" for row in rows]
    (root / "chats.jsonl").write_text("".join(lines))
    return root


class Notes(Callback):
    """Keeps evaluations, losses, and the weights and data of the first evaluation."""

    def __init__(self, *, weights=False):
        self.evaluations, self.losses, self.said = [], [], []
        self.weights, self._take = None, weights

    def on_train_start(self, run, progress):
        if self._take:
            keep_norms_exact(run.model)

    def on_step_end(self, run, progress, metrics):
        self.losses.append((metrics.step, metrics.loss, metrics.grad_norm))

    def on_evaluate(self, run, progress, evaluation):
        from hdp.distributed.fsdp import full_state_dict

        assert run.model.training and progress.step == evaluation.step
        self.evaluations.append(evaluation)
        if self._take and self.weights is None:
            self.weights = full_state_dict(run.model)
            data = run.data.evaluation
            self.samples = [
                (s.input_ids.astype(np.int64), s.labels(0, len(s.input_ids))) for s in data
            ]

    def on_train_end(self, run, progress):
        self.end = (progress.step, progress.stop_reason, progress.best_step, progress.best_loss)


def _train(rank, world, options, weights=False):
    from hdp.training.loop import train

    notes = Notes(weights=weights)
    train(options, [notes])
    if weights:
        return notes.evaluations[0], notes.weights, notes.samples
    return notes.losses, notes.evaluations, notes.end


def _dense_loss(weights, samples):
    from transformers import AutoModelForCausalLM, LlamaConfig

    made = AutoModelForCausalLM.from_config(LlamaConfig(**MODEL), attn_implementation="sdpa")
    made = keep_norms_exact(made.double())
    state = {name.removeprefix("model."): value for name, value in weights.items()}
    made.load_state_dict(state)
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in samples:
            logprobs = made(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
            for place, label in enumerate(labels.tolist()):
                if label >= 0:
                    total -= logprobs[place, label].item()
                    count += 1
    return total / count, count


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, {"eval_data": "chats.jsonl"}),
        (2, {"eval_share": 0.3, "max_tokens_per_rank": 352}),
        (3, {"eval_data": "chats.jsonl", "max_tokens_per_rank": 240}),
        (4, {"eval_data": "chats.jsonl", "max_tokens_per_rank": 180}),  # more ranks than chats
        (4, {"eval_share": 0.3, "eval_tokens": 1500, "max_tokens_per_rank": 180}),
    ],
)
def test_loss_equals_a_dense_run_in_fp64(inputs, tmp_path, world, options):
    options = {**options}
    if "eval_data" in options:
        options["eval_data"] = str(inputs / options["eval_data"])
    run = config(inputs, tmp_path, steps=1, dtype="fp64", **options)
    by_rank = run_ranks(_train, world, run, True)
    evaluation, weights, samples = by_rank[0]
    want, count = _dense_loss(weights, samples)
    assert abs(evaluation.loss - want) < 1e-10
    assert evaluation.perplexity == pytest.approx(math.exp(evaluation.loss), rel=1e-12)
    assert evaluation.num_loss_tokens == count
    assert evaluation.num_tokens == sum(len(ids) for ids, _ in samples)
    assert evaluation.num_tokens <= options.get("eval_tokens", 10**9)
    values = {dataclasses.replace(other, seconds=0.0) for other, *_ in by_rank}
    assert len(values) == 1, "ranks have different results"


def test_training_is_the_same_with_and_without_evaluation(inputs, tmp_path):
    """Bitwise, with dropout's random numbers, offload and a resume in between."""
    common = {"steps": 6, "offload_gib": 0.0625, "save_every": 3}
    common["config_overrides"] = '{"num_hidden_layers": 4, "attention_dropout": 0.0}'
    plain = config(inputs, tmp_path / "plain", **common)
    watched = config(
        inputs,
        tmp_path / "eval",
        eval_data=str(inputs / "chats.jsonl"),
        eval_every=1,
        **common,
    )
    want, none, _ = run_ranks(_train, 2, plain)[0]
    got, evaluations, _ = run_ranks(_train, 2, watched)[0]
    assert got == want and not none
    assert [e.step for e in evaluations] == [1, 2, 3, 4, 5, 6]
    assert [e.loss for e in evaluations] != sorted({evaluations[0].loss})


def test_metrics_are_written(inputs, tmp_path):
    run = config(inputs, tmp_path, steps=5, eval_share=0.2, eval_every=2, tensorboard=True)
    evaluations = run_ranks(_train, 1, run)[0][1]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5, 5]
    logged = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert logged == [e.loss for e in evaluations] and [e.step for e in evaluations] == [2, 4, 5]
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("eval_loss")] == [2, 4, 5]


def _train_with_losses(rank, world, options, by_step):
    """As `_train`, with the losses of evaluations given by step."""
    import hdp.training.evaluate as module

    evaluate = module.Evaluator.evaluate

    def scripted(self, step):
        return dataclasses.replace(evaluate(self, step), loss=by_step[step])

    module.Evaluator.evaluate = scripted
    return _train(rank, world, options)


def test_the_best_checkpoint_is_kept_and_found_again_after_a_resume(inputs, tmp_path):
    by_step = dict(enumerate([5.0, 4.0, 3.0, 4.5, 4.4, 4.3, 4.2, 2.0, 9.0, 9.0], start=1))
    options = {"eval_share": 0.2, "eval_every": 1, "save_every": 1, "keep_last": 1}
    first = config(inputs, tmp_path, steps=6, **options)
    *_, end = run_ranks(_train_with_losses, 2, first, by_step)[0]
    assert end == (6, "", 3, 3.0)

    def saved():
        return sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))

    assert saved() == ["step-00000003", "step-00000006"]
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["step"], best["eval_loss"]) == (3, 3.0)
    assert best["checkpoint"].endswith("checkpoints/step-00000003")
    more = dataclasses.replace(first, steps=7)
    assert run_ranks(_train_with_losses, 1, more, by_step)[0][2] == (7, "", 3, 3.0)
    assert saved() == ["step-00000003", "step-00000007"], "4.2 is no new best"
    last = dataclasses.replace(first, steps=10)
    assert run_ranks(_train_with_losses, 2, last, by_step)[0][2] == (10, "", 8, 2.0)
    assert saved() == ["step-00000008", "step-00000010"]


def test_early_stop_counts_on_after_a_resume(inputs, tmp_path):
    by_step = dict(enumerate([3.0, 4.0, 4.0, float("nan"), 4.0, 1.0], start=1))
    options = config(inputs, tmp_path, steps=2, eval_share=0.2, eval_every=1, early_stop=3)
    run_ranks(_train_with_losses, 1, options, by_step)
    more = dataclasses.replace(options, steps=6)
    losses, _, end = run_ranks(_train_with_losses, 2, more, by_step)[0]
    reason = "3 evaluations without a better loss than 3.0000 of step 1"
    assert end == (4, reason, 1, 3.0) and [step for step, *_ in losses] == [3, 4]
    losses, _, end = run_ranks(_train_with_losses, 2, more, by_step)[0]
    assert end == (4, reason, 1, 3.0) and not losses, "a run that stopped stays stopped"
    patient = dataclasses.replace(more, early_stop=5)
    assert run_ranks(_train_with_losses, 2, patient, by_step)[0][2][:2] == (6, "")


def test_the_best_weights_are_exported(inputs, tmp_path):
    """After step 2, the best; and again after a resume that goes on to a worse loss."""
    by_step = {1: 5.0, 2: 3.0, 3: 4.0}
    folders = [tmp_path / name for name in ("at_best", "best", "last")]
    common = {"eval_share": 0.2, "eval_every": 1, "keep_last": 1, "min_lr_ratio": 1.0}
    for folder, steps, is_best in zip(folders, (2, 3, 4), (True, True, False), strict=True):
        by_step[steps + 1] = 4.0
        options = config(inputs, tmp_path / "run", steps=steps, **common)
        options = dataclasses.replace(options, export_hf=str(folder), export_best=is_best)
        run_ranks(_train_with_losses, 2, options, by_step)
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]


def test_progress_and_its_state():
    progress = Progress()
    assert not progress.evaluated(1, float("nan")) and progress.num_worse == 1
    assert progress.evaluated(2, 3.0) and not progress.evaluated(3, 3.0)
    assert (progress.best_step, progress.num_worse) == (2, 1)
    run = SimpleNamespace(data=SimpleNamespace(evaluation=None))
    assert evaluation_state(run, {}) == {}
    none = {"best_loss": None, "best_step": 0, "num_worse": 2}
    assert evaluation_state(run, {"evaluation": none}) == {"num_worse": 2}
    some = {"best_loss": 1.5, "best_step": 4, "num_worse": 2}
    assert evaluation_state(run, {"evaluation": some}) == some


def _train_with_a_failing_save(rank, world, options, by_step, fails_at):
    """The disk is full when step `fails_at` is saved."""
    import hdp.checkpoint.files as module

    write = module._Writer.write_data

    def full(self, *arguments):
        if self._final.name.endswith(f"{fails_at:08}"):
            raise OSError(28, "No space left on device")
        return write(self, *arguments)

    module._Writer.write_data = full
    return _train_with_losses(rank, world, options, by_step)


def test_a_best_checkpoint_that_fails_costs_neither_the_one_before_nor_the_export(inputs, tmp_path):
    by_step = {1: 5.0, 2: 4.0, 3: 4.5, 4: 3.0, 5: 3.5, 6: 3.4}
    common = {"eval_share": 0.2, "eval_every": 1, "save_every": 1, "keep_last": 1}
    export = {"export_hf": str(tmp_path / "out"), "export_best": True}
    options = config(inputs, tmp_path / "run", steps=6, **common, **export)
    *_, end = run_ranks(_train_with_a_failing_save, 2, options, by_step, 4)[0]
    assert end == (6, "", 4, 3.0)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == ["step-00000002", "step-00000006"]
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == 2
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 10_000
    # deleted by hand: the last weights are exported
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    again = dataclasses.replace(options, export_hf=str(tmp_path / "again"))
    run_ranks(_train_with_losses, 1, again, by_step)
    assert (tmp_path / "again" / "model.safetensors").stat().st_size > 10_000


def test_a_loss_on_other_evaluation_data_is_not_the_best_of_this(inputs, tmp_path):
    by_step = dict(enumerate([3.0, 9.0, 9.5, 8.0], start=1))
    for name in ("easy", "hard"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"{name} words " * 5}) + "\n")
    options = config(inputs, tmp_path / "run", steps=1, eval_every=1)
    easy = dataclasses.replace(options, eval_data=str(tmp_path / "easy.jsonl"))
    run_ranks(_train_with_losses, 1, easy, by_step)
    hard = dataclasses.replace(
        options, eval_data=str(tmp_path / "hard.jsonl"), steps=4, early_stop=3
    )
    assert run_ranks(_train_with_losses, 2, hard, by_step)[0][2] == (4, "", 4, 8.0)


def test_a_line_for_each_evaluation():
    evaluation = Evaluation(
        step=7, loss=2.0, perplexity=7.389, num_tokens=9, num_loss_tokens=8, num_seqs=2, seconds=0.5
    )
    assert evaluation.line() == (
        "eval at step 7  loss 2.0000  perplexity 7.39  8 labels of 2 sequences in 0.5 s"
    )


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, r"--eval-data \S+: the file is empty"),
        ([{"text": ""}], {}, r"--eval-data \S+: no documents in .*1 empty"),
        ([{"prose": "x"}], {}, r"--eval-data \S+: \S+ has no column 'text'.*\['prose'\]"),
        ([{"text": "a " * 900}], {}, r"--eval-data \S+: .* 2 ranks of 704 tokens hold 1,408"),
        ([{"text": "abcdef"}], {"eval_tokens": 3}, r"--eval-tokens 3: the shortest of the 1 seq"),
        (None, {}, r"--eval-data \S+: no such file"),
    ],
)
def test_bad_evaluation_data_is_an_error_before_training(inputs, tmp_path, rows, options, message):
    path = tmp_path / "eval.jsonl"
    if rows is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = config(inputs, tmp_path / "run", eval_data=str(path), **options)
    with pytest.raises(RankError, match=message):
        run_ranks(_train, 2, run)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_data": "x", "eval_share": 0.1}, "give only one"),
        ({"eval_share": 1.0}, "--eval-share must be at least 0 and below 1, got 1.0"),
        ({"eval_share": -0.1}, "--eval-share must be at least 0"),
        ({"early_stop": 2}, "--early-stop 2 requires --eval-every"),
        ({"eval_every": 5, "eval_share": 0.0}, "give --eval-data, or a share"),
        ({"eval_tokens": 5}, "--eval-tokens 5 without evaluation"),
        ({"eval_tokens": 0, "eval_every": 1}, "--eval-tokens must be 1 or more"),
        ({"export_best": True}, "--export-best requires --export-hf and evaluation"),
        ({"export_best": True, "export_hf": "x"}, "--export-best requires"),
        ({"eval_split": "test"}, "--eval-split test without --eval-data"),
        ({"eval_every": -1}, "--eval-every must be 0 or more"),
    ],
)
def test_bad_flags(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_split_and_subset_are_about_the_training_data(tmp_path):
    for name in ("d/val.jsonl", "d/train.jsonl", "rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name * 9}) + "\n")
    options = {"tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")}
    options |= {"data": str(tmp_path / "d"), "split": "val", "batch_tokens": 128}
    evaluated = TrainConfig(**options, eval_data=str(tmp_path / "rows.jsonl"))
    assert len(open_run_data(evaluated).evaluation) == 1
    asked = dataclasses.replace(evaluated, eval_split="dev")
    with pytest.raises(ValueError, match=r"split 'dev' \(--eval-split\) does not apply"):
        open_run_data(asked)
    with pytest.raises(ValueError, match=r"no split 'test'.*split \(--eval-split\)"):
        open_run_data(dataclasses.replace(asked, eval_data=options["data"], eval_split="test"))
    one_file = dataclasses.replace(evaluated, data=evaluated.eval_data, split="train", subset="no")
    with pytest.raises(ValueError, match=r"subset 'no' \(--subset\)"):
        open_run_data(one_file)


def test_a_share_is_held_out_where_no_data_is_given():
    assert TrainConfig().held_out_share == 0
    assert TrainConfig(eval_every=5).held_out_share == 0.01
    assert TrainConfig(eval_every=5, eval_data="x").held_out_share == 0
    assert TrainConfig(eval_share=0.2).held_out_share == 0.2


def test_shared_rows_are_reported(inputs, tmp_path):
    (tmp_path / "eval").mkdir()
    for i in (3, 4):
        text = (inputs / "text" / f"{i:03}.txt").read_text()
        (tmp_path / "eval" / f"{i}.txt").write_text(text)
    (tmp_path / "eval" / "own.txt").write_text("a text of its own")
    run = config(inputs, tmp_path / "run", steps=1, eval_data=str(tmp_path / "eval"))
    said = run_ranks(train_and_listen, 1, run)[0]
    assert "2 of the 3 evaluation sequences are also in the training data" in said
