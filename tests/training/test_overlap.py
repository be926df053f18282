"""Keys travel while attention computes: shown by call order, by CUDA events, and in a trace."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hdp.attention.kernels import KERNELS, select_kernel
from hdp.attention.layout import RingLayout
from hdp.attention.ring import ring_attn_varlen_func
from tests.patience import patience

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def tool(name: str):
    """Import a script of tools/ as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


class Logged:
    """A block kernel that logs when it runs."""

    def __init__(self, inner, log: list) -> None:
        self.name, self._inner, self._log = inner.name, inner, log

    def forward(self, q, k, v, segments, softmax_scale):
        self._log.append("causal" if segments.causal else "block")
        return self._inner.forward(q, k, v, segments, softmax_scale)

    def backward(self, dout, q, k, v, out, lse, segments, softmax_scale):
        self._log.append("causal" if segments.causal else "block")
        return self._inner.backward(dout, q, k, v, out, lse, segments, softmax_scale)


def logged_comm(gathered: bool, log: list):
    """An emulated ring of three that logs sends and waits."""
    emulated = tool("emulated_ring")
    sequence = emulated.Sequence.random(48, 4, 2, 16, torch.device("cpu"))
    layout = emulated.ring_layout(48, 3, 1, gathered=gathered)

    class Comm(emulated.EmulatedComm):
        def note(self, tensor, arrival):
            payload = "grads" if tensor.dtype == torch.float32 else "keys"
            log.append(f"send {payload}")
            wait = arrival.wait
            arrival.wait = lambda: (log.append(f"wait {payload}"), wait())[1]
            return arrival

        def shift(self, tensor, ring, ring_rank, recv_shape):
            return self.note(tensor, super().shift(tensor, ring, ring_rank, recv_shape))

        def swap(self, sends, receives):
            return self.note(sends[0][0], super().swap(sends, receives))

    return Comm(sequence, layout), layout, sequence


@pytest.mark.parametrize(
    ("gathered", "forward", "backward"),
    [
        (
            False,
            ["send keys", "causal", "wait keys", "send keys", "block", "wait keys", "block"],
            [
                *("send keys", "causal", "send grads"),
                *("wait keys", "send keys", "block", "wait grads", "send grads"),
                *("wait keys", "block", "wait grads", "send grads"),
                "wait grads",
            ],
        ),
        (
            True,
            ["send keys", "causal", "wait keys", "block", "block"],
            [
                *("send keys", "causal", "wait keys", "block", "block"),
                *("send grads", "wait grads"),
            ],
        ),
    ],
    ids=["ring", "gathered"],
)
def test_every_transfer_is_posted_before_the_work_that_hides_it(
    gathered, forward, backward
) -> None:
    log: list[str] = []
    comm, layout, sequence = logged_comm(gathered, log)
    q, k, v, dout = sequence.shard(3, 1)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    kernel = Logged(KERNELS["reference"](), log)
    out = ring_attn_varlen_func(*leaves, layout, comm=comm, kernel=kernel)
    assert log == forward
    log.clear()
    torch.autograd.grad(out, leaves, dout)
    assert log == backward


def test_without_a_ring_nothing_is_sent() -> None:
    log: list[str] = []
    comm, _, sequence = logged_comm(False, log)
    layout = RingLayout(local_seqlens=(40, 8))
    leaves = [x.requires_grad_() for x in (sequence.q, sequence.k, sequence.v)]
    kernel = Logged(KERNELS["reference"](), log)
    out = ring_attn_varlen_func(*leaves, layout, comm=comm, kernel=kernel)
    torch.autograd.grad(out, leaves, sequence.dout)
    assert log == ["causal", "causal"]


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("ring_size", [2, 3, 8])
def test_emulated_ring_gives_the_rows_of_the_whole_sequence(ring_size: int, gathered: bool) -> None:
    """The ring in benchmarks and traces computes correct results: out and dq of each position."""
    torch.manual_seed(0)
    emulated = tool("emulated_ring")
    whole = emulated.Sequence.random(101, 4, 2, 16, torch.device("cpu"))
    leaves = [x.requires_grad_() for x in (whole.q, whole.k, whole.v)]
    kernel = KERNELS["reference"]()
    full = RingLayout(local_seqlens=(101,))
    want_out = ring_attn_varlen_func(*leaves, full, kernel=kernel)
    want_dq = torch.autograd.grad(want_out, leaves, whole.dout)[0]
    whole = emulated.Sequence(**{n: getattr(whole, n).detach() for n in ("q", "k", "v", "dout")})
    for position in range(ring_size):
        layout = emulated.ring_layout(101, ring_size, position, gathered=gathered)
        comm = emulated.EmulatedComm(whole, layout)
        for _ in range(2):  # the communicator resets itself
            q, k, v, dout = whole.shard(ring_size, position)
            parts = [x.requires_grad_() for x in (q, k, v)]
            out = ring_attn_varlen_func(*parts, layout, comm=comm, kernel=kernel)
            dq = torch.autograd.grad(out, parts, dout)[0]
        rows = whole.rows(ring_size, position)
        for got, want in ((out, want_out[rows]), (dq, want_dq[rows])):
            error = (got.double() - want.double()).norm() / want.double().norm()
            assert error < 1e-2, f"position {position}: {error:.1e}"


# ---- the tool that reads traces ----


def kernel(name: str, stream: int, start: float, end: float, cat: str = "kernel") -> dict:
    return {"cat": cat, "name": name, "args": {"stream": stream}, "ts": start, "dur": end - start}


@pytest.mark.parametrize(
    ("events", "transfers", "overlapped", "before_first"),
    [
        ([], 0, 0, 0),
        (
            [
                kernel("flash", 7, 0, 10),
                kernel("merge", 7, 10, 12),
                kernel("flash", 7, 20, 30),
                kernel("ncclDevKernel_SendRecv", 20, 2, 5),
                kernel("ncclDevKernel_SendRecv", 20, 11, 15),
            ],
            *(7, 4, 5),
        ),
        (
            [
                kernel("flash", 7, 0, 10),
                kernel("copy", 9, 2, 4),
                kernel("Memcpy DtoD (Device -> Device)", 9, 8, 14, "gpu_memcpy"),
                kernel("Memcpy DtoD (Device -> Device)", 7, 14, 15, "gpu_memcpy"),
                {"cat": "cpu_op", "name": "nccl:send", "args": {}, "ts": 0, "dur": 99},
            ],
            *(8, 4, 4),
        ),
    ],
    ids=["empty", "nccl", "emulated"],
)
def test_overlap_is_read_off_a_trace(events, transfers, overlapped, before_first) -> None:
    found = tool("trace_overlap").read_trace({"traceEvents": events})
    assert (found.transfers_us, found.overlapped_us) == (transfers, overlapped)
    assert found.before_first_us == before_first
    assert found.hidden == (overlapped / transfers if transfers else 0)


def test_the_tool_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--tokens=64", "--heads=2", "--kv-heads=1", "--head-dim=16", "--ring-size=4", "--json"]
    for more in ([], ["--gathered"]):
        assert tool("trace_overlap").main([*small, *more, "--out", str(tmp_path / "t.json")]) == 0
        if not torch.cuda.is_available():
            assert json.loads(capsys.readouterr().out)["transfers_us"] == 0
        assert (tmp_path / "t.0.json").exists()


# ---- on GPUs ----


@pytest.mark.gpu
@pytest.mark.parametrize("gathered", [False, True])
def test_gpu_first_block_does_not_wait_for_keys(gathered: bool) -> None:
    """With a transfer of 100 ms, the first block finishes long before the next keys arrive."""
    emulated = tool("emulated_ring")
    device = torch.device("cuda")
    sequence = emulated.Sequence.random(8192, 8, 2, 128, device)
    layout = emulated.ring_layout(8192, 4, 2, gathered=gathered)
    q, k, v, _ = sequence.shard(4, 2)
    arrivals, blocks = [], []

    class Slow(emulated.EmulatedComm):
        def _copied(self, pairs):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                torch.cuda._sleep(200_000_000)  # cycles: 0.1 s at 2 GHz
            arrival = super()._copied(pairs)
            with torch.cuda.stream(self._stream):
                arrivals.append(torch.cuda.Event(enable_timing=True))
                arrivals[-1].record()
            return arrival

    class Timed(Logged):
        def forward(self, *args):
            result = super().forward(*args)
            blocks.append(torch.cuda.Event(enable_timing=True))
            blocks[-1].record()
            return result

    inner = select_kernel(device, torch.bfloat16, head_dim=128)
    comm = Slow(sequence, layout, copies=True)
    for _ in range(2):  # the first run compiles
        arrivals.clear()
        blocks.clear()
        ring_attn_varlen_func(q, k, v, layout, comm=comm, kernel=Timed(inner, []))
        torch.cuda.synchronize()
    assert blocks[0].elapsed_time(arrivals[0]) > 50, "the first block waited for a transfer"
    assert arrivals[0].elapsed_time(blocks[1]) > 0, "a block ran before its keys had arrived"


@pytest.mark.gpu
def test_gpu_transfers_overlap_with_compute_in_a_trace(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "trace_overlap.py"), "--json", "--tokens", "65536"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "t.json")],
        capture_output=True,
        text=True,
        timeout=patience(300),
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["hidden"] > 0.5, figures
    assert figures["before_first_us"] > 0, figures


@pytest.mark.gpu
def test_gpu_nccl_transfers_overlap_with_compute(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(torch.cuda.device_count())]
    command += [str(TOOLS / "trace_overlap.py"), "--json", "--out", str(tmp_path / "t.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(300))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["hidden"] > 0.5, figures
    assert figures["before_first_us"] > 0, figures
