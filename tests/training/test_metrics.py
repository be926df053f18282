"""The step line, the metrics file, and the numbers in them."""

from __future__ import annotations

import dataclasses
import json
from io import FileIO
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hdp.scheduler import CostModel, StepPlan, plan
from hdp.training.metrics import (
    MetricsWriter,
    ModelFlops,
    StepMetrics,
    blocks,
    peak_flops,
    ring_counts,
)
from hdp.training.observe import count_flops, planned_bubble
from tests.tiny_models import plain_model, tiny_model

METRICS = StepMetrics(
    step=120,
    loss=2.34171,
    grad_norm=0.874,
    lr=3e-4,
    num_tokens=350_571,
    num_loss_tokens=350_000,
    num_seqs=422,
    total_tokens=42_000_000,
    hdp_size=8,
    step_s=3.912,
    tokens_per_s_per_rank=11_203.7,
    mfu=0.4132,
    bubble=0.0211,
    planned_bubble=0.018,
    planned_s=3.8,
    bytes_sent=123,
    mem_bytes=int(61.2 * 2**30),
    host_bytes=0,
    data_wait_s=0.0,
    rings={1: 412, 2: 9, 8: 1},
)


def test_step_line_is_the_documented_one():
    assert METRICS.line(2000) == (
        "step 120/2000  loss 2.3417  grad 0.87  lr 3.0e-4  tok/s/rank 11,204  mfu 41.3%  "
        "bubble 2.1% (plan 1.8%)  rings 1x412 2x9 8x1  mem 61.2 GiB  dt 3.91 s"
    )


def test_step_line_leaves_out_what_is_not_known():
    line = dataclasses.replace(METRICS, mfu=None).line(2000)
    assert "mfu" not in line
    assert "tok/s/rank 11,204  bubble" in line


def test_step_line_marks_a_bubble_of_shared_cores_and_tells_the_time_left():
    line = dataclasses.replace(METRICS, shared_cores=True).line(2000, eta_s=7500)
    assert "bubble 2.1%* (plan 1.8%)" in line and line.endswith("dt 3.91 s  eta 2 h 5 min")


@pytest.mark.parametrize(("ranks", "values"), [(1, 1), (64, 64), (65, 33), (1000, 63)])
def test_idle_shares_are_at_most_64_numbers(ranks, values):
    """With more ranks, means of blocks of ceil(ranks / 64) consecutive ranks."""
    shares = [rank / ranks for rank in range(ranks)]
    found = blocks(shares)
    size = -(-ranks // 64)
    assert len(found) == values == -(-ranks // size)
    means = [sum(part) / len(part) for part in (shares[:size], shares[(values - 1) * size :])]
    assert [found[0], found[-1]] == pytest.approx(means, abs=5e-4)
    assert blocks([]) == ()


def test_other_values_get_rows_of_their_own(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(dataclasses.replace(METRICS, step=2))
        writer.log(2, {"eval_loss": 1.7, "eval_loss_tokens": 10})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] == {"step": 2, "eval_loss": 1.7, "eval_loss_tokens": 10}


def test_writer_appends_and_tensorboard_reads_back(tmp_path):
    for step in (1, 2):
        with MetricsWriter(tmp_path, tensorboard=True, first_step=step) as writer:
            writer.write(dataclasses.replace(METRICS, step=step))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["rings"] == {"1": 412, "2": 9, "8": 1}
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2]


def test_steps_that_a_resume_trains_again_are_in_the_file_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write(dataclasses.replace(METRICS, step=step, loss=1.0))
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    with MetricsWriter(tmp_path, tensorboard=False, first_step=3) as writer:
        writer.write(dataclasses.replace(METRICS, step=3, loss=2.0))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_bad_byte_does_not_keep_a_run_from_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2):
            writer.write(dataclasses.replace(METRICS, step=step))
    damaged = path.read_bytes().replace(b'"step": 1', b'"st\xffp": 1')
    path.write_bytes(damaged)
    said: list[str] = []
    with MetricsWriter(tmp_path, tensorboard=False, first_step=3, say=said.append) as writer:
        writer.write(dataclasses.replace(METRICS, step=3))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 3]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert len(said) == 1 and "metrics.jsonl.damaged" in said[0]


def test_full_disk_loses_no_row(tmp_path, monkeypatch):
    """A partial write, a failed one, then room again: all rows are complete, and it is reported."""
    said = []
    full = OSError(28, "No space left on device")
    room = [10, full, 0, None]  # bytes that the next writes accept; None: all

    class Disk(FileIO):
        def write(self, data):
            most = room.pop(0) if room else None
            if isinstance(most, OSError):
                raise most
            return super().write(data[:most])

    monkeypatch.setattr("hdp.training.metrics.FileIO", Disk)
    with MetricsWriter(tmp_path, tensorboard=False, say=said.append) as writer:
        for step in (1, 2, 3):
            writer.write(dataclasses.replace(METRICS, step=step))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert len(said) == 1 and "No space left on device; will retry at each" in said[0]
    room[:] = [full] * 3
    with MetricsWriter(tmp_path, tensorboard=False, first_step=4, say=said.append) as writer:
        writer.write(dataclasses.replace(METRICS, step=4))
        writer.write(dataclasses.replace(METRICS, step=5))
    assert said[2].endswith("metrics.jsonl is missing the last 2 rows")
    # TensorBoard's writer re-raises errors of its thread
    monkeypatch.setattr(
        "hdp.training.boards.TensorBoard.scalars", lambda *_: (_ for _ in ()).throw(full)
    )
    with MetricsWriter(tmp_path, tensorboard=True, first_step=4, say=said.append) as writer:
        writer.write(dataclasses.replace(METRICS, step=4))
        writer.write(dataclasses.replace(METRICS, step=5))
    assert len(said) == 4 and "TensorBoard logging stopped for the rest of this run" in said[3]


def test_disabled_writer_writes_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", tensorboard=True, enabled=False) as writer:
        writer.write(METRICS)
    assert not (tmp_path / "run").exists()


def test_model_flops_by_hand():
    # one layer of width 8 with 100 weights; a head of 7; sequences of 3 and 5 tokens, 6 labels
    flops = ModelFlops(num_params=100, head_params=7, num_layers=1, attention_width=8)
    assert flops.of([3, 5], 6) == 6 * (100 * 8 + 7 * 6) + 6 * 8 * (9 + 25)


@pytest.mark.parametrize(("model_type", "tied"), [("llama", False), ("qwen3", True)])
def test_flops_are_those_that_torch_counts(model_type, tied):
    """torch counts the plain model with dense attention, so we subtract the masked half. The 1%
    tolerance is for norms and biases, which we count as matmuls."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
    model = tiny_model(
        model_type, dtype=torch.float32, tie_word_embeddings=tied, num_hidden_layers=3, **shape
    )
    counts = count_flops(model)
    plain = plain_model(model, "eager")
    for seqlen in (100, 400):
        input_ids = torch.arange(seqlen)[None] % 50
        with FlopCounterMode(display=False) as counter:
            plain(input_ids=input_ids, use_cache=False).logits.sum().backward()
        masked = 6 * counts.num_layers * counts.attention_width * seqlen**2
        want = counter.get_total_flops() - masked
        assert counts.of([seqlen], seqlen) == pytest.approx(want, rel=0.01)
        # Attention is a large enough part that a factor of 2 in it would show.
        assert masked > 0.03 * want


def test_peak_flops_takes_the_longest_name_in_whole_words():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H20-3e") == 148e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA RTX A1000 Laptop GPU") is None
    assert peak_flops("Somebody's abacus") is None


def test_ring_counts():
    plan = StepPlan.from_lists(
        [4, 1, 1], [[0, 1], [0], [1]], [[[0, 1]], [[0, 2]]], max_tokens_per_rank=8
    )
    assert ring_counts(plan) == {1: 2, 2: 1}


def test_a_full_plan_has_no_negative_bubble():
    """Sums of parts may exceed the whole in the last bit, but never print as "plan -0.0%"."""
    cost = CostModel.from_coefficients(quadratic_s=0.1, linear_s=0.1)
    for num_seqs in range(40, 70):
        lengths = [7 * i % 97 + 1 for i in range(num_seqs)]
        full_plan = plan(lengths, hdp_size=1, max_tokens_per_rank=200, cost=cost)
        bubble = planned_bubble(full_plan, SimpleNamespace(cost=cost))
        assert f"{bubble:.1%}" == "0.0%"
