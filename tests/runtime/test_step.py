"""One training step under any plan equals dense training on one process: loss and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hdp.parallel import shard

from hdp.comm import RingComm
from hdp.data.feed import StepBatch
from hdp.data.pack import Sample, pack_microbatch
from hdp.hf import build_model
from hdp.mesh import HDPMesh
from hdp.recorder import StepRecorder
from hdp.scheduler import CostModel, StepPlan, plan
from hdp.step import NonFiniteError, StepContext, train_step
from tests.random_plans import random_plan
from tests.run_ranks import run_ranks

VOCAB = 61
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
COST = CostModel.from_coefficients(quadratic_s=1e-6, linear_s=1e-4, fixed_s=1e-4)
# odd lengths, length 1, lengths below the ring size, one that needs every rank
SEQLENS = [97, 1, 3, 40, 2, 17, 64, 1, 33, 5]


def _samples(seqlens, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Sample(
            input_ids=rng.integers(0, VOCAB, n),
            loss_mask=rng.random(n) < 0.8 if i % 3 == 0 else None,
        )
        for i, n in enumerate(seqlens)
    ]


def _num_loss_tokens(samples):
    return sum(int((s.labels(0, len(s.input_ids)) >= 0).sum()) for s in samples)


def dense_step(model_config, seqlens, dtype):
    """(loss, {name: gradient}) of the plain Hugging Face model, one sequence at a time, fp64."""
    model = build_model(model_config, dtype=dtype, seed=0).double()
    hf = model.model
    hf.set_attn_implementation("eager")
    samples = _samples(seqlens)
    count, loss_sum = _num_loss_tokens(samples), 0.0
    for sample in samples:
        ids = torch.from_numpy(np.asarray(sample.input_ids))
        logits = hf(input_ids=ids[None], use_cache=False).logits[0]
        labels = torch.from_numpy(sample.labels(0, len(ids)))
        loss = torch.nn.functional.cross_entropy(
            logits.double(), labels, ignore_index=-100, reduction="sum"
        )
        (loss / count).backward()
        loss_sum += loss.item()
    return loss_sum / count, {name: p.grad for name, p in model.named_parameters()}


def make_plan(policy, seqlens, hdp_size) -> StepPlan:
    if policy.startswith("random"):
        return random_plan(seqlens, hdp_size, seed=int(policy.removeprefix("random")))
    capacity = max(16, -(-max(seqlens) // hdp_size))
    cp_size = hdp_size if policy == "static" else None
    return plan(
        seqlens,
        hdp_size=hdp_size,
        max_tokens_per_rank=capacity,
        cost=COST,
        policy=policy,
        cp_size=cp_size,
    )


def make_context(model_config, dtype, *, lr=1.0, **options):
    """SGD with lr 1: the parameters move by exactly the gradient."""
    mesh = HDPMesh.create(device="cpu")
    model = build_model(model_config, dtype=dtype, seed=0)
    shard(model, mesh.device_mesh, param_dtype=dtype, reduce_dtype=dtype)
    comm = RingComm(mesh.hdp_group)
    return StepContext(
        mesh=mesh,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        comm=comm,
        recorder=StepRecorder(mesh.hdp_rank, comm),
        **options,
    )


def make_batch(plan_, rank, samples) -> StepBatch:
    return StepBatch(
        plan=plan_,
        batches=tuple(pack_microbatch(mb, rank, samples) for mb in plan_.microbatches(rank)),
        seq_ids=np.arange(len(samples)) + 1000,
        num_loss_tokens=_num_loss_tokens(samples),
        next_position=(0,),
    )


def _full(model):
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}


def _step_grads(rank, world, policies, dtype, options):
    context = make_context(MODEL, dtype, **options)
    samples = _samples(SEQLENS)
    results = {}
    for policy in policies:
        before = _full(context.model)
        state = {k: v.clone() for k, v in context.model.state_dict().items()}
        step = make_batch(make_plan(policy, SEQLENS, world), rank, samples)
        result = train_step(context, step)
        after = _full(context.model)
        results[policy] = result, {name: before[name] - after[name] for name in before}
        context.model.load_state_dict(state)
    return results if rank == 0 else None


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_step_equals_dense(world, dtype, tolerance):
    policies = ["hdp", "static", "bytescale", "random1", "random2", "random3"]
    results = run_ranks(_step_grads, world, policies, dtype, {})[0]
    loss, grads = dense_step(MODEL, SEQLENS, dtype)
    for policy in policies:
        result, got = results[policy]
        assert result.loss == pytest.approx(loss, rel=tolerance), policy
        for name, want in grads.items():
            error = (got[name].double() - want).norm() / want.norm()
            assert error < tolerance, f"{policy}, {name}: relative error {error:.2e}"


@pytest.mark.parametrize("world", [2, 3])
def test_overlapped_reduction_changes_nothing(world):
    policies = ["hdp", "random1", "random4", "local"]
    # "hdp" on short sequences ends local; random plans mostly do not
    plans = [p for p in policies if p != "local"]
    plain = run_ranks(_step_grads, world, plans, torch.float64, {})[0]
    overlapped = run_ranks(_step_grads, world, plans, torch.float64, {"overlap_reduce": True})[0]
    for policy in plans:
        for name, want in plain[policy][1].items():
            torch.testing.assert_close(overlapped[policy][1][name], want, rtol=1e-12, atol=1e-14)


def _non_finite(rank, world):
    context = make_context(MODEL, torch.float32)
    before = _full(context.model)
    samples = _samples(SEQLENS)
    step = make_batch(make_plan("random1", SEQLENS, world), rank, samples)
    poisoned = 6
    inner = context.model.forward

    def forward(batch, comm):
        out = inner(batch, comm)
        return out * float("nan") if poisoned in batch.seqs else out

    context.model.forward = forward
    with pytest.raises(NonFiniteError, match=r"sequences \[[^]]*\b1006\b"):
        train_step(context, step)
    after = _full(context.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_non_finite_loss_raises_everywhere_before_the_optimizer():
    run_ranks(_non_finite, 3)


def _disagree(rank, world):
    context = make_context(MODEL, torch.float32)
    samples = _samples(SEQLENS)
    step = make_batch(make_plan(f"random{1 + (rank == 2)}", SEQLENS, world), rank, samples)
    with pytest.raises(ValueError, match=r"rank.* 2\b"):
        train_step(context, step)


def test_ranks_that_disagree_on_the_plan_stop_before_they_can_hang():
    run_ranks(_disagree, 3, timeout_s=60)
