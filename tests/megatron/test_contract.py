"""What we rely on is checked; what cannot work is refused with what to change, on all ranks."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hdp.megatron
from hdp.data.pack import IGNORE_INDEX, Sample
from hdp.megatron.contract import RELIED_ON, Ranks, check_contract
from hdp.megatron.microbatch import check_plan, loss_func
from hdp.megatron.refusals import check_config
from hdp.scheduler import CostModel, StepPlan, plan
from tests.megatron import cuda_shim
from tests.run_ranks import run_ranks

COST = CostModel.from_coefficients(quadratic_s=1e-9, linear_s=1e-6)
ALONE = Ranks(
    hdp_group=None,  # type: ignore[arg-type]
    hdp_rank=0,
    **{"hdp_size": 2, "tp_size": 1, "pp_size": 1, "vpp_size": 1, "ep_size": 1},
)
CROSSED = StepPlan.from_lists(
    [4, 1, 1], [[0, 1], [0], [1]], [[[0], [1]], [[2], [0]]], max_tokens_per_rank=4
)
GOOD = {"calculate_per_token_loss": True, "dataloader_type": "external"}


def settings(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**GOOD, **changes})


def test_good_arguments_pass() -> None:
    hdp.megatron.check_arguments(settings(attention_dropout=0.0, hybrid_layer_pattern="*-*-"))


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"calculate_per_token_loss": False}, "--calculate-per-token-loss"),
        ({"context_parallel_size": 2}, "--context-parallel-size 1"),
        ({"attention_dropout": 0.1}, "--attention-dropout 0"),
        ({"window_size": (128, 0)}, "--window-size"),
        ({"softmax_type": "learnable"}, "--softmax-type vanilla"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers"),
        ({"experimental_attention_variant": "gated_delta_net"}, "--experimental-attention-variant"),
        ({"enable_cuda_graph": True}, "--enable-cuda-graph"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl none"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
        (
            {"multi_latent_attention": True, "rope_type": "yarn", "apply_rope_fusion": True},
            "--no-rope-fusion",
        ),
        (
            {"num_experts": 8, "moe_token_dispatcher_type": "allgather"},
            "--moe-token-dispatcher-type alltoall",
        ),
        ({"attention_backend": SimpleNamespace(name="local")}, "--attention-backend local"),
        ({"sft": True}, "--sft"),
        ({"dataloader_type": "cyclic"}, "--dataloader-type external"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ({"hybrid_layer_pattern": "M*M*"}, "--hybrid-layer-pattern"),
        ({"hybrid_override_pattern": "G-*-"}, "--hybrid-override-pattern"),
    ],
)
def test_what_does_not_work_is_refused(changes: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=f"hdp.megatron: .*{remedy}"):
        hdp.megatron.check_arguments(settings(**changes))


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"per-token-loss; .*attention-dropout 0"):
        check_config(SimpleNamespace(attention_dropout=0.1))


def test_plans_that_would_hang_are_refused() -> None:
    experts = dataclasses.replace(ALONE, ep_size=2)
    with pytest.raises(ValueError, match=r"expert parallelism over 2 ranks needs an aligned plan"):
        check_plan(CROSSED, experts)
    check_plan(CROSSED, ALONE)
    with pytest.raises(ValueError, match=r"hdp_size=2, pp_size=1, but Megatron has 2 .* of 4 sta"):
        check_plan(CROSSED, dataclasses.replace(ALONE, pp_size=4))
    stages = dataclasses.replace(ALONE, pp_size=2, vpp_size=2)
    three = StepPlan.from_lists(
        [1] * 5, [[0]] * 3 + [[1]] * 2, [[[0], [1], [2]], [[3], [4]]], pp_size=2,
        max_tokens_per_rank=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"rank 0 has 3 microbatches; .* multiple of the 2 stages"):
        check_plan(three, stages)


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize(("pp_size", "vpp_size"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_planned_with_our_options_is_accepted(ep_size: int, pp_size: int, vpp_size: int) -> None:
    ranks = dataclasses.replace(
        ALONE, hdp_size=4, pp_size=pp_size, vpp_size=vpp_size, ep_size=ep_size
    )
    options = hdp.megatron.plan_options(ranks)
    for lengths in ([300, 5, 70, 20], [9], [64] * 11, [250, 130, 60, 60, 60, 3, 2, 1]):
        made = plan(lengths, max_tokens_per_rank=80, cost=COST, **options).validate()
        check_plan(made, ranks)
        assert made.ends_together


def test_steps_are_padded_for_tensor_parallelism() -> None:
    made = plan([7, 2], hdp_size=2, max_tokens_per_rank=8, cost=COST)
    ranks = dataclasses.replace(ALONE, tp_size=4)
    step = hdp.megatron.pack_step(made, [Sample(input_ids=torch.arange(n).numpy()) for n in (7, 2)],
                                  ranks)  # fmt: skip
    assert all(batch.total_tokens % 4 == 0 for batch in step.batches)
    assert all((batch.labels == IGNORE_INDEX).any() for batch in step.batches)


def test_loss_is_a_sum_and_a_count() -> None:
    loss, count, report = loss_func(
        torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[2.0, 5.0, 4.0]])
    )
    assert float(loss) == 6.0 and int(count) == 2 and count.dtype == torch.int
    assert report["lm loss"].tolist() == [6.0, 2.0]


def test_get_batch_wants_the_wrapped_schedule() -> None:
    with pytest.raises(ValueError, match="the data iterator gave int: wrap the schedule"):
        hdp.megatron.get_batch(iter([3]))


# ---- with megatron-core ----


def test_a_contract_that_changed_is_named() -> None:
    pytest.importorskip("megatron.core")
    check_contract(RELIED_ON)
    changed = {
        "utils:get_model_config": ("model", "stage"),
        "packed_seq_params:PackedSeqParams": ("qkv_format", "rotary"),
        "utils:no_such_function": (),
    }
    with pytest.raises(ImportError) as raised:
        check_contract(changed)
    for text in (
        "utils:get_model_config has no stage",
        "packed_seq_params:PackedSeqParams has no rotary",
        "utils:no_such_function is gone",
        "Install megatron-core 0.16 to 0.19, or a newer hdp",
    ):
        assert text in str(raised.value)


def feed_rank(rank: int, world: int, feeds: list[list[Any]]) -> str:
    """The error of a step whose data iterator gives feeds[rank]."""
    cuda_shim.install()
    from tests.megatron import tiny_gpt

    tiny_gpt.start()
    cfg = tiny_gpt.config()
    wrapped = tiny_gpt.wrap_ddp(cfg, [tiny_gpt.build(cfg, hdp_attention=True)])
    function = hdp.megatron.wrap(tiny_gpt.get_forward_backward_func)()
    try:
        tiny_gpt.run(function, hdp.megatron.forward_step, iter(feeds[rank]), wrapped, 1)
    except ValueError as error:
        return str(error)
    return ""


def step_of(lengths: list[int], rank: int) -> Any:
    made = plan(lengths, hdp_size=2, max_tokens_per_rank=16, cost=COST)
    return hdp.megatron.pack_step(
        made,
        [Sample(input_ids=torch.arange(n).numpy()) for n in lengths],
        dataclasses.replace(ALONE, hdp_rank=rank),
    )


def test_iterators_that_end_or_differ_are_errors_on_all_ranks() -> None:
    pytest.importorskip("megatron.core")
    good = [[step_of([20, 5, 3], rank)] for rank in range(2)]
    assert run_ranks(feed_rank, 2, good) == ["", ""]
    other, ended = run_ranks(feed_rank, 2, [good[0], []])
    assert "the data iterator of another rank failed" in other
    assert "the data iterator ended; let it give steps for ever" in ended
    other, wrong = run_ranks(feed_rank, 2, [good[0], [3]])
    assert "another rank failed" in other and "gave int, not hdp.megatron.pack_step" in wrong
    differ = run_ranks(feed_rank, 2, [good[0], [step_of([20, 5, 4], 1)]])
    assert differ[0] == differ[1] and "ranks disagree on the plan" in differ[0]


def foreign_rank(rank: int, world: int) -> list[str]:
    """Errors of a model with Megatron's attention, and of overlaps with a crossed plan."""
    cuda_shim.install()
    from tests.megatron import tiny_gpt

    tiny_gpt.start()
    cfg = tiny_gpt.config()
    messages = []
    step = hdp.megatron.pack_step(
        CROSSED, [Sample(input_ids=torch.arange(n).numpy()) for n in (4, 1, 1)]
    )
    for ours in (False, True):
        model = tiny_gpt.build(cfg, hdp_attention=ours)
        wrapped = tiny_gpt.wrap_ddp(cfg, [model], overlap_grad_reduce=ours)
        function = hdp.megatron.wrap(tiny_gpt.get_forward_backward_func)()
        try:
            tiny_gpt.run(function, hdp.megatron.forward_step, iter([step]), wrapped, 1)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_built_models_and_overlaps_are_checked() -> None:
    pytest.importorskip("megatron.core")
    for foreign, crossed in run_ranks(foreign_rank, 2):
        assert "core_attention is DotProductAttention, which would attend across" in foreign
        assert "--overlap-grad-reduce with a plan whose rings are the last" in crossed


def layer_rank(rank: int, world: int) -> str:
    cuda_shim.install()
    from tests.megatron import tiny_gpt

    tiny_gpt.start()
    cfg = tiny_gpt.config(transformer_impl="local")
    spec = hdp.megatron.layer_spec(cfg)
    kinds = {
        layer.submodules.self_attention.submodules.core_attention for layer in spec.layer_specs
    }
    stock = tiny_gpt.get_gpt_layer_local_spec(normalization="RMSNorm")
    before = stock.submodules.self_attention.submodules.core_attention
    hdp.megatron.use_hdp_attention(stock)
    assert stock.submodules.self_attention.submodules.core_attention is before, "a copy"
    with pytest.raises(ValueError, match="attention-dropout 0"):
        hdp.megatron.layer_spec(dataclasses.replace(cfg, attention_dropout=0.1))
    with pytest.raises(ValueError, match="has no self_attention with a core_attention"):
        hdp.megatron.use_hdp_attention(stock.submodules.mlp)
    return ",".join(kind.__name__ for kind in kinds)


def test_layer_spec_has_our_attention_in_every_layer() -> None:
    pytest.importorskip("megatron.core")
    assert run_ranks(layer_rank, 1) == ["HDPAttention"]
