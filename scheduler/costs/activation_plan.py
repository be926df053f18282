"""Keep, offload or recompute: the plan for the tensors a microbatch's forward saves for backward.

A decoder layer saves tensors of a few classes. Each byte can stay on the device, be copied to the
host and back, or be dropped and recomputed (`SavedClass.recompute_s_per_byte`: a norm costs next to
nothing, a matrix product a little, attention is never recomputed). The best mix depends on the
microbatch: the longer its sequences, the more bytes its compute hides on the link.

The microbatch saves `total` bytes and has room for `device_bytes`. With V bytes on the host:

    buffers      w V / l        device bytes for copies in flight, l layers
    recomputed   R = total - device_bytes + w V / l - V, cheapest first, in C(R) seconds
    late         out: V / B beyond forward;  back: V / B beyond backward plus recomputation
    cost(V)      max(C(R), V / B - backward_s) + max(0, V / B - forward_s)

C is convex, so cost is convex too, and piecewise linear with few breakpoints: all are evaluated,
and the smallest V of minimal cost is taken. The classes that cost most to recompute are offloaded.

    classes = decoder_classes(cost, hidden_size=4096, ...)
    plan = plan_activations(classes, num_tokens=n, num_layers=32, forward_s=..., backward_s=...,
                            device_bytes=..., host_bytes_per_s=50e9)
    plan.table()

Invariants (tests/scheduler/test_activation_plan.py): no feasible split on a fine grid is faster;
the shares of a class sum to 1; if nothing fits, a ValueError says how much memory would.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .cost_model import CostModel

KEEP_ONLY = math.inf  # recompute_s_per_byte of a class that cannot be recomputed
# w above: device memory of copies in flight, in units of the bytes that a layer offloads.
# tools/simulate_offload.py finds 1.35 to 2.4.
BUFFER_SHARE = 1.9
LINK_SHARE = 0.9  # usable share of the link's bandwidth: layers send in bursts


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedClass:
    """Saved tensors of all layers that are treated alike. `kind` is the op that produces them: the
    runtime can recompute "pointwise" and "matmul", but not "other"."""

    name: str
    kind: str
    bytes_per_token: float
    recompute_s_per_byte: float = KEEP_ONLY

    def __post_init__(self) -> None:
        if self.kind not in ("pointwise", "matmul", "other"):
            raise ValueError(f"{self.name}: kind {self.kind!r} is not pointwise, matmul or other")
        if not 0 <= self.bytes_per_token < math.inf:
            raise ValueError(
                f"{self.name}: bytes_per_token={self.bytes_per_token} must be finite and >= 0"
            )
        if not self.recompute_s_per_byte >= 0:
            raise ValueError(
                f"{self.name}: recompute_s_per_byte={self.recompute_s_per_byte} must be >= 0"
            )
        if (self.kind == "other") != (self.recompute_s_per_byte == KEEP_ONLY):
            raise ValueError(
                f"{self.name}: recompute_s_per_byte={self.recompute_s_per_byte} for kind "
                f"{self.kind!r}: 'other' cannot be recomputed, leave it unset; other kinds need a "
                "finite value"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassShares:
    """Shares of a class's bytes; they sum to 1."""

    saved: SavedClass
    keep: float
    offload: float
    recompute: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationPlan:
    """What happens to the saved tensors of one microbatch."""

    shares: tuple[ClassShares, ...]
    num_tokens: int
    num_layers: int
    host_bytes: float  # offloaded
    device_bytes: float  # kept, copy buffers included
    recompute_s: float
    late_s: float  # exposed copies

    @property
    def extra_s(self) -> float:
        """Seconds beyond a forward and backward that keep everything."""
        return self.recompute_s + self.late_s

    def recomputed_share(self, kind: str) -> float:
        """Recomputed share of the bytes of a kind."""
        return self._share([t for t in self.shares if t.saved.kind == kind], "recompute")

    @property
    def offload_ratio(self) -> float:
        """Offloaded share of the bytes that are not recomputed."""
        left = sum(t.saved.bytes_per_token * (1 - t.recompute) for t in self.shares)
        sent = sum(t.saved.bytes_per_token * t.offload for t in self.shares)
        return min(sent / left, 1.0) if left else 0.0

    @property
    def bytes_sent_per_layer(self) -> float:
        return self.host_bytes / self.num_layers

    def table(self) -> str:
        """One line per class, for people."""
        lines = [f"{'class':20}{'KB/token':>10}{'keep':>8}{'offload':>9}{'recompute':>11}"]
        for t in self.shares:
            size = t.saved.bytes_per_token / 1024
            lines.append(
                f"{t.saved.name:20}{size:10.1f}{t.keep:8.0%}{t.offload:9.0%}{t.recompute:11.0%}"
            )
        lines.append(
            f"{self.device_bytes / 2**30:.2f} GiB kept, "
            f"{self.host_bytes / 2**30:.2f} GiB offloaded, "
            f"{1e3 * self.recompute_s:.1f} ms to recompute, {1e3 * self.late_s:.1f} ms late"
        )
        return "\n".join(lines)

    @staticmethod
    def _share(shares: Sequence[ClassShares], what: str) -> float:
        total = sum(t.saved.bytes_per_token for t in shares)
        part = sum(t.saved.bytes_per_token * getattr(t, what) for t in shares)
        return min(part / total, 1.0) if total else 0.0


def plan_activations(
    classes: Sequence[SavedClass],
    *,
    num_tokens: int,
    num_layers: int,
    forward_s: float,
    backward_s: float,
    device_bytes: float,
    host_bytes_per_s: float,
    host_bytes: float = math.inf,
    buffer_share: float = BUFFER_SHARE,
) -> ActivationPlan:
    """The fastest plan with which a microbatch's saved tensors fit.

    num_tokens: tokens of the microbatch on this rank; num_layers: layers of the rank
    forward_s, backward_s: its kernels, without copies and recomputation
    device_bytes: room for saved tensors, excluding a layer's working memory
    host_bytes_per_s: this rank's share of its host link, each way; 0: no offload
    host_bytes: room on the host

    Raises ValueError with the smallest device memory that would suffice.
    """
    size = np.array([c.bytes_per_token for c in classes], dtype=np.float64) * num_tokens
    price = np.array([c.recompute_s_per_byte for c in classes], dtype=np.float64)
    order = np.argsort(price, kind="stable")  # cheapest to recompute first
    recomputable = np.where(np.isfinite(price), size, 0.0)[order]
    cheap = np.where(np.isfinite(price), price, 0.0)[order]
    steps_bytes = np.concatenate([[0.0], np.cumsum(recomputable)])
    steps_s = np.concatenate([[0.0], np.cumsum(recomputable * cheap)])
    problem = _Problem(
        total=float(size.sum()),
        device_bytes=device_bytes,
        gain=1.0 - buffer_share / num_layers,
        bytes_per_s=host_bytes_per_s * LINK_SHARE,
        forward_s=forward_s,
        backward_s=backward_s,
        steps_bytes=steps_bytes,
        steps_s=steps_s,
    )
    low, high = problem.limits(host_bytes)
    candidates = problem.candidates(low, high)
    cost = np.array([problem.cost(v) for v in candidates])
    sent = float(candidates[np.flatnonzero(cost <= cost.min() * (1 + 1e-9) + 1e-12)[0]])
    recomputed = problem.recomputed(sent)
    return ActivationPlan(
        shares=_divide(classes, size, order, sent, recomputed),
        num_tokens=num_tokens,
        num_layers=num_layers,
        host_bytes=sent,
        device_bytes=problem.total - sent * problem.gain - recomputed,
        recompute_s=problem.recompute_s(sent),
        late_s=problem.cost(sent) - problem.recompute_s(sent),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """The module docstring's formulas. gain: device bytes freed per offloaded byte."""

    total: float
    device_bytes: float
    gain: float
    bytes_per_s: float
    forward_s: float
    backward_s: float
    steps_bytes: np.ndarray  # C is linear between them
    steps_s: np.ndarray

    def recomputed(self, sent: float) -> float:
        return min(max(self._lacking(sent), 0.0), float(self.steps_bytes[-1]))

    def recompute_s(self, sent: float) -> float:
        return float(np.interp(self.recomputed(sent), self.steps_bytes, self.steps_s))

    def cost(self, sent: float) -> float:
        copy_s = sent / self.bytes_per_s if sent else 0.0
        back_s = max(self.recompute_s(sent), copy_s - self.backward_s)
        return back_s + max(0.0, copy_s - self.forward_s)

    def limits(self, host_bytes: float) -> tuple[float, float]:
        """(least, most) bytes that may be offloaded; recomputed bytes cannot be offloaded too."""
        most = min(host_bytes, self.total) if self.bytes_per_s > 0 and self.gain > 0 else 0.0
        if self._lacking(0.0) <= 0:
            return 0.0, 0.0  # everything fits
        recomputable = float(self.steps_bytes[-1])
        least = 0.0
        if self._lacking(0.0) > recomputable:
            least = (self._lacking(0.0) - recomputable) / self.gain if self.gain > 0 else math.inf
        # sent + recomputed <= total
        both = (self.total - self._lacking(0.0)) / (1.0 - self.gain) if self.gain < 1 else math.inf
        enough = self._lacking(0.0) / self.gain if self.gain > 0 else 0.0
        most = min(most, both, enough)
        if least > most * (1 + 1e-9):
            needed = self.total - recomputable - most * self.gain
            raise ValueError(
                f"saved tensors of {self.total / 2**30:.2f} GiB do not fit in "
                f"{self.device_bytes / 2**30:.2f} GiB: {recomputable / 2**30:.2f} GiB can be "
                f"recomputed and {most / 2**30:.2f} GiB offloaded; "
                f"provide {needed / 2**30:.2f} GiB, or put fewer tokens in a microbatch"
            )
        return min(least, most), most

    def candidates(self, low: float, high: float) -> np.ndarray:
        """All points of [low, high] where the slope of `cost` may change, sorted."""
        points = [low, high, self.bytes_per_s * self.forward_s]
        corners = []
        if self.gain > 0:
            corners = [(self._lacking(0.0) - step) / self.gain for step in self.steps_bytes]
        corners = sorted({low, high, *(c for c in corners if low < c < high)})
        points += corners
        if self.bytes_per_s > 0:
            for a, b in itertools.pairwise(corners):
                # in between, recompute_s falls and the copy back grows: find where they cross
                fa = self.recompute_s(a) - (a / self.bytes_per_s - self.backward_s)
                fb = self.recompute_s(b) - (b / self.bytes_per_s - self.backward_s)
                if fa > 0 > fb:
                    points.append(a + (b - a) * fa / (fa - fb))
        return np.unique(np.clip(points, low, high))

    def _lacking(self, sent: float) -> float:
        return self.total - self.device_bytes - sent * self.gain


def _divide(
    classes: Sequence[SavedClass],
    size: np.ndarray,
    order: np.ndarray,
    sent: float,
    recomputed: float,
) -> tuple[ClassShares, ...]:
    """Recompute the cheapest bytes; offload the most expensive of the rest."""
    recompute, offload = np.zeros(len(classes)), np.zeros(len(classes))
    for c in order:
        if size[c] and math.isfinite(classes[c].recompute_s_per_byte):
            recompute[c] = min(recomputed / size[c], 1.0)
            recomputed = max(recomputed - size[c], 0.0)
    for c in order[::-1]:
        if size[c]:
            offload[c] = min(sent / size[c], 1.0 - recompute[c])
            sent = max(sent - offload[c] * size[c], 0.0)
    return tuple(
        ClassShares(
            saved=saved,
            keep=float(1.0 - offload[c] - recompute[c]),
            offload=float(offload[c]),
            recompute=float(recompute[c]),
        )
        for c, saved in enumerate(classes)
    )


def decoder_classes(
    cost: CostModel,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int | None = None,
    bytes_per_element: int = 2,
    eager_norms: bool = True,
    memory_bytes_per_s: float = 2.5e12,
    **ignored: Any,
) -> list[SavedClass]:
    """Saved classes of a Llama-shaped decoder, over all layers of `cost`; `ignored` is unused.

    Matrix products take their share of the cost model's linear seconds (forward: one third).
    Element-wise results move four times their bytes through device memory. eager_norms: norms of
    several ops, as in transformers, which also save an fp32 copy of their input.
    """
    head_dim = hidden_size // num_heads if head_dim is None else head_dim
    q_size, kv_size, e = num_heads * head_dim, num_kv_heads * head_dim, bytes_per_element
    layers = cost.num_layers
    weights = hidden_size * (2 * q_size + 2 * kv_size + 3 * intermediate_size)
    product_s = cost.linear_s / 3 / weights / layers  # per token, of one weight
    pointwise_s = 4 / memory_bytes_per_s

    def matmul(name: str, rows: int, columns: int) -> SavedClass:
        size = float(layers * columns * e)
        seconds = layers * rows * columns * product_s
        return SavedClass(
            name=name, kind="matmul", bytes_per_token=size, recompute_s_per_byte=seconds / size
        )

    def pointwise(name: str, num_bytes: float) -> SavedClass:
        return SavedClass(
            name=name,
            kind="pointwise",
            bytes_per_token=layers * num_bytes,
            recompute_s_per_byte=pointwise_s,
        )

    norm = hidden_size * (e + (4 + e if eager_norms else 0))
    attention = q_size * e + 4 * num_heads
    return [
        SavedClass(name="layer input", kind="other", bytes_per_token=layers * hidden_size * e),
        pointwise("norm outputs", 2 * norm),
        matmul("QKV", hidden_size, q_size + 2 * kv_size),
        SavedClass(name="attention output", kind="other", bytes_per_token=layers * attention),
        matmul("attention residual", q_size, hidden_size),
        matmul("gate and up", hidden_size, 2 * intermediate_size),
        pointwise("MLP products", 2 * intermediate_size * e),
    ]


def scaled(classes: Sequence[SavedClass], bytes_per_token: float) -> list[SavedClass]:
    """The classes scaled so that their sizes sum to a measured `bytes_per_token`."""
    ratio = bytes_per_token / sum(c.bytes_per_token for c in classes)
    return [replace(c, bytes_per_token=ratio * c.bytes_per_token) for c in classes]


def plan_microbatch(
    cost: CostModel,
    classes: Sequence[SavedClass],
    *,
    num_tokens: int,
    compute_s: float,
    offload_ratio: float,
    host_bytes: float = math.inf,
) -> ActivationPlan:
    """The plan for a microbatch to which a StepPlan gives an offload ratio.

    The ratio says how much must leave the device: (l - 2) / l times the ratio of l layers' bytes
    (ByteScale Eq. 3, where two layers stay). This function decides how. compute_s: seconds of the
    microbatch's kernels, forward + backward. Raises ValueError as plan_activations does.
    """
    total = num_tokens * sum(c.bytes_per_token for c in classes)
    moving = max(cost.num_layers - 2, 0) / cost.num_layers
    return plan_activations(
        classes,
        num_tokens=num_tokens,
        num_layers=cost.num_layers,
        forward_s=cost.forward_share * compute_s,
        backward_s=(1 - cost.forward_share) * compute_s,
        device_bytes=total * (1 - offload_ratio * moving),
        host_bytes_per_s=cost.host_bytes_per_s / cost.ranks_per_host_link,
        host_bytes=host_bytes,
        buffer_share=0.0,  # the two resident layers cover it
    )
