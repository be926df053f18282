"""Measure the model without attention: seconds and bytes per token, and forward's share of time.

Microbatches of many very short sequences have almost no attention, so their time is linear in
tokens: `fixed_s` + `linear_s` * tokens. The model runs as in training: sharded, with or without
activation checkpointing, on all ranks at once.

    linear     seconds of forward, and of forward + backward, by tokens
    saved      bytes that autograd keeps from forward to backward: each storage once, parameters
               not at all (torch's saved-tensor hooks; works on every device)
    temporary  further bytes at a step's peak, where the device reports memory (CUDA)

The last two are slopes over tokens, so constant parts drop out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hdp.attention.layout import RingLayout
from hdp.data.pack import PackedBatch
from hdp.distributed.fsdp import reduce_gradients, set_microbatch, unshard_all
from hdp.objectives import token_cross_entropy
from hdp.scheduler.costs.fit import fit_line
from hdp.training.setup import Run

from .stopwatch import median_s

Row = dict[str, Any]  # tokens, seqlen, forward_s, seconds, saved_bytes, peak_bytes (None on a CPU)

SHORT = 16  # tokens of the short sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """Coefficients fitted to the rows. Seconds are forward + backward of one rank."""

    linear_s: float
    fixed_s: float
    forward_share: float
    activation_bytes_per_token: float
    temporary_bytes_per_token: float | None  # None: the device does not report memory


def measure_model(run: Run, most_tokens: int, *, repeats: int) -> list[Row]:
    """Measure rows of short sequences, and one row of a single long sequence. Collective."""
    sizes = [n for shift in (4, 2, 1, 0) if (n := most_tokens >> shift) >= SHORT]
    loads = [(n // SHORT * SHORT, SHORT) for n in sizes] + [(most_tokens, most_tokens)]
    return [_measure(run, tokens, seqlen, repeats) for tokens, seqlen in loads]


def model_costs(rows: Sequence[Row]) -> ModelCosts:
    """Fit lines to the rows. Raises ValueError if time does not grow with the number of tokens."""
    short = [row for row in rows if row["seqlen"] == SHORT]
    tokens = [row["tokens"] for row in short]
    fixed_s, rate = fit_line(tokens, [row["seconds"] for row in short])
    saved = float(np.polyfit(tokens, [row["saved_bytes"] for row in short], 1)[0])
    temporary = None
    if all(row["peak_bytes"] is not None for row in short):
        peak = float(np.polyfit(tokens, [row["peak_bytes"] for row in short], 1)[0])
        temporary = max(peak - saved, 0.0)
    return ModelCosts(
        linear_s=1 / rate,
        fixed_s=fixed_s,
        forward_share=median(row["forward_s"] / row["seconds"] for row in rows),
        activation_bytes_per_token=saved,
        temporary_bytes_per_token=temporary,
    )


@contextmanager
def counting_saved(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[Callable[[], int]]:
    """Count what autograd saves inside the block; yields a function that returns the bytes so far.

    Each storage counts once, in full, no matter how many functions saved views of it; parameters
    do not count. Inputs of `layers` do: under activation checkpointing they are all that is kept of
    a layer, and saved-tensor hooks do not see them.
    """
    owned = {_storage(x) for x in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}
    kept = []  # keeps storages alive: the address of a freed one could be reused

    def note(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in owned and not isinstance(tensor, nn.Parameter):
            seen[_storage(tensor)] = tensor.untyped_storage().nbytes()
            kept.append(tensor.detach())
        return tensor

    def note_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            note(args[0])

    hooks = [layer.register_forward_pre_hook(note_input) for layer in layers]
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield lambda: sum(seen.values())
    finally:
        for hook in hooks:
            hook.remove()


def _measure(run: Run, tokens: int, seqlen: int, repeats: int) -> Row:
    model, device = run.model, run.mesh.device
    layout = RingLayout(local_seqlens=(seqlen,) * (tokens // seqlen))
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, run.dataset.vocab_size, tokens))
    batch = PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(seqlen).repeat(tokens // seqlen),
        labels=ids.roll(-1),
        seqs=tuple(range(tokens // seqlen)),
        layout=layout,
    ).to(device)

    def forward() -> Tensor:
        return token_cross_entropy(model(batch, run.context.comm), global_count=tokens)

    unshard_all(model)
    set_microbatch(model, reduce=False)
    model.train()
    forward().backward()  # allocates gradients, so they do not count as bytes per token
    saved, peak = _bytes(model, forward, device)

    def seconds(call: Callable[[], object]) -> float:
        return median_s(call, device, repeats=repeats, group=run.mesh.hdp_group)

    row = {
        "tokens": tokens,
        "seqlen": seqlen,
        "forward_s": seconds(forward),
        "seconds": seconds(lambda: forward().backward()),
        "saved_bytes": saved,
        "peak_bytes": peak,
    }
    reduce_gradients(model)
    run.optimizer.zero_grad(set_to_none=True)
    return row


def _bytes(
    model: Any, forward: Callable[[], Tensor], device: torch.device
) -> tuple[int, int | None]:
    """(bytes saved from forward to backward, peak bytes above the start)."""
    with counting_saved(model, list(model.layers)) as count:
        loss = forward()
        saved = count()
    loss.backward()
    if device.type != "cuda":
        return saved, None
    del loss
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward().backward()
    torch.cuda.synchronize(device)
    return saved, torch.cuda.max_memory_allocated(device) - before


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
