"""The random number generators of one process: seeding, saving and restoring them.

Training draws few random numbers: batches come from the sampler, which has its own seed and is the
same on all ranks. The remaining streams (for dropout, say) continue after a resume on the same
number of ranks; on a different number, each rank reproducibly starts a new stream from (seed, step,
rank).
"""

from __future__ import annotations

import json
import random
from typing import cast

import numpy as np
import torch


def seed_rng(seed: int, *, step: int = 0, rank: int = 0) -> None:
    """Seed this process's torch (all devices), numpy and Python from (seed, step, rank)."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(4)
    torch.manual_seed((int(words[0]) << 32 | int(words[1])) & (2**63 - 1))
    np.random.seed(words[2])
    random.seed(int(words[3]))


def pack_rng(device: torch.device) -> torch.Tensor:
    """The states of torch, numpy and Python as JSON in a (num_bytes,) uint8 tensor. No pickle."""
    kind, keys, *rest = cast(tuple, np.random.get_state())
    state = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None,
    }
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def unpack_rng(packed: torch.Tensor, device: torch.device) -> None:
    """Restore the states that `pack_rng` saved."""
    state = json.loads(packed.numpy().tobytes())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)
