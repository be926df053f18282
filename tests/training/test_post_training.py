"""Whole runs on pairs: DPO, IPO, RPO and reward models, with and without LoRA."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.run_ranks import RankError, run_ranks
from tests.training.runs import config, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = write_inputs(tmp_path_factory.mktemp("inputs"))
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(120):
        digits = rng.integers(0, 10, int(rng.choice([3, 8, 60]))).astype(str)
        good = "".join(sorted(digits))
        rows.append({"prompt": "".join(digits) + ">", "chosen": good, "rejected": good[::-1]})
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    rows.append({"prompt": "11>", "chosen": "11", "rejected": "11"})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _options(inputs, run_dir, **options):
    defaults = {
        "data": str(inputs / "pairs.jsonl"),
        "steps": 12,
        "lr": 3e-3,
        "schedule": "constant",
    }
    return config(inputs, run_dir, **{**defaults, **options})


def _train(rank, world, options):
    from hdp.training.loop import train

    return [(m.loss, m.objective, m.rings, m.line(12)) for m in train(options)]


@pytest.mark.parametrize("objective", ["dpo", "ipo", "rpo", "reward"])
def test_pairs_train_alike_on_any_number_of_ranks(objective, inputs, tmp_path):
    results = {}
    for world, tokens in ((1, 704), (2, 150)):
        options = _options(
            inputs, tmp_path / str(world), objective=objective, max_tokens_per_rank=tokens
        )
        results[world] = run_ranks(_train, world, options)[0]
    one, two = results[1], results[2]
    losses = np.array([row[0] for row in one])
    np.testing.assert_allclose([row[0] for row in two], losses, rtol=1e-3)
    assert any(max(row[2]) == 2 for row in two), "no pair was on a ring"
    if objective == "dpo":  # at first, the policy is the reference
        assert losses[0] == pytest.approx(np.log(2), rel=1e-6)
    assert losses[-1] < losses[0]
    assert one[-1][1]["accuracy"] > 0.8 and one[-1][1]["margin"] > 0
    assert "  accuracy " in one[-1][3] and "  margin " in one[-1][3]


def test_kto_on_labels_and_on_pairs(inputs, tmp_path):
    """On 1 and 2 ranks, with and without adapters: the margin grows."""
    rows = []
    for line in (inputs / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({"prompt": row["prompt"], "completion": row["chosen"], "label": True})
        rows.append({"prompt": row["prompt"], "completion": row["rejected"], "label": False})
    (inputs / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = []
    for i, (world, tokens, data) in enumerate(
        [(1, 704, "labels"), (2, 150, "labels"), (1, 704, "pairs")]
    ):
        options = _options(
            inputs,
            tmp_path / str(i),
            objective="kto",
            data=str(inputs / f"{data}.jsonl"),
            max_tokens_per_rank=tokens,
        )
        rows = run_ranks(_train, world, options)[0]
        losses.append([row[0] for row in rows])
        assert losses[-1][0] == pytest.approx(0.5, rel=1e-5)  # 1 - sigmoid(0)
        assert rows[-1][1]["margin"] > 0.05 and rows[-1][1]["kl"] >= 0.0
        assert "  margin " in rows[-1][3] and "  kl " in rows[-1][3]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_lora_needs_no_copy_and_exports_both_ways(inputs, tmp_path):
    """Resumed on another number of ranks; adapter and merged export compute the same."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    exports = {"export_hf": str(tmp_path / "hf"), "export_adapter": str(tmp_path / "adapter")}
    base = {"objective": "dpo", "lora_rank": 4, "steps": 6}
    run_ranks(_train, 2, _options(inputs, tmp_path / "run", **{**base, "steps": 3}))
    resumed = run_ranks(_train, 1, _options(inputs, tmp_path / "run", **base, **exports))[0]
    straight = run_ranks(_train, 1, _options(inputs, tmp_path / "other", **base))[0]
    np.testing.assert_allclose(
        [row[0] for row in resumed], [row[0] for row in straight[3:]], rtol=1e-4
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    torch.manual_seed(0)
    from hdp.models.loading import build_model

    start = build_model(str(inputs / "model"), seed=0)
    plain = AutoModelForCausalLM.from_config(start.config, attn_implementation="sdpa")
    plain.load_state_dict(start.model.state_dict())
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    ids = torch.arange(30)[None] + 40
    got, want = merged(input_ids=ids).logits, adapted(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(input_ids=ids).logits, want, atol=1e-4)


def test_a_reward_model_loads_as_a_classifier(inputs, tmp_path):
    from transformers import AutoModelForSequenceClassification

    options = _options(
        inputs, tmp_path / "run", objective="reward", steps=30, export_hf=str(tmp_path / "rm")
    )
    assert run_ranks(_train, 1, options)[0][-1][1]["accuracy"] > 0.8
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    scores = []
    for answer in ("12345678", "87654321"):
        ids = torch.tensor([[*f"38251476>{answer}".encode()]])
        scores.append(model(input_ids=ids).logits.item())
    assert scores[0] > scores[1]


def test_what_is_refused(inputs, tmp_path):
    for options, message in [
        ({"beta": 0.0}, "--beta must be above 0, got 0.0"),
        ({"objective": "dpo", "data": "stdlib"}, "needs answers to compare"),
        ({"objective": "dpo", "data": ("a", "b")}, "takes one data set, not 2"),
        ({"objective": "kto", "eval_every": 5}, "--eval-every 5 is for --objective sft"),
        ({"objective": "dpo", "overlong": "split", "max_length": 100}, "parts of answers"),
        ({"export_adapter": "x"}, "requires --lora-rank"),
        ({"lora_rank": 2, "export_adapter": "x", "export_hf": "x"}, "choose two folders"),
        ({"lora_rank": -1}, "--lora-rank must be 0 or more"),
        ({"lora_rank": 4, "offload_gib": 1.0}, "cannot be combined with --lora-rank"),
    ]:
        with pytest.raises(ValueError, match=message):
            _options(inputs, tmp_path, **options)
    strict = _options(inputs, tmp_path, objective="dpo", strict=True)
    with pytest.raises(RankError, match="a pair of equal answers"):
        run_ranks(_train, 1, strict)
    pytest.importorskip("peft")
    text = {"data": str(inputs / "text"), "lora_rank": 2, "lora_targets": "c_attn"}
    wrong = _options(inputs, tmp_path, **text)
    with pytest.raises(RankError, match="are not linear layers"):
        run_ranks(_train, 1, wrong)


def test_dry_run_plans_pairs(inputs, tmp_path, capsys):
    from hdp.training.loop import train

    train(_options(inputs, tmp_path, objective="dpo", dry_run=True, hdp_size=2))
    told = capsys.readouterr().err
    assert "pairs of" in told and "rows skipped (a pair of equal answers): 1" in told
    assert "first batch:" in told
