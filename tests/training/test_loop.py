"""Whole runs: the same batches and losses on any number of ranks, with or without a resume."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from hdp.config import TrainConfig
from hdp.report.files import RunFiles
from hdp.report.page import page
from hdp.scheduler import CostModel
from tests.run_ranks import RankError, run_ranks
from tests.training.runs import MODEL, config, train_and_listen, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of long-tailed text files and a model's config."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def _train(rank, world, options):
    from hdp.training.loop import train

    metrics = train(options)
    return [(m.step, m.loss, m.num_seqs, m.num_loss_tokens, m.rings, m) for m in metrics]


def _losses(rows):
    return np.array([loss for _, loss, *_ in rows])


def test_losses_do_not_depend_on_the_world_size_or_the_policy(inputs, tmp_path):
    """30 steps in fp32 on 1, 2 and 4 ranks, hdp and static: same batches, losses to 1e-4."""
    runs = {
        "1 rank": (1, {}),
        "2 ranks": (2, {"max_tokens_per_rank": 352}),
        "4 ranks": (4, {"max_tokens_per_rank": 176}),
        "4 ranks, static": (
            4,
            {"policy": "static", "cp_size": 4, "max_tokens_per_rank": 176},
        ),
        "2 ranks, checkpointing": (
            2,
            {"max_tokens_per_rank": 400, "activation_checkpointing": True},
        ),
    }
    results = {}
    for i, (name, (world, options)) in enumerate(runs.items()):
        by_rank = run_ranks(_train, world, config(inputs, tmp_path / str(i), **options))
        for rows in by_rank:
            assert [row[:5] for row in rows] == [row[:5] for row in by_rank[0]]
        results[name] = by_rank[0]
    one = results["1 rank"]
    assert len(one) == 30
    assert _losses(one)[-5:].mean() < _losses(one)[:5].mean() - 0.5, "the model does not learn"
    for name, rows in results.items():
        assert [row[2:4] for row in rows] == [row[2:4] for row in one], f"{name}: different batches"
        np.testing.assert_allclose(_losses(rows), _losses(one), rtol=1e-4, err_msg=name)
    # the runs really did split the batches differently
    assert set(results["1 rank"][0][4]) == {1}
    assert any(max(row[4]) == 4 and min(row[4]) < 4 for row in results["4 ranks"])
    assert all(set(row[4]) == {4} for row in results["4 ranks, static"])
    # docs/math.md: bytes that a ring of 4 sends, in fp32, for 2 layers with 2 KV heads of size 8
    for *_, metrics in results["4 ranks, static"]:
        per_token = 2 * 2 * 2 * 8 * ((2 * 4 - 2) * 4 + 4 * 4)
        whole = metrics.num_tokens * per_token  # gathered sequences send less
        assert 0.6 * whole < metrics.bytes_sent <= whole
    assert all(row[5].bytes_sent == 0 for row in one)


def test_offload_trains_longer_sequences_on_the_same_ranks(inputs, tmp_path):
    """2 ranks hold 2 x 200 tokens; with host memory they hold the longest document, 539."""
    options = {
        "config_overrides": '{"num_hidden_layers": 4}',
        "batch_tokens": 2000,
        "steps": 4,
    }
    kept = config(inputs, tmp_path / "kept", max_tokens_per_rank=704, **options)
    sent = dataclasses.replace(
        kept, max_tokens_per_rank=200, offload_gib=0.0625, run_dir=str(tmp_path / "sent")
    )
    without = dataclasses.replace(sent, offload_gib=0.0, run_dir=str(tmp_path / "without"))
    with pytest.raises(RankError, match=r"tokens, but 2 ranks of 200 tokens hold 400"):
        run_ranks(_train, 2, without)
    want, got = (run_ranks(_train, 2, options)[0] for options in (kept, sent))
    np.testing.assert_allclose(_losses(got), _losses(want), rtol=1e-5)
    assert all(row[5].host_bytes == 0 for row in want)
    assert got[-1][5].host_bytes > 0
    assert "  host " in got[-1][5].line(4)


def test_resume_on_another_number_of_ranks_continues_the_run(inputs, tmp_path):
    whole = run_ranks(_train, 2, config(inputs, tmp_path / "whole", steps=12))[0]
    part = config(inputs, tmp_path / "part", steps=12, save_every=5, keep_last=1)
    # a schedule of 12 steps, stopped after 7 as by a time limit, with step 5 saved
    first = run_ranks(_train_until, 2, part, 7)[0]
    second = run_ranks(_train, 3, part)[0]
    assert [row[0] for row in first] == [*range(1, 8)]
    assert [row[0] for row in second] == [*range(6, 13)]
    np.testing.assert_allclose(_losses(second), _losses(whole)[5:], rtol=1e-4)
    assert [row[2:4] for row in second] == [row[2:4] for row in whole[5:]]
    assert [row[5].total_tokens for row in second] == [row[5].total_tokens for row in whole[5:]]
    saved = [path.name for path in (tmp_path / "part" / "checkpoints").iterdir() if path.is_dir()]
    assert len(saved) == 1
    # a finished run does nothing more
    assert "all 12 steps are done: raise --steps" in run_ranks(train_and_listen, 1, part)[0]


def _train_until(rank, world, options, last):
    """Leave the loop after step `last`, with background work done, as at a job's time limit."""
    import hdp.training.loop as module

    steps = module._steps

    def until_last(run, checkpointer, *rest):
        rows = []
        for metrics in steps(run, checkpointer, *rest):
            rows.append(metrics)
            if metrics.step == last:
                break
        return rows

    module._steps = until_last
    return _train(rank, world, options)


def test_export_is_what_from_pretrained_loads(inputs, tmp_path):
    out = tmp_path / "exported"
    whole = {"batch_tokens": 10_000, "lr": 3e-2}  # every step sees all documents
    options = config(inputs, tmp_path / "run", steps=3, export_hf=str(out), **whole)
    trained = run_ranks(_train, 2, options)[0]
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("alpha beta gamma", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    # training can continue from it: its first loss is that of the run's next step
    further = dataclasses.replace(options, steps=4, export_hf=None)
    fresh = {"model": str(out), "random_init": False, "steps": 1}
    again = config(inputs, tmp_path / "again", **fresh, **whole)
    want, got = (run_ranks(_train, 2, run)[0][0] for run in (further, again))
    assert (want[0], got[0]) == (4, 1) and got[2:4] == want[2:4] == trained[0][2:4]
    assert got[1] == pytest.approx(want[1], rel=1e-3)  # exported in bf16
    assert trained[-1][1] > want[1] + 0.1, "an outdated export would also pass"


def test_export_into_the_run_folder_is_refused_before_training(inputs, tmp_path):
    options = config(inputs, tmp_path, steps=1)
    run_ranks(_train, 1, options)
    before = sorted(path.name for path in tmp_path.iterdir())
    into = config(inputs, tmp_path, steps=2, export_hf=str(tmp_path))
    with pytest.raises(RankError, match=r"holds files that no export wrote \(checkpoints, config"):
        run_ranks(_train, 2, into)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_failed_last_save_does_not_lose_the_export(inputs, tmp_path):
    options = config(inputs, tmp_path / "run", steps=2, export_hf=str(tmp_path / "out"))
    with pytest.raises(RankError, match=r"CheckpointError: saving .* failed"):
        run_ranks(_train_without_space, 1, options)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 10_000


def _train_without_space(rank, world, options):
    import hdp.checkpoint.files as module

    def full(*_):
        raise OSError(28, "No space left on device")

    module._Writer.write_data = full
    return _train(rank, world, options)


def _train_on_a_full_disk(rank, world, options):
    """As torch's archive writer reports it."""
    import hdp.checkpoint.files as module

    def full(*_):
        raise RuntimeError(
            "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file "
            "data/0: file write failed"
        )

    module._Writer.write_data = full
    return _train(rank, world, options)


def test_a_full_disk_is_called_that(inputs, tmp_path):
    options = config(inputs, tmp_path / "run", steps=2)
    with pytest.raises(
        RankError, match=r"failed on rank 0: the disk took no more data: it is full"
    ):
        run_ranks(_train_on_a_full_disk, 1, options)


def test_a_document_that_no_ring_can_hold_is_an_error_with_a_remedy(inputs, tmp_path):
    with pytest.raises(RankError, match=r"2 ranks of 100 tokens hold 200 .*--max-length 200"):
        run_ranks(_train, 2, config(inputs, tmp_path, max_tokens_per_rank=100))


def test_static_rings_that_cannot_hold_a_document_are_refused_before_training(inputs, tmp_path):
    """The longest document, 700 tokens, may only come up hours into the run."""
    options = {"policy": "static", "cp_size": 1, "max_tokens_per_rank": 400, "batch_tokens": 100}
    with pytest.raises(RankError, match=r"needs 2 ranks of 400, cp_size=1; raise cp_size to 2"):
        run_ranks(_train, 2, config(inputs, tmp_path, steps=1, **options))
    assert not (tmp_path / "metrics.jsonl").exists()


def _train_unlike_rank_0(rank, world, options, change):
    return _train(rank, world, dataclasses.replace(options, **change if rank else {}))


def test_ranks_with_other_options_are_named_before_training(inputs, tmp_path):
    """Otherwise each rank would silently update its shards with its own learning rate."""
    same = config(inputs, tmp_path, steps=1)
    with pytest.raises(RankError, match=r"lr is 0\.5 here and 0\.01 on rank 0.*found by rank 1"):
        run_ranks(_train_unlike_rank_0, 3, same, {"lr": 0.5})
    # paths may differ: each node has its own cache
    other = {"cache_dir": str(tmp_path / "cache")}
    assert len(run_ranks(_train_unlike_rank_0, 2, same, other)[0]) == 1


def _train_on_own_data(rank, world, options, folders, export):
    extra = {"data": folders[rank], "export_hf": export if rank == 0 else None}
    return _train(rank, world, dataclasses.replace(options, **extra))


def test_ranks_with_other_texts_of_the_same_lengths_stop_before_training(inputs, tmp_path):
    """Rings would run over halves of two texts."""
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    for folder in folders:
        shutil.copytree(inputs / "text", folder)
    options = config(inputs, tmp_path / "run", steps=1)
    assert run_ranks(_train_on_own_data, 2, options, folders, None), "copies are fine"
    options = dataclasses.replace(options, run_dir=str(tmp_path / "other"))
    path = next(iter((tmp_path / "b").iterdir()))
    path.write_text(path.read_text().swapcase())
    with pytest.raises(RankError, match="ranks read different data: checksum of the tokens is"):
        run_ranks(_train_on_own_data, 2, options, folders, None)


def test_an_export_on_some_nodes_only_is_refused(inputs, tmp_path):
    """It would wait for ranks that never come."""
    folders = [str(inputs / "text")] * 2
    options = config(inputs, tmp_path / "run", steps=1)
    with pytest.raises(RankError, match="whether export_hf is given is False here and True on"):
        run_ranks(_train_on_own_data, 2, options, folders, str(tmp_path / "out"))


def test_data_changes_that_keep_lengths_are_reported(inputs, tmp_path):
    """The sampler only knows lengths, so it would not notice other text of the same length."""
    shutil.copytree(inputs / "text", tmp_path / "text")
    options = config(inputs, tmp_path / "run", steps=1, data=str(tmp_path / "text"))
    run_ranks(_train, 1, options)
    again = dataclasses.replace(options, steps=2)
    assert "changed since this checkpoint" not in run_ranks(train_and_listen, 1, again)[0]
    path = next(iter((tmp_path / "text").iterdir()))
    path.write_text(path.read_text().swapcase())
    again = dataclasses.replace(options, steps=3)
    expected = "changed since this checkpoint, but sequence lengths match"
    assert expected in run_ranks(train_and_listen, 1, again)[0]


def _train_with_own_cost(rank, world, options, costs):
    return _train(rank, world, dataclasses.replace(options, cost=costs[rank]))


def test_nodes_with_other_cost_files_stop_before_the_first_step(inputs, tmp_path):
    """They would plan different rings, or run different algorithms on the same ones, and hang."""
    cost = CostModel.from_coefficients(quadratic_s=1e-8, linear_s=1e-5, ring_step_s=1e-3)
    paths = [str(tmp_path / f"{rank}.json") for rank in range(4)]
    for rank, path in enumerate(paths):
        dataclasses.replace(cost, ring_step_s=1e-4 if rank == 2 else 1e-3).save(path)
    options = config(inputs, tmp_path / "run", max_tokens_per_rank=176)
    with pytest.raises(RankError, match=r"ring_step_s is 0\.0001 here and 0\.001 on") as info:
        run_ranks(_train_with_own_cost, 4, options, paths)
    assert len(info.value.ranks) == 4 and "(found by rank 2)" in str(info.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_more_tokens_than_positions_are_reported(inputs, tmp_path):
    """RoPE is defined at any position, but the model was never trained that far out."""
    plain = run_ranks(train_and_listen, 1, config(inputs, tmp_path / "plain", steps=1))[0]
    assert "max_position_embeddings" not in plain
    options = {"config_overrides": '{"max_position_embeddings": 64}', "steps": 1}
    said = run_ranks(train_and_listen, 1, config(inputs, tmp_path / "short", **options))[0]
    expected = r"longest sequence has \d+ tokens but the model was built for 64 "
    assert re.search(expected, said), said


def test_trace_step_writes_planned_and_measured(inputs, tmp_path):
    run_ranks(_train, 2, config(inputs, tmp_path, steps=2, trace_step=2))
    events = json.loads((tmp_path / "timeline_2.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert len(names) == 2
    assert any("measured" in name for name in names)
    assert (tmp_path / "timeline_2.png").stat().st_size > 10_000
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    measured = next(p for p in events if p["name"] == "process_name" and "meas" in str(p["args"]))
    spans = [e for e in events if e.get("ph") == "X" and e["pid"] == measured["pid"]]
    busy = sum(e["dur"] for e in spans if e["cat"] == "compute")
    end = max(e["ts"] + e["dur"] for e in spans)
    assert rows[1]["bubble"] == pytest.approx(1 - busy / (2 * end), abs=0.01)
    assert json.loads((tmp_path / "config.json").read_text())["trace_step"] == 2
    found = RunFiles.read(tmp_path)  # what `hdp report` shows
    assert not found.problems and [trace.step for trace in found.traces] == [2]
    trace, idle = found.traces[0], rows[1]["idle"]
    assert trace.measured.bubble.tolist() == pytest.approx(idle, abs=0.01) and len(idle) == 2
    assert trace.plan.seqlens.sum() == rows[1]["num_tokens"]
    assert len(trace.seq_ids) == rows[1]["num_seqs"]
    assert len(trace.names) == rows[1]["num_seqs"] and trace.names[0].endswith(".txt")
    assert "Plan of step 2" in page(found)


def test_a_step_that_is_never_reached_cannot_be_traced(inputs, tmp_path):
    said = run_ranks(train_and_listen, 1, config(inputs, tmp_path, steps=2, trace_step=50))[0]
    assert "--trace-step 50: this run trains steps 1 to 2, so nothing will be traced" in said


def test_a_trace_that_cannot_be_written_does_not_end_the_run(inputs, tmp_path):
    (tmp_path / "timeline_1.json").mkdir()
    rows = run_ranks(_train, 1, config(inputs, tmp_path, steps=2, trace_step=1))[0]
    assert [row[0] for row in rows] == [1, 2]


def _train_without_matplotlib(rank, world, options):
    import sys

    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    return train_and_listen(rank, world, options)


def test_a_trace_without_matplotlib_lacks_only_the_picture(inputs, tmp_path):
    options = config(inputs, tmp_path, steps=2, trace_step=1)
    said = run_ranks(_train_without_matplotlib, 1, options)[0]
    assert "drawing needs matplotlib: pip install matplotlib; training continues" in said
    assert "step 2/2" in said and not (tmp_path / "timeline_1.png").exists()
    assert (tmp_path / "timeline_1.json").exists() and RunFiles.read(tmp_path).traces


def test_mfu_is_work_over_time_ranks_and_peak(inputs, tmp_path):
    """By hand, except attention: at these lengths, under a seventh of this model's work."""
    options = {"steps": 1, "max_length": 60, "overlong": "truncate", "peak_tflops": 0.1}
    *_, row = run_ranks(_train, 2, config(inputs, tmp_path, **options))[0][0]
    size = MODEL["hidden_size"]
    kv_size = size // MODEL["num_attention_heads"] * MODEL["num_key_value_heads"]
    attention = 2 * size * (size + kv_size)  # q and output, k and v
    layers = MODEL["num_hidden_layers"] * (attention + 3 * size * MODEL["intermediate_size"])
    flops = 6 * (layers * row.num_tokens + MODEL["vocab_size"] * size * row.num_loss_tokens)
    ratio = row.mfu * row.step_s * 2 * 1e11 / flops
    assert 1.0 < ratio < 1.15, f"mfu counts {ratio:.2f} of the matmuls' work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps must be 1 or more, got 0"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"peak_tflops": 0.0}, "--peak-tflops must be above 0"),
        ({"policy": "static"}, "--policy static requires --cp-size"),
        ({"cp_size": 2}, "--policy static requires --cp-size"),
        ({"overlong": "drop"}, "--max-length"),
        ({"min_lr_ratio": 2.0}, "in \\[0, 1\\]"),
        (
            {"config_overrides": "sliding_window=null"},
            'is not valid JSON .*write it like \'{"sliding_window"',
        ),
        ({"config_overrides": "[1]"}, "must be a JSON object"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
