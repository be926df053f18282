"""HDPMesh: the ranks of one HDP axis, on one communicator.

A static mesh gives every sequence the same data- and context-parallel ranks. HDP has a single flat
axis of `hdp_size` ranks, and the plan decides for each sequence which of them work together. All
communication on the axis (ring exchange between any subset of ranks, gradient reduction, FSDP2's
gathers, agreement checks) uses ONE communicator. A process group per subset would be slow to create
and cost GBs of NCCL buffers (the paper measures 5-10 GB).

    with HDPMesh.create() as mesh:     # under torchrun: all its ranks; otherwise a single rank
        fully_shard(model, mesh=mesh.device_mesh)
        agree_on_plan(mesh, plan)      # before the first collective that follows the plan

Invariants (each asserted by a test of the same name in tests/distributed/test_mesh.py):

* one_communicator            `device_mesh.get_group()` is `hdp_group`
* communicator_is_warm        `create` has run a collective, so P2P between a few ranks cannot hang
* stale_store_is_harmless     after a restart no rank reads the addresses of dead ranks
* same_ranks_per_node         `ranks_per_node` is equal on all ranks: each computes plans from it
* disagreement_is_seen_by_all `agree_on_plan` raises on every rank or on none
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

if TYPE_CHECKING:
    from hdp.scheduler import StepPlan

COLLECTIVE_TIMEOUT_S = 600.0
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
_TORCHRUN = (*_ALONE, "MASTER_ADDR", "MASTER_PORT")
# Launchers that start several processes without setting torchrun's environment: unless caught, each
# process would train alone.
_OTHER_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class HDPMesh:
    """One rank's view of the HDP axis. Use `create`, or `from_group` for your own group."""

    device: torch.device  # this rank's device: cpu, or its own cuda device
    hdp_size: int  # number of ranks on the axis: the paper's d_hdp = d_dp * d_cp
    hdp_rank: int  # this rank's index on the axis, in 0..hdp_size - 1
    hdp_group: dist.ProcessGroup  # the only communicator of the axis
    device_mesh: DeviceMesh  # 1-D, axis "hdp", on the same communicator (for FSDP2)
    ranks_per_node: int  # consecutive ranks guaranteed to share a node; equal on all ranks
    owns_process_group: bool = False  # whether close() destroys the process group

    @classmethod
    def create(
        cls,
        *,
        hdp_size: int | None = None,
        device: str | torch.device | None = None,
        timeout_s: float = COLLECTIVE_TIMEOUT_S,
        join_timeout_s: float | None = None,
    ) -> HDPMesh:
        """Join all ranks that torchrun started (without torchrun: one rank) into one HDP axis.

        `device`: "cpu" (gloo) or "cuda" (NCCL); defaults to cuda if available. `timeout_s`: how
        long a collective may wait before the communicator gives up; must exceed the longest step.
        `join_timeout_s`: how long to wait for missing ranks at start-up; None: as long. An existing
        default process group is reused, and `close` does not destroy it. Collective: returns once
        all ranks have communicated.

        Raises ValueError for an `hdp_size` that does not match the ranks, a broken torchrun
        environment, or a missing device.
        """
        env = _torchrun_env()
        initialized = dist.is_initialized()
        world_size = dist.get_world_size() if initialized else env["WORLD_SIZE"]
        _check_hdp_size(hdp_size, world_size)
        where = _pick_device(device, env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"])
        if timeout_s <= 0:
            raise ValueError(f"timeout_s={timeout_s} must be positive")
        if not initialized:
            _init_process_group(env, where, timeout_s, join_timeout_s or timeout_s)
        group = dist.group.WORLD
        assert group is not None
        mesh = cls.from_group(group, device=where, ranks_per_node=env["LOCAL_WORLD_SIZE"])
        return dataclasses.replace(mesh, owns_process_group=not initialized)

    @classmethod
    def from_group(
        cls,
        group: dist.ProcessGroup,
        *,
        device: str | torch.device,
        ranks_per_node: int = 1,
    ) -> HDPMesh:
        """Build a mesh over an existing process group, which the caller still owns. Collective.

        `ranks_per_node`: consecutive ranks of the group on this rank's node. If nodes differ, the
        mesh takes the greatest common divisor: blocks of that many consecutive ranks never cross a
        node boundary.
        """
        device = torch.device(device)
        devices = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
        if device.type not in devices:
            raise ValueError(
                f"the process group supports {', '.join(devices)} tensors, not {device.type}; "
                f"initialize it with backend={'nccl' if device.type == 'cuda' else 'gloo'!r}, "
                "or let HDPMesh.create do it"
            )
        size = dist.get_world_size(group)
        # Also the warm-up: the first batch_isend_irecv on a cold NCCL communicator hangs unless
        # every rank takes part.
        counts = torch.empty(size, dtype=torch.int64, device=device)
        mine = torch.tensor([ranks_per_node], dtype=torch.int64, device=device)
        dist.all_gather(list(counts.split(1)), mine, group=group)
        return cls(
            device=device,
            hdp_size=size,
            hdp_rank=dist.get_rank(group),
            hdp_group=group,
            device_mesh=DeviceMesh.from_group(group, device.type, mesh_dim_names=("hdp",)),
            ranks_per_node=math.gcd(size, *counts.tolist()),
        )

    def close(self) -> None:
        """Destroy the process group if `create` made it. Call after the last collective."""
        if self.owns_process_group and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> HDPMesh:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error, other ranks may be stuck in a collective, and destroying an NCCL group
        # waits for them: let process exit clean up instead.
        if error is None or self.device.type != "cuda":
            self.close()


def _torchrun_env() -> dict[str, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as ints; without torchrun, a single rank's.

    If a process group already exists, only the LOCAL values are used, as hints.
    """
    if not dist.is_initialized():
        given = [name for name in _TORCHRUN if name in os.environ]
        missing = [name for name in _TORCHRUN if name not in os.environ]
        if ("RANK" in given or "WORLD_SIZE" in given) and missing:
            raise ValueError(f"environment lacks {', '.join(missing)}; launch with torchrun")
        for name in _OTHER_LAUNCHERS if missing else ():
            if (count := os.environ.get(name, "")) not in ("", "1"):
                raise ValueError(
                    f"{name}={count} but RANK and WORLD_SIZE are not set, so each process would "
                    "train alone; run one torchrun per node (srun --ntasks-per-node=1 torchrun ...)"
                )
    try:
        env = {name: int(os.environ.get(name, default)) for name, default in _ALONE.items()}
    except ValueError as error:
        raise ValueError(f"torchrun's environment is not numeric: {error}") from error
    if not 0 <= env["RANK"] < env["WORLD_SIZE"]:
        size = env["WORLD_SIZE"]
        raise ValueError(f"RANK={env['RANK']} is not in 0..{size - 1} (WORLD_SIZE={size})")
    return env


def _check_hdp_size(hdp_size: int | None, world_size: int) -> None:
    if hdp_size is None or hdp_size == world_size:
        return
    remedy = f"omit hdp_size or set it to {world_size}"
    if hdp_size < 1:
        raise ValueError(f"hdp_size={hdp_size} must be at least 1; {remedy}")
    if hdp_size > world_size:
        raise ValueError(
            f"hdp_size={hdp_size} needs {hdp_size} ranks but {world_size} were started; {remedy}, "
            "or start more processes (torchrun --nproc-per-node, --nnodes)"
        )
    if world_size % hdp_size:
        raise ValueError(f"hdp_size={hdp_size} does not divide the {world_size} ranks; {remedy}")
    raise ValueError(
        f"hdp_size={hdp_size} leaves {world_size // hdp_size} ranks per HDP rank for tensor and "
        "pipeline parallelism, which Hugging Face models do not use here (tp=pp=1): the HDP axis "
        f"takes all {world_size} ranks; {remedy}"
    )


def _pick_device(
    device: str | torch.device | None, local_rank: int, local_world: int
) -> torch.device:
    """Return this rank's device; if it is a cuda device, make it current."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    picked = torch.device(device)
    if picked.type == "cpu":
        return torch.device("cpu")
    if picked.type != "cuda":
        raise ValueError(f"device={str(picked)!r} is not supported; use 'cpu' or 'cuda'")
    count = torch.cuda.device_count()
    index = local_rank if picked.index is None else picked.index
    if count == 0:
        raise ValueError(
            "no CUDA device is visible; pass device='cpu', or check the driver, torch's CUDA "
            "version and CUDA_VISIBLE_DEVICES"
        )
    if index >= count:
        raise ValueError(
            f"local rank {local_rank} of {local_world} needs cuda:{index}, but this node has "
            f"{count} visible CUDA devices; use torchrun --nproc-per-node {count}, or extend "
            "CUDA_VISIBLE_DEVICES, or pass device='cpu'"
        )
    picked = torch.device("cuda", index)
    torch.cuda.set_device(picked)
    return picked


def _init_process_group(
    env: dict[str, int], device: torch.device, timeout_s: float, join_timeout_s: float
) -> None:
    cuda = device.type == "cuda"
    store: dist.Store = dist.HashStore()  # enough for a single process: opens no port
    if env["WORLD_SIZE"] > 1:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        store = _fresh_store(store, env["RANK"], env["WORLD_SIZE"], join_timeout_s)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=env["RANK"],
        world_size=env["WORLD_SIZE"],
        timeout=timedelta(seconds=timeout_s),
        device_id=device if cuda else None,  # connect eagerly, bound to this device
    )


def _fresh_store(store: dist.Store, rank: int, size: int, timeout_s: float) -> dist.Store:
    """Return `store` under a prefix known only to the ranks of this launch.

    torchrun's agent keeps its store across restarts, with the addresses of dead ranks in it, and a
    rank that reads a stale address cannot connect (pytorch issue 135712).
    TORCHELASTIC_RESTART_COUNT does not help, because each node counts its own restarts. So every
    rank makes up a token, and rank 0 publishes the prefix under a key that contains the token: no
    answer can be stale.
    """
    store = dist.PrefixStore("hdp", store)
    if rank > 0:
        token = uuid.uuid4().hex
        store.set(f"token/{rank}", token)
        try:
            store.wait([f"prefix/{token}"], timedelta(seconds=timeout_s))
        except dist.DistStoreError as error:
            raise ValueError(
                f"rank 0 did not join within {timeout_s:g} s, says rank {rank}; check its output"
            ) from error
        prefix = store.get(f"prefix/{token}").decode()
        store.set(f"{prefix}/joined/{rank}", "")
        store.wait([f"{prefix}/start"], timedelta(seconds=timeout_s + 60))  # rank 0 decides
        if problem := store.get(f"{prefix}/start").decode():
            raise ValueError(problem)
        return dist.PrefixStore(prefix, store)
    prefix = uuid.uuid4().hex
    missing, answered = set(range(1, size)), set()
    deadline = time.monotonic() + timeout_s
    while missing:
        for other in sorted(missing):
            if not store.check([f"token/{other}"]):
                continue
            token = store.get(f"token/{other}").decode()  # may be a dead rank's, until overwritten
            if token not in answered:
                store.set(f"prefix/{token}", prefix)
                answered.add(token)
            elif store.check([f"{prefix}/joined/{other}"]):
                missing.discard(other)
        if time.monotonic() > deadline:
            problem = (
                f"{len(missing)} of {size} ranks did not join within {timeout_s:g} s: "
                f"{', '.join(map(str, sorted(missing)[:8]))}; check their output"
            )
            store.set(f"{prefix}/start", problem)
            raise ValueError(problem)
        time.sleep(0.005)
    store.set(f"{prefix}/start", "")
    return dist.PrefixStore(prefix, store)


# ---- agreement on the plan ----


def agree_on_plan(
    where: HDPMesh | dist.ProcessGroup,
    plan: StepPlan,
    *,
    numbers: Mapping[str, int] | None = None,
) -> None:
    """Raise ValueError on all ranks if any rank has a different plan, which would hang the step.

    where: the mesh, for its HDP ranks, or any process group. The ranks of a tensor parallel group
    or of a pipeline are one HDP rank and need the same plan as well, so pass a group of all. Only
    with a mesh is the plan's hdp_size compared with the number of ranks.

    Each rank computes the plan itself from the same input, so plans differ only if the input does
    (data cache, seed, cost model, version). numbers: more that must be the same, by name: int64,
    the same names on all ranks. Costs one all-reduce of the digest, the numbers and their
    negatives under MAX; call it before the first collective that follows the plan. The message
    names the ranks in the minority and the first difference.
    """
    numbers = numbers or {}
    group = where.hdp_group if isinstance(where, HDPMesh) else where
    if dist.get_world_size(group) > 1:
        device = where.device if isinstance(where, HDPMesh) else device_of(where)
        digest = [int(plan.digest[i : i + 8], 16) for i in range(0, 64, 8)]
        words = torch.tensor([*digest, *numbers.values()])
        extremes = torch.cat([words, -words]).to(device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        highest, lowest_negated = extremes.cpu().split(len(words))
        if not torch.equal(highest[:8], -lowest_negated[:8]):
            raise ValueError(_explain_disagreement(group, plan))
        spans = zip(numbers, (-lowest_negated[8:]).tolist(), highest[8:].tolist(), strict=True)
        for name, lowest, most in spans:
            if lowest != most:
                raise ValueError(
                    f"ranks disagree on this step: {name} is from {lowest} to {most}, so their "
                    "data differs; make sure that all nodes read the same data cache"
                )
    if isinstance(where, HDPMesh) and plan.hdp_size != where.hdp_size:
        raise ValueError(f"plan for hdp_size={plan.hdp_size} on a mesh of {where.hdp_size} ranks")


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where tensors must be for a collective of this group."""
    if "nccl" in str(dist.get_backend_config(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _explain_disagreement(group: dist.ProcessGroup, plan: StepPlan) -> str:
    """Name the ranks that differ from the majority, and the first difference. Collective.

    The text is the same on all ranks.
    """
    size = dist.get_world_size(group)
    digests: list[str] = [""] * size
    dist.all_gather_object(digests, plan.digest, group=group)
    votes = Counter(digests)  # first seen first: a tie goes to the plan of the lowest rank
    majority = votes.most_common(1)[0][0]
    minority = [rank for rank, digest in enumerate(digests) if digest != majority]
    reference = [_contents(plan)]
    source = dist.get_global_rank(group, digests.index(majority))
    dist.broadcast_object_list(reference, src=source, group=group)
    differences: list[str] = [""] * size
    mine = _first_difference(_contents(plan), reference[0])
    dist.all_gather_object(differences, mine, group=group)
    named = ", ".join(map(str, minority[:8])) + (", ..." if len(minority) > 8 else "")
    return (
        f"ranks disagree on the plan of this step: {len(minority)} of {size} ranks "
        f"({named}) differ from the others, rank {minority[0]} first in "
        f"{differences[minority[0]]}. All ranks must plan from the same input: make sure the data "
        "cache, seed, max_tokens_per_rank, cost model and hdp version are the same on all nodes"
    )


def _contents(plan: StepPlan) -> dict[str, object]:
    """The fields that the digest covers, in its order: scalars first, then columns."""
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    names = ("hdp_size", "max_tokens_per_rank", "pp_size", "offloadable")
    scalars = {name: values[name] for name in names}
    return scalars | {name: v for name, v in values.items() if isinstance(v, np.ndarray)}


def _first_difference(mine: dict[str, object], other: dict[str, object]) -> str:
    """The first difference, as "seqlens[17] = 4096, not 4100"; "nothing" for equal contents."""
    for name, theirs in other.items():
        own = mine[name]
        if not (isinstance(own, np.ndarray) and isinstance(theirs, np.ndarray)):
            if own != theirs:
                return f"{name} = {own}, not {theirs}"
            continue
        common = min(len(own), len(theirs))
        unequal = np.flatnonzero(own[:common] != theirs[:common])
        if len(unequal):
            return f"{name}[{unequal[0]}] = {own[unequal[0]]}, not {theirs[unequal[0]]}"
        if len(own) != len(theirs):
            return f"the length of {name} = {len(own)}, not {len(theirs)}"
    return "nothing"
