"""Metrics of a step: the log line, `metrics.jsonl`, and the boards that show them.

    step 120/2000  loss 2.3417  grad 0.87  lr 3.0e-4  tok/s/rank 11,204  mfu 41.3%
    bubble 2.1% (plan 1.8%)  rings 1x412 2x9 8x1  mem 61.2 GiB  dt 3.91 s          (one line)

tok/s/rank  tokens of the step / step time / ranks
mfu         model flops (`ModelFlops`) / time / ranks / peak of one device: `--peak-tflops`, else
            the data sheet's bf16 peak; omitted if neither is known
bubble      share of the step that ranks spend waiting or communicating, mean over ranks; in
            parentheses, the planner's prediction. A * says that ranks share CPU cores: then the
            number holds the time that the operating system gave a core to another rank
rings       number of sequences per ring degree: 412 on one rank, 9 on two, 1 on eight
mem         peak memory of any rank (device memory on a GPU, resident set on a CPU)
accuracy    share of pairs whose chosen answer is preferred; only with pairs (hdp/training/task.py)
kl          of KTO: of the policy from the reference, on answers to other prompts
margin      by how much, in rewards: beta * log-ratio to the reference, or the model's score
dt, eta     time of the step, and the time that is left at the pace of the last steps
host        peak host memory of any rank's offloaded activations; only with offload
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from hdp.console import duration
from hdp.scheduler import StepPlan

from .boards import BoardOptions, Boards

_MOST_IDLE = 64  # numbers in a row, so that metrics.jsonl stays small with thousands of ranks
_SHOWN = ("accuracy", "margin", "kl")  # of an objective's numbers, in the step line


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Metrics of one step over all ranks."""

    step: int
    loss: float  # mean over the step's loss tokens, nats
    grad_norm: float
    lr: float
    num_tokens: int
    num_loss_tokens: int
    num_seqs: int
    total_tokens: int  # since the start of the run
    hdp_size: int
    step_s: float
    tokens_per_s_per_rank: float
    mfu: float | None
    bubble: float
    planned_bubble: float
    planned_s: float
    bytes_sent: int  # within rings, summed over ranks
    mem_bytes: int
    host_bytes: int  # peak of offloaded activations on any rank so far
    data_wait_s: float  # time the step waited for its plan and tokens
    rings: dict[int, int]  # degree -> number of sequences
    idle: tuple[float, ...] = ()  # share of the step in which each rank does not compute; `blocks`
    shared_cores: bool = False  # CPU ranks outnumber cores, so `bubble` and `idle` mean little
    objective: dict[str, float] = field(default_factory=dict)  # what it reports, per pair

    def line(self, num_steps: int, *, eta_s: float | None = None) -> str:
        """The log line. eta_s: seconds to the end of the run; None: not shown."""
        rings = " ".join(f"{degree}x{count}" for degree, count in sorted(self.rings.items()))
        mark = "*" if self.shared_cores else ""
        parts = [
            f"step {self.step}/{num_steps}",
            f"loss {self.loss:.4f}",
            *(f"{name} {self.objective[name]:.3f}" for name in _SHOWN if name in self.objective),
            f"grad {self.grad_norm:.2f}",
            f"lr {_short(self.lr)}",
            f"tok/s/rank {self.tokens_per_s_per_rank:,.0f}",
            f"mfu {self.mfu:.1%}" if self.mfu is not None else "",
            f"bubble {self.bubble:.1%}{mark} (plan {self.planned_bubble:.1%})",
            f"rings {rings}",
            f"mem {self.mem_bytes / 2**30:.1f} GiB",
            f"host {self.host_bytes / 2**30:.1f} GiB" if self.host_bytes else "",
            f"dt {self.step_s:.2f} s",
            f"eta {duration(eta_s)}" if eta_s is not None else "",
        ]
        return "  ".join(part for part in parts if part)


def blocks(shares: Sequence[float]) -> tuple[float, ...]:
    """One value per rank, rounded; of more than 64 ranks, means of blocks of consecutive ranks.

    A block has ceil(ranks / 64) ranks, the last one perhaps fewer.
    """
    size = -(-len(shares) // _MOST_IDLE) or 1
    groups = [shares[i : i + size] for i in range(0, len(shares), size)]
    return tuple(round(math.fsum(group) / len(group), 3) for group in groups)


def ring_counts(plan: StepPlan) -> dict[int, int]:
    """Number of sequences per ring degree."""
    return dict(sorted(Counter(plan.degrees.tolist()).items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlops:
    """Floating-point operations to train a model, forward + backward.

    6 per token and matmul weight applied to it, plus 6 * attention_width * n^2 per layer for causal
    attention: QK^T and PV at 2 * n^2 * width each, half of it masked, times 3 with backward.
    Recomputation to save memory is not counted, and neither is the head on tokens without a label,
    which are skipped (logprobs.py).
    """

    num_params: int  # all but embedding and head
    head_params: int
    num_layers: int
    attention_width: int  # num_heads * head_dim
    is_frozen: bool = False  # the weights: no gradient of theirs is computed, 4 instead of 6

    def of(self, seqlens: Sequence[int], num_loss_tokens: int) -> float:
        """FLOPs for whole sequences of these lengths, with `num_loss_tokens` labels in all."""
        tokens = math.fsum(seqlens)
        squares = math.fsum(n * n for n in seqlens)
        matmuls = self.num_params * tokens + self.head_params * num_loss_tokens
        attention = 6.0 * self.num_layers * self.attention_width * squares
        return (4.0 if self.is_frozen else 6.0) * matmuls + attention


# Dense bf16 peak by device name, flop/s: from vendors' data sheets, without sparsity.
_PEAK_FLOPS = {
    "A10": 125e12,
    "A100": 312e12,
    "A800": 312e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H20": 148e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "MI300X": 1307e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 flop/s, by the longest known name contained in `device_name`; None if unknown.

    Names match whole words: an RTX A1000 is not an A100.
    """
    known = [name for name in _PEAK_FLOPS if re.search(rf"\b{name}\b", device_name)]
    return _PEAK_FLOPS[max(known, key=len)] if known else None


class MetricsWriter:
    """Appends each step to `metrics.jsonl` and sends it to the boards (TensorBoard, W&B).

    A context manager. `enabled=False` (all ranks but one) writes nothing. Existing rows from
    `first_step` on belong to steps that were lost before a resume; they are removed.

    A full disk does not stop training: `say` reports it once, and rows are kept in memory until
    there is room. A board does not survive a failure, so it gets no further rows.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool,
        wandb: str | None = None,
        wandb_mode: str = "online",
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
        first_step: int = 1,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._file: FileIO | None = None
        self.boards = Boards(say)
        self._say = say
        self._unwritten = b""
        self._is_failing = False
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        try:
            if damaged := _keep_steps_before(path, first_step):
                say(f"{path} had damaged rows, which were left out; the file was kept as {damaged}")
        except OSError as error:
            raise ValueError(
                f"cannot read or replace {path}: {error}; repair it, or move it away"
            ) from error
        # Unbuffered: a killed run keeps its last step, and we know exactly what was written.
        self._file = FileIO(path, "a")
        options = BoardOptions(
            tensorboard=tensorboard, wandb=wandb, wandb_mode=wandb_mode, config=config or {}
        )
        self.boards = Boards.open(options, run_dir, first_step=first_step, say=say)

    def write(self, metrics: StepMetrics) -> None:
        """Record a step."""
        values = asdict(metrics)
        self._record(values)
        shares = values["idle"]
        values |= {"idle_max": max(shares), "idle_min": min(shares)} if shares else {}
        self.boards.scalars(metrics.step, {**values, **metrics.objective})

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record other values of a step, such as those of an evaluation, in a row of their own."""
        self._record({"step": step, **values})
        self.boards.scalars(step, values)

    def _record(self, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._unwritten += json.dumps(values).encode() + b"\n"
            self._append()

    def _append(self) -> None:
        """Write pending rows, as far as there is room."""
        assert self._file is not None
        try:
            while self._unwritten:
                written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[written:]
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                self._say(
                    f"cannot write {self._file.name}: {error}; will retry at each logged step"
                )
            self._is_failing = True

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._append()
            if self._unwritten:
                self._say(f"{self._file.name} is missing the last {self._unwritten.count(10)} rows")
            self._file.close()
        self.boards.close(failed=kind is not None)


def _keep_steps_before(path: Path, first_step: int) -> Path | None:
    """Drop rows from `first_step` on, and damaged ones; the file is replaced atomically.

    A file with bytes that are not UTF-8 does not keep a run from resuming: a copy is kept under the
    name that is returned.
    """
    if not path.exists():
        return None
    damaged = None
    kept = []
    text = path.read_bytes().decode("utf-8", "replace")
    if "\ufffd" in text:
        damaged = path.with_name(path.name + ".damaged")
        shutil.copyfile(path, damaged)
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] < first_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    rest = path.with_suffix(".partial")
    rest.write_text("".join(kept), encoding="utf-8")
    rest.replace(path)
    return damaged


def _short(value: float) -> str:
    """3.0e-4 rather than 3.0e-04."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
