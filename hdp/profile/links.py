"""Measure a machine's links: between ring neighbors, among all ranks, between device and host.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m hdp.profile.links

Transfers take the same path as in training: P2P through `RingComm` (one batched send and receive
per rank, all ranks at once, so that shared links are contended), host copies through the offload
engine's pinned slabs and streams. Rates are in bytes per second of one rank in one direction.

    P2P inside a node    each rank to the next rank of its node
    P2P across nodes     each rank to the next rank of the whole axis: the hops over the network
                         are the slowest, and a ring waits for them
    all-reduce           of a tensor of the given size, over all ranks
    host copies          out, back and both at once; by one rank per node, then by all. On a CPU
                         there is no link: plain copies into memory that was touched before

Each link is modeled as a line: seconds = latency + bytes / rate (`fit_line`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hdp import console
from hdp.attention.comm import RingComm
from hdp.distributed.mesh import HDPMesh
from hdp.offloading.streams import IN, OUT, CudaStreams, Streams
from hdp.scheduler.costs.fit import fit_line

from .stopwatch import median_s

Row = dict[str, Any]  # link, bytes, seconds, bytes_per_s

INSIDE, ACROSS, REDUCE = "P2P inside a node", "P2P across nodes", "all-reduce"
HOST_OUT, HOST_BACK, HOST_BOTH = "host out", "host back", "host both ways"
ALONE, TOGETHER = "one rank", "all ranks"


def measure_links(mesh: HDPMesh, *, repeats: int, most_bytes: int | None = None) -> list[Row]:
    """Measure all rows. Collective; the same on all ranks. most_bytes: of the largest message."""
    most = most_bytes or ((256 << 20) if mesh.device.type == "cuda" else (16 << 20))
    sizes = [most >> shift for shift in (10, 8, 6, 4, 2, 0) if most >> shift >= 1024]
    return [
        *measure_p2p(mesh, sizes, repeats=repeats),
        *measure_all_reduce(mesh, sizes, repeats=repeats),
        *measure_host(mesh, most, repeats=repeats),
    ]


def measure_p2p(mesh: HDPMesh, sizes: Sequence[int], *, repeats: int) -> list[Row]:
    """Measure each kind of hop on the axis; no rows for a single rank."""
    node = mesh.hdp_rank // mesh.ranks_per_node * mesh.ranks_per_node
    rings = []
    if mesh.ranks_per_node > 1:
        rings.append((INSIDE, range(node, node + mesh.ranks_per_node)))
    if mesh.hdp_size > mesh.ranks_per_node:
        rings.append((ACROSS, range(mesh.hdp_size)))
    comm = RingComm(mesh.hdp_group, mesh.device)
    rows = []
    for link, ring in rings:
        for num_bytes in sizes:
            call = _shift(comm, ring, mesh.hdp_rank, num_bytes, mesh.device)
            rows.append(_row(mesh, link, num_bytes, call, repeats))
    return rows


def measure_all_reduce(mesh: HDPMesh, sizes: Sequence[int], *, repeats: int) -> list[Row]:
    """Measure fp32 sums over the axis; no rows for a single rank."""
    rows = []
    for num_bytes in sizes if mesh.hdp_size > 1 else ():
        tensor = torch.zeros(num_bytes // 4, device=mesh.device)
        call = _all_reduce(tensor, mesh.hdp_group)
        rows.append(_row(mesh, REDUCE, num_bytes, call, repeats))
    return rows


def measure_host(mesh: HDPMesh, num_bytes: int, *, repeats: int) -> list[Row]:
    """Measure copies in each direction, by one rank per node, then by all if there are several."""
    host = HostCopies(mesh.device, num_bytes)
    rows = []
    for who in (ALONE, TOGETHER) if mesh.ranks_per_node > 1 else (ALONE,):
        busy = who == TOGETHER or mesh.hdp_rank % mesh.ranks_per_node == 0
        for link, call in host.calls.items():
            row = _row(mesh, link, num_bytes, call if busy else _nothing, repeats)
            rows.append({**row, "who": who})
    host.close()
    return rows


class HostCopies:
    """Copies of (num_bytes,) uint8 between the device and host memory."""

    def __init__(
        self, device: torch.device, num_bytes: int, streams: Streams | None = None
    ) -> None:
        if streams is None and device.type == "cuda":
            streams = CudaStreams(device)
        self._streams = streams
        make = self._streams.new_slab if self._streams else _touched
        self._hosts = [make(num_bytes) for _ in range(2)]
        self._locals = [torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self.calls: dict[str, Callable[[], object]] = {
            HOST_OUT: lambda: self._copy(OUT),
            HOST_BACK: lambda: self._copy(IN),
            HOST_BOTH: lambda: self._copy(OUT, IN),
        }

    def _copy(self, *directions: str) -> None:
        """Copy in the given directions at once; on a CPU one after the other."""
        streams = self._streams
        if streams is None:
            for direction in directions:
                self._pair(direction)[0].copy_(self._pair(direction)[1])
            return
        start = streams.record(streams.current())
        for direction in directions:
            streams.wait(direction, start)
            streams.copy(direction, *self._pair(direction))
        for direction in directions:
            streams.wait(streams.current(), streams.record(direction))

    def _pair(self, direction: str) -> tuple[Tensor, Tensor]:
        """(destination, source)."""
        if direction == OUT:
            return self._hosts[0], self._locals[0]
        return self._locals[1], self._hosts[1]

    def close(self) -> None:
        if self._streams is not None:
            self._streams.synchronize()
            for host in self._hosts:
                self._streams.free_slab(host)


def coefficients(rows: Sequence[Row]) -> dict[str, Any]:
    """The CostModel fields that the rows determine."""
    found: dict[str, Any] = {}
    for link, field in ((INSIDE, "intra"), (ACROSS, "inter")):
        mine = [row for row in rows if row["link"] == link]
        if mine:
            line = fit_line([row["bytes"] for row in mine], [row["seconds"] for row in mine])
            found[f"{field}_node_bytes_per_s"] = line[1]
    rates = {row["who"]: row["bytes_per_s"] for row in rows if row["link"] == HOST_BOTH}
    if rates:
        together = rates.get(TOGETHER, rates[ALONE])
        found["ranks_per_host_link"] = max(round(rates[ALONE] / together), 1)
        # So a rank's share of a shared link is the rate it had when all copied at once.
        found["host_bytes_per_s"] = together * found["ranks_per_host_link"]
    return found


def links_table(rows: Sequence[Row]) -> list[list[object]]:
    """Cells for `console.print_table` with LINK_COLUMNS."""
    return [
        [
            row["link"] + (f", {row['who']}" if "who" in row else ""),
            f"{row['bytes'] / 1024:,.0f}",
            f"{1e6 * row['seconds']:,.0f}",
            f"{row['bytes_per_s'] / 1e9:.2f}",
        ]
        for row in rows
    ]


LINK_COLUMNS = ("link", "KiB", "us", "GB/s")


def _row(mesh: HDPMesh, link: str, num_bytes: int, call: Callable[[], object], repeats: int) -> Row:
    seconds = median_s(call, mesh.device, repeats=repeats, group=mesh.hdp_group)
    return {
        "link": link,
        "bytes": num_bytes,
        "seconds": seconds,
        "bytes_per_s": num_bytes / seconds,
    }


def _shift(
    comm: RingComm, ring: range, rank: int, num_bytes: int, device: torch.device
) -> Callable[[], object]:
    send = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    receive = torch.empty_like(send)
    position = rank - ring.start
    peers = ring[(position + 1) % len(ring)], ring[(position - 1) % len(ring)]
    return lambda: comm.swap([(send, peers[0])], [(receive, peers[1])]).wait()


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    return lambda: dist.all_reduce(tensor, group=group)


def _touched(num_bytes: int) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8).add_(1)


def _nothing() -> None:
    """The idle ranks' call while one rank copies."""


def main() -> None:
    torch.set_num_threads(1)
    with HDPMesh.create() as mesh:
        rows = measure_links(mesh, repeats=5)
        if mesh.hdp_rank == 0:
            title = f"{mesh.hdp_size} ranks on {mesh.device.type}, {mesh.ranks_per_node} per node"
            console.print_table(LINK_COLUMNS, links_table(rows), title=title)
            print(coefficients(rows))


if __name__ == "__main__":
    main()
