"""megatron-core on CPU ranks with gloo, for tests only: call `install` before importing it.

Answers the torch.cuda calls that Megatron makes outside of kernels: devices, random number state,
streams and events, `device="cuda"` of factories, `.cuda()`, and the type names that its optimizers
compare. It changes torch for the rest of the process, so it runs in processes of its own.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class Stream:
    """A stream on which everything is done at once."""

    device, cuda_stream, stream_id = CPU, 0, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = _nothing
    __enter__ = __exit__ = _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True


class Event(Stream):
    """An event that has happened."""

    record = wait = Stream._nothing

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class ToCpu(TorchFunctionMode):
    """Factories and `.to()` with a CUDA device make CPU tensors; `.type()` says cuda."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to:
            args = tuple(CPU if is_cuda(a) and not isinstance(a, int) else a for a in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        return func(*args, **kwargs)


class Generators:
    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _lists_of_sizes(call: Any) -> Any:
    """MoE dispatchers turn their split sizes into lists only where they are CUDA tensors."""

    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    def all_to_all_single(output, input, output_sizes=None, input_sizes=None, *args, **kwargs):
        if "output_split_sizes" in kwargs:
            output_sizes = kwargs.pop("output_split_sizes")
        if "input_split_sizes" in kwargs:
            input_sizes = kwargs.pop("input_split_sizes")
        return call(output, input, as_list(output_sizes), as_list(input_sizes), *args, **kwargs)

    return all_to_all_single


def _answer(value: Any, *names: str) -> None:
    """torch.cuda.NAME() returns the value: one function for each name, dynamo wants them so."""
    for name in names:
        owner, _, last = name.rpartition(".")
        target = getattr(torch.cuda, owner) if owner else torch.cuda
        setattr(target, last, lambda *args, **kwargs: value)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def install() -> None:
    """Change torch, for the life of this process."""
    cuda: Any = torch.cuda
    dist.all_to_all_single = _lists_of_sizes(dist.all_to_all_single)
    _answer(None, "set_device", "synchronize", "empty_cache", "init", "_lazy_init", "ipc_collect")
    _answer(None, "reset_peak_memory_stats", "nvtx.range_push", "nvtx.range_pop")
    _answer(0, "memory_allocated", "max_memory_allocated", "memory_reserved")
    _answer(0, "max_memory_reserved")
    _answer(CPU, "current_device")
    _answer(1, "device_count")
    _answer(False, "is_current_stream_capturing")
    _answer((9, 0), "get_device_capability")
    _answer("cpu", "get_device_name")
    properties = types.SimpleNamespace(major=9, minor=0, total_memory=0, name="cpu")
    _answer(properties, "get_device_properties")
    _answer(Stream(), "current_stream", "default_stream")
    _answer(contextlib.nullcontext(), "stream")
    _answer(collections.defaultdict(int), "memory_stats")
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        module.manual_seed = _seed
    # Megatron asserts that there is a GPU; torch's own optimizers must not believe it.
    cuda.is_available = lambda: sys._getframe(1).f_globals["__name__"].startswith("megatron")
    cuda.manual_seed_all = _seed
    cuda.default_generators = Generators()
    cuda._lazy_call = lambda call, **kwargs: call()  # else queued until CUDA starts
    cuda.Stream, cuda.Event = Stream, Event
    # Megatron compiles at import: minutes, and dynamo does not like the functions replaced above.
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda f: f)
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, stream: None
    ToCpu().__enter__()
