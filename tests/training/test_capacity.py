"""--max-tokens-per-rank auto: the estimate holds against the bytes that torch allocates."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hdp.attention.layout import RingLayout
from hdp.config import DEMO_MODEL, TrainConfig
from hdp.data.pack import PackedBatch
from hdp.distributed.fsdp import set_microbatch, shard, unshard_all
from hdp.distributed.mesh import HDPMesh
from hdp.models.loading import build_model
from hdp.profile.model import counting_saved
from hdp.scheduler.costs.memory import RankMemory, rank_memory
from hdp.training.capacity import CPU_TOKENS, facts_of, memory_of, tokens_that_fit
from hdp.training.optim import build_optimizer
from tests.run_ranks import RankError, run_ranks
from tests.training.runs import MODEL, config, write_inputs

MODELS = {
    "llama": {**DEMO_MODEL, "vocab_size": 4096},
    "qwen3": {
        **{name: value for name, value in MODEL.items() if name != "architectures"},
        **{"model_type": "qwen3", "hidden_size": 128, "intermediate_size": 384},
        **{"num_hidden_layers": 6, "head_dim": 32, "vocab_size": 1000},
    },
}
TOKENS = 1024
# What the estimate may be, as a multiple of the bytes counted. Too small is an out-of-memory error;
# too large wastes memory.
SAVED, TOTAL = (0.9, 1.15), (1.0, 2.2)


def _peak_bytes(record: profile) -> int:
    """The most bytes that were allocated at once, above those at the start."""
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def _count(rank, world, name, checkpointing, dtype):
    """(the estimate, bytes saved by forward, peak bytes of a step of two microbatches)."""
    with HDPMesh.create(device="cpu") as mesh:
        model = build_model(MODELS[name])
        facts = facts_of(model)
        compute = {"dtype": dtype, "activation_checkpointing": checkpointing}
        options = TrainConfig(**compute)
        memory = memory_of(options, facts, ranks=world, device=mesh.device)
        shard(
            model,
            mesh.device_mesh,
            param_dtype=torch.bfloat16 if dtype == "bf16" else None,
            activation_checkpointing=checkpointing,
        )
        optimizer = build_optimizer(model, lr=1e-3)
        ids = torch.randint(0, facts.shape["vocab_size"], (TOKENS,))
        batch = PackedBatch(
            input_ids=ids,
            position_ids=torch.arange(TOKENS),
            labels=ids.roll(-1),
            seqs=(0,),
            layout=RingLayout(local_seqlens=(TOKENS,)),
        )

        def step() -> None:
            unshard_all(model)
            for last in (False, True):
                set_microbatch(model, reduce=last)
                model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()  # makes AdamW's state
        unshard_all(model)
        set_microbatch(model, reduce=True)
        with counting_saved(model, list(model.layers)) as count:
            loss = model(batch).sum()
            saved = count()
        loss.backward()
        del loss
        optimizer.zero_grad(set_to_none=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            step()
        resident = 3 * 4 * facts.num_params / world  # weights and two moments, there all along
        return memory, saved, _peak_bytes(record) + resident


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", "fp32"), ("llama", "bf16"), ("qwen3", "fp32")]
)
def test_the_estimate_is_near_the_bytes_that_torch_counts(name, dtype, checkpointing):
    memory, saved, peak = run_ranks(_count, 1, name, checkpointing, dtype)[0]
    assert isinstance(memory, RankMemory)
    if not checkpointing:  # with it, forward saves inputs, and backward one layer at a time
        kept = memory.per_token["saved for backward"] * TOKENS
        assert SAVED[0] <= kept / saved <= SAVED[1], (kept, saved)
    assert TOTAL[0] <= memory.total_bytes(TOKENS) / peak <= TOTAL[1], (memory, peak)


LLAMA_8B = {
    **{"num_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_heads": 32},
    **{"num_kv_heads": 8, "head_dim": 128, "vocab_size": 128256},
}


def _llama_8b(**options) -> RankMemory:
    common = {"num_params": 8.03e9, "unit_params": 1.27e9, "ranks": 8}
    return rank_memory(LLAMA_8B, **{**common, **options})


def test_max_tokens_is_the_most_that_fits():
    for memory in (_llama_8b(), _llama_8b(checkpointing=True), _llama_8b(ranks=64, ema=True)):
        for device_bytes in (80e9, 141e9, 192e9):
            tokens = memory.max_tokens(device_bytes)
            room = device_bytes * 0.92 - 2**30
            if tokens:
                assert memory.total_bytes(tokens) <= room
                assert memory.total_bytes(tokens + 257) > room
            else:
                assert memory.total_bytes(1) > room


def test_what_saves_memory_gives_tokens():
    plain = _llama_8b().max_tokens(141e9)
    assert _llama_8b(checkpointing=True).max_tokens(141e9) > 4 * plain > 0
    assert _llama_8b(ema=True).max_tokens(141e9) < plain
    assert _llama_8b(ranks=64).max_tokens(141e9) > plain
    assert _llama_8b().max_tokens(40e9) == 0


def test_nothing_fits_is_an_error_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"needs .* GiB before any token.*use more ranks") as info:
        tokens_that_fit(_llama_8b(), 40e9, reserve=None, device=torch.device("cuda"))
    assert "gathered weights of 2 bytes" in str(info.value)
    tiny = dataclasses.replace(_llama_8b(), fixed={})
    assert tokens_that_fit(tiny, 9e12, reserve=None, device=torch.device("cpu")) == CPU_TOKENS


# ---- runs ----


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def _train_with_memory(rank, world, options, available):
    import contextlib
    import io

    from hdp.training import capacity
    from hdp.training.loop import train

    capacity.free_bytes = lambda device: (available[rank], 0.0)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        losses = [m.loss for m in train(options)]
    return losses, said.getvalue()


def test_all_ranks_use_the_least_and_the_losses_stay(inputs, tmp_path):
    auto = config(inputs, tmp_path / "auto", steps=3, max_tokens_per_rank="auto")
    results = run_ranks(_train_with_memory, 2, auto, [9e9, 7e6])
    said = results[0][1]
    tokens = int(re.search(r"--max-tokens-per-rank auto: ([\d,]+)\n", said)[1].replace(",", ""))
    assert 300 < tokens < CPU_TOKENS and "GiB" not in results[1][1]
    assert f"at most {tokens:,} tokens per rank" in said and "room for activations" in said
    fixed = config(inputs, tmp_path / "fixed", steps=3)
    want = run_ranks(_train_with_memory, 2, fixed, [9e9, 7e6])[0][0]
    assert results[0][0] == pytest.approx(want, rel=1e-5)
    assert '"max_tokens_per_rank": "auto"' in (tmp_path / "auto" / "config.json").read_text()
    with pytest.raises(RankError, match="before any token"):
        run_ranks(_train_with_memory, 2, auto, [9e9, 1e5])
