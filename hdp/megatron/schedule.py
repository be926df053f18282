"""wrap(): Megatron's schedules run this rank's microbatches of the step's plan.

The one thing of Megatron that a script replaces, before it calls pretrain():

    from megatron.training import training
    training.get_forward_backward_func = hdp.megatron.wrap(training.get_forward_backward_func)

Megatron asks for a function and calls it once per step. Before it runs, the wrapped one

1. starts all parameter gathers: with --overlap-param-gather they would sit inside the first
   forward, where a rank that waits in a ring waits for one that waits for its gather;
2. prepares models that it has not seen: the core attention must be ours, RoPE goes by span;
3. takes the next step from the data iterator and lets all ranks agree on its plan, those of a
   tensor parallel group and of a pipeline included;
4. hands over as many microbatches as this rank has, one after the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from hdp.attention.comm import RingComm
from hdp.distributed.mesh import agree_on_plan, device_of

from .attention import check_model
from .contract import Ranks, core_object
from .microbatch import Microbatch, RankStep, check_plan
from .rotary import use_span_rotary


class Schedule:
    """Runs steps of plans on Megatron's schedules; `wrap` returns its `get`."""

    def __init__(self, get_forward_backward_func: Callable[..., Callable[..., Any]]) -> None:
        self._get = get_forward_backward_func
        self._prepared: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._comm: RingComm | None = None

    def get(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """Megatron's get_forward_backward_func, of steps instead of microbatches."""
        function = self._get(*args, **kwargs)

        def run(*, data_iterator: Any, num_microbatches: int, model: Any, **others: Any) -> Any:
            chunks = list(model) if isinstance(model, (list, tuple)) else [model]
            ranks = Ranks.current()
            gather_parameters(chunks)
            for chunk in chunks:
                self._prepare(chunk)
            feeds = data_iterator if isinstance(data_iterator, list) else [data_iterator]
            step = next_step(feeds[0], ranks)
            check_chunks(step, chunks)
            iterators = [self._microbatches(step, ranks) for _ in feeds]  # one per virtual stage
            return function(
                data_iterator=iterators if isinstance(data_iterator, list) else iterators[0],
                num_microbatches=len(step.batches),
                model=model,
                **others,
            )

        return run

    def _prepare(self, chunk: torch.nn.Module) -> None:
        if chunk in self._prepared:
            return
        check_model(chunk)
        use_span_rotary(chunk)
        # Stages exchange as many rows as a microbatch has.
        core_object("utils:get_model_config")(chunk).variable_seq_lengths = True
        self._prepared.add(chunk)

    def _microbatches(self, step: RankStep, ranks: Ranks) -> Iterator[Microbatch]:
        if self._comm is None or self._comm.group is not ranks.hdp_group:
            device = device_of(ranks.hdp_group)
            self._comm = RingComm(ranks.hdp_group, device)
        self._comm.take_stats()
        comm = self._comm
        return iter([Microbatch(batch=batch, comm=comm) for batch in step.batches])


def wrap(get_forward_backward_func: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
    """Megatron's get_forward_backward_func for a data iterator that gives one RankStep per step.

    The functions it returns raise ValueError, on all ranks, if the iterator ends or gives something
    else on any of them, or if ranks have different plans; and for plans and models that would hang
    or compute something else.
    """
    return Schedule(get_forward_backward_func).get


def gather_parameters(chunks: list[Any]) -> None:
    """With overlap_param_gather, gather all parameters now, before any rank enters a ring."""
    for chunk in chunks:
        config = getattr(chunk, "ddp_config", None)
        hooks = getattr(chunk, "remove_forward_pre_hook_handles", None)
        if config is not None and config.overlap_param_gather and hooks:
            chunk.start_param_sync(force_sync=True)


def next_step(data_iterator: Any, ranks: Ranks) -> RankStep:
    """The next step, the same on all ranks. Collective. Raises ValueError on all ranks or none."""
    problem, step = "", None
    try:
        step = next(data_iterator)
    except StopIteration:
        problem = "the data iterator ended; let it give steps for ever, or lower --train-iters"
    except TypeError:
        problem = "there is no data iterator: mark the provider, provider.is_distributed = True"
    if not problem and not isinstance(step, RankStep):
        problem = f"the data iterator gave {type(step).__name__}, not hdp.megatron.pack_step(..)"
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is initialized when Megatron trains"
    failed = torch.tensor([float(bool(problem))], device=device_of(world))
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if failed.item():
        raise ValueError(problem or "the data iterator of another rank failed; see its message")
    assert isinstance(step, RankStep)
    agree_on_plan(world, step.plan)
    check_plan(step.plan, ranks)
    return step


def check_chunks(step: RankStep, chunks: list[Any]) -> None:
    """Raise ValueError for a plan that deadlocks with overlapped gradient reduction."""
    configs = [getattr(chunk, "ddp_config", None) for chunk in chunks]
    overlap = any(config is not None and config.overlap_grad_reduce for config in configs)
    if overlap and not step.plan.ends_together:
        raise ValueError(
            "--overlap-grad-reduce with a plan whose rings are the last microbatch of only some of "
            "their ranks would deadlock; pass ends_together=True to hdp.plan, or leave out the flag"
        )
