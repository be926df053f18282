"""A small FSDP2 model to save and load in checkpoint tests."""

from __future__ import annotations

import re
import threading

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from hdp.checkpoint.checkpointer import Checkpointer
from hdp.checkpoint.directory import ChecksumStream
from tests.patience import patience

CONFIG = {"hidden_size": 6, "layers": 2, "lib_version": "1", "_path": "/a"}


class Toy(torch.nn.Module):
    """Odd sizes, so shards are uneven and some empty; tied embedding and head; a buffer."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, hidden)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(hidden, hidden) for _ in range(2))
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.head = torch.nn.Linear(hidden, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x) * self.scale.sum()


def build(mesh, seed=0, hidden=6):
    torch.manual_seed(seed)
    model = Toy(hidden)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh.device_mesh)
    fully_shard(model, mesh=mesh.device_mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def step_once(model, optimizer, step):
    """Train on the same batch on all ranks, so the mean gradient is independent of their number."""
    tokens = torch.arange(7) * (step + 3) % 11
    loss = torch.nn.functional.cross_entropy(model(tokens), tokens.roll(-1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.count += 1
    return float(loss.detach())


def everything(model, optimizer):
    """The full model and optimizer state, on rank 0."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state = get_model_state_dict(model, options=options)
    state = {f"model.{name}": value.clone() for name, value in model_state.items()}
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)
    for name, fields in optimizer_state.get("state", {}).items():
        state |= {f"optimizer.{name}.{k}": v.clone() for k, v in fields.items()}
    return state


def saver_for(directory, mesh, **options):
    return Checkpointer(directory, mesh, **({"model_config": CONFIG, "seed": 5} | options))


def assert_equal(a, b):
    assert a.keys() == b.keys() and a
    for name in a:
        assert torch.equal(a[name], b[name]), name


def hold_writes():
    """Make this process's later writes wait for an event per step; return {step: event}."""
    gates = {step: threading.Event() for step in range(10)}
    write = ChecksumStream.write

    def held(self, data):
        step = int(re.search(r"step-(\d+)", self.name)[1])
        assert gates[step].wait(patience(60)), f"nothing released the save of step {step}"
        return write(self, data)

    ChecksumStream.write = held
    return gates


def set_soon(event):
    """Set `event` after a moment, when the caller is already waiting."""
    threading.Timer(0.3, event.set).start()
