"""Links: every kind is measured, and coefficients follow from the rows."""

from __future__ import annotations

import pytest
import torch

from hdp.distributed.mesh import HDPMesh
from hdp.profile import links
from tests.offloading.twin_streams import TwinStreams
from tests.run_ranks import run_ranks


def links_of_two_ranks(rank: int, world_size: int, ranks_per_node: int) -> list[dict]:
    mesh = HDPMesh.from_group(
        torch.distributed.group.WORLD, device="cpu", ranks_per_node=ranks_per_node
    )
    return links.measure_links(mesh, repeats=1, most_bytes=1 << 18)


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_links_of_two_ranks(ranks_per_node: int) -> None:
    rows, other = run_ranks(links_of_two_ranks, 2, ranks_per_node)
    assert rows == other, "ranks disagree, but the slowest one counts on all"
    hop = links.INSIDE if ranks_per_node == 2 else links.ACROSS
    names = {row["link"] for row in rows}
    assert names == {hop, links.REDUCE, links.HOST_OUT, links.HOST_BACK, links.HOST_BOTH}
    for row in rows:
        assert 1e4 < row["bytes_per_s"] < 1e13, row
    assert {row.get("who") for row in rows} - {None} == (
        {links.ALONE, links.TOGETHER} if ranks_per_node == 2 else {links.ALONE}
    )
    assert len(links.links_table(rows)) == len(rows)


def test_links_become_coefficients() -> None:

    def row(link: str, num_bytes: int, seconds: float, **more: str) -> dict:
        rate = num_bytes / seconds
        return {"link": link, "bytes": num_bytes, "seconds": seconds, "bytes_per_s": rate, **more}

    rows = [row(links.INSIDE, n, 1e-5 + n / 2e11) for n in (1 << 14, 1 << 20, 1 << 26)]
    rows += [row(links.HOST_BOTH, 1 << 26, (1 << 26) / 5e10, who=links.ALONE)]
    rows += [row(links.HOST_BOTH, 1 << 26, (1 << 26) / 1.3e10, who=links.TOGETHER)]
    found = links.coefficients(rows)
    assert found["intra_node_bytes_per_s"] == pytest.approx(2e11, rel=1e-6)
    assert "inter_node_bytes_per_s" not in found
    assert found["ranks_per_host_link"] == 4
    share = found["host_bytes_per_s"] / found["ranks_per_host_link"]
    assert share == pytest.approx(1.3e10), "a rank's share is the rate it had when all copied"
    assert links.coefficients([]) == {}


def test_host_copies_arrive() -> None:
    host = links.HostCopies(torch.device("cpu"), 64)
    host._locals[0].fill_(7)
    host._hosts[1].fill_(9)
    host.calls[links.HOST_BOTH]()
    assert (host._hosts[0] == 7).all()
    assert (host._locals[1] == 9).all()
    host.close()


def test_host_copies_run_both_ways_at_once_and_are_waited_for() -> None:
    """On the offload engine's simulated device: no races, and the time of one direction."""
    size = 1 << 12
    streams = TwinStreams(bytes_per_s=float(size))
    host = links.HostCopies(torch.device("cpu"), size, streams)
    for call, seconds in ((links.HOST_OUT, 1), (links.HOST_BACK, 1), (links.HOST_BOTH, 1)):
        began = streams.now_s
        host.calls[call]()
        assert streams.now_s - began == pytest.approx(seconds), call
    host.close()
    assert not streams.races
