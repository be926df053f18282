"""CostModel: seconds and bytes of a piece, from its length and the number of ranks that share it.

All times are seconds for forward plus backward on one rank, over all layers that the rank holds
(with pipeline parallelism: those of one stage). A sequence of L tokens on d ranks takes

    attention   quadratic_s * (L^2 / d + small_shard_tokens * L)
    the rest    linear_s * L / d
    ring steps  ring_step_s * (d - 1)
    exposed     (d - 1) * max(0, L / d * kv_bytes_per_token / bandwidth - attention / d)

A block of x queries against x keys runs at x / (x + small_shard_tokens) of full speed, and each
rank runs d such blocks with x = L / d: hence the small-shard term, which no degree reduces. KV
travels while the previous block is computed; only the excess is exposed. The bandwidth is that of
the slowest link of the ring: inside a node, or across nodes.

These formulas are for a ring that passes keys around. A ring of a single sequence may instead be
*gathered*: each rank fetches all keys at once and runs 3 blocks with 2 merges, whatever d is. Half
of the transfer (keys, not their gradients) hides under the first block, the rank's own shard:

    attention   quadratic_s * (L^2 / d + small_shard_tokens * L * 3 / d)
    the rest    linear_s * L / d
    ring steps  ring_step_s * 2
    exposed     t - min(t / 2, first block),  t = (d - 1) * L / d * kv_bytes_per_token / bandwidth

gathering.py says when that is allowed, and when it is faster.

A microbatch takes `fixed_s` plus the sum of its pieces, and a step ends with `reduce_s` for the
reduction of gradients. Bytes: see `offloadable`, `hidden_ratio` (ByteScale Eq. 3).

    cost = CostModel.from_coefficients(quadratic_s=5.128e-9, linear_s=1.84e-4)
    cost.piece_s(262144, 32)            # seconds on each of 32 ranks
    cost.save("cost.json"); CostModel.load("cost.json")
    CostModel.preset("h200")            # ships with the package: presets/h200.json

A file may also have a `report`: where the coefficients come from, what was measured, how far the
fit is off (`hdp profile` writes it). It is for people; a CostModel does not keep it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from hdp.scheduler.plain import parse_json, read_bytes, real, shown, to_plain

FORMAT_VERSION = 1
_MOST_COUNT = 2**20  # layers; with more, offloadable would round to 1
_PRESETS = Path(__file__).with_name("presets")

# A gathered ring runs 3 blocks and 2 merges, no fewer than a plain ring of 3 ranks.
GATHER_LEAST_RANKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds and bytes of a piece, from its length and the number of ranks that share it.

    The fields are the coefficients of the formulas in this module's docstring: quadratic_s and
    linear_s are the a and b of ByteScale Eq. 3, over all layers of a rank, forward plus backward.
    `name` says what was measured, and where. Raises ValueError for negative or non-finite values.
    """

    quadratic_s: float  # seconds per token^2 of a sequence: attention
    linear_s: float  # seconds per token: everything else
    fixed_s: float = 0.0  # seconds per microbatch, whatever its contents
    small_shard_tokens: float = 0.0  # shard size at which attention runs at half speed
    ring_step_s: float = 0.0  # seconds per ring step on top of its blocks: launches, merge, latency
    kv_bytes_per_token: float = 0.0  # bytes sent per token and ring step, forward + backward
    intra_node_bytes_per_s: float = math.inf  # one rank's P2P bandwidth inside a node
    inter_node_bytes_per_s: float = math.inf  # one rank's P2P bandwidth across nodes
    activation_bytes_per_token: float = 0.0  # bytes per token saved for backward
    temporary_bytes_per_token: float = 0.0  # bytes per token that live only within a layer
    num_layers: int = 1  # layers that the rank holds
    host_bytes_per_s: float = 0.0  # one host link, each direction with both active; 0: none
    ranks_per_host_link: int = 1  # ranks that share it
    host_memory_bytes: float = math.inf  # host memory that one rank's activations may take
    forward_share: float = 1 / 3  # forward's share of a microbatch's time
    reduce_s: float = 0.0  # seconds of the gradient reduction that ends a step
    name: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name == "name":
                continue
            value = real(f"cost model: {field.name}", getattr(self, field.name))
            may_be_inf = (
                field.name.endswith("node_bytes_per_s") or field.name == "host_memory_bytes"
            )
            if value < 0 or (math.isinf(value) and not may_be_inf):
                raise ValueError(f"cost model: {field.name}={value} must be finite and >= 0")
            if field.type == "int" and value != int(value):
                raise ValueError(f"cost model: {field.name}={value} must be a whole number")
            if field.type == "int" and value > _MOST_COUNT:
                raise ValueError(f"cost model: {field.name}={value} must be at most {_MOST_COUNT}")
            object.__setattr__(self, field.name, int(value) if field.type == "int" else value)
        if not isinstance(self.name, str):
            raise ValueError(f"cost model: name={shown(self.name)} must be text")
        for name, low in (
            ("num_layers", 1),
            ("ranks_per_host_link", 1),
            ("intra_node_bytes_per_s", 1.0),
            ("inter_node_bytes_per_s", 1.0),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"cost model: {name}={getattr(self, name)} must be >= {low}")
        if not 0 < self.forward_share < 1:
            raise ValueError(f"cost model: forward_share={self.forward_share} must be in (0, 1)")
        if not self.quadratic_s + self.linear_s > 0:
            raise ValueError("cost model: quadratic_s and linear_s are both 0; fit it first")

    # ---- time ----

    def attention_s(self, seqlen: Any, degree: Any, gathered: Any = False) -> np.ndarray:
        """Seconds of attention kernels on each rank, forward + backward. Broadcasts."""
        seqlen = np.asarray(seqlen, dtype=np.float64)
        blocks = np.where(gathered, 3.0 / np.asarray(degree), 1.0)  # relative to the d of a ring
        return self.quadratic_s * (
            seqlen * seqlen / degree + self.small_shard_tokens * seqlen * blocks
        )

    def compute_s(self, seqlen: Any, degree: Any, gathered: Any = False) -> np.ndarray:
        """Seconds of all kernels of a piece on each rank, forward + backward. Broadcasts."""
        seqlen = np.asarray(seqlen, dtype=np.float64)
        steps = np.where(gathered, 2, np.asarray(degree) - 1)
        dense_s = self.linear_s * seqlen / degree
        return self.attention_s(seqlen, degree, gathered) + dense_s + self.ring_step_s * steps

    def transfer_s(self, seqlen: Any, degree: Any, across_nodes: Any = False) -> np.ndarray:
        """Seconds of transfer of one ring step of a piece, forward + backward. Broadcasts."""
        slowest = min(self.inter_node_bytes_per_s, self.intra_node_bytes_per_s)
        bytes_per_s = np.where(across_nodes, slowest, self.intra_node_bytes_per_s)
        return np.asarray(seqlen, dtype=np.float64) / degree * self.kv_bytes_per_token / bytes_per_s

    def exposed_s(
        self, seqlen: Any, degree: Any, across_nodes: Any = False, gathered: Any = False
    ) -> np.ndarray:
        """Seconds of a piece's P2P that attention does not hide, on each rank. Broadcasts."""
        steps = np.asarray(degree) - 1
        block_s = self.attention_s(seqlen, degree) / degree
        transfer_s = self.transfer_s(seqlen, degree, across_nodes)
        all_s = steps * transfer_s
        return np.where(
            gathered,
            all_s - np.minimum(all_s / 2, block_s),
            steps * np.maximum(transfer_s - block_s, 0.0),
        )

    def piece_s(
        self, seqlen: Any, degree: Any, across_nodes: Any = False, gathered: Any = False
    ) -> np.ndarray:
        """Seconds of a piece on each of its ranks, forward + backward, without `fixed_s`.

        seqlen: tokens of the whole sequence; degree: ranks that share it; across_nodes: whether
        they span more than one node; gathered: whether its ring is gathered instead of passing keys
        around. Numbers or broadcastable arrays; returns float64.
        """
        exposed_s = self.exposed_s(seqlen, degree, across_nodes, gathered)
        return self.compute_s(seqlen, degree, gathered) + exposed_s

    def unit_s(
        self,
        squares: Any,
        tokens: Any,
        degree: Any,
        across_nodes: Any = False,
        may_gather: Any = False,
    ) -> np.ndarray:
        """Seconds of pieces that share one ring, on each of its ranks, without `fixed_s`.

        They share the ring's steps, so only sums over the pieces matter: `squares` of their squared
        lengths, `tokens` of their lengths. For one piece this equals piece_s, and where it
        `may_gather`, the faster of the two modes. Broadcasts.
        """
        steps = np.asarray(degree) - 1
        attention_s = self.quadratic_s * (squares / degree + self.small_shard_tokens * tokens)
        kernels_s = attention_s + self.linear_s * tokens / degree + self.ring_step_s * steps
        late_s = self.transfer_s(tokens, degree, across_nodes) - attention_s / degree
        round_s = kernels_s + steps * np.maximum(late_s, 0.0)
        if may_gather is False:
            return round_s
        may_gather = may_gather & (steps >= GATHER_LEAST_RANKS - 1) & ~np.asarray(across_nodes)
        if not may_gather.any():
            return round_s
        gathered_s = self.piece_s(tokens, degree, gathered=True)
        return np.where(may_gather, np.minimum(round_s, gathered_s), round_s)

    # ---- memory ----

    @property
    def offloadable(self) -> float:
        """Share of a token's memory that offload ratio 1 moves to the host, in [0, 1).

        Two layers stay resident (the one running and the one being fetched), and temporary buffers
        never move: (l - 2) * act / (l * act + temporary), with act bytes per layer and l layers.
        """
        if self.host_bytes_per_s <= 0 or self.activation_bytes_per_token <= 0:
            return 0.0
        moving = max(self.num_layers - 2, 0) / self.num_layers * self.activation_bytes_per_token
        return moving / (self.activation_bytes_per_token + self.temporary_bytes_per_token)

    @property
    def host_s_per_token(self) -> float:
        """Seconds to copy one token one way at ratio 1, over a rank's share of its host link."""
        if self.offloadable == 0.0:
            return 0.0
        moving = (self.num_layers - 2) / self.num_layers * self.activation_bytes_per_token
        return moving * self.ranks_per_host_link / self.host_bytes_per_s

    def hidden_ratio(self, seqlen: Any) -> np.ndarray:
        """Largest offload ratio that forward's compute hides, in [0, 1] (Eq. 3). Broadcasts.

        Compute and bytes both divide by the degree, so the ratio does not depend on it.
        """
        seqlen = np.asarray(seqlen, dtype=np.float64)
        if self.host_s_per_token == 0.0:
            return np.zeros_like(seqlen)
        forward_s = self.forward_share * self.compute_s(seqlen, 1)
        return np.minimum(forward_s / (seqlen * self.host_s_per_token), 1.0)

    def offload_s(self, num_tokens: Any, ratio: Any, compute_s: Any) -> np.ndarray:
        """Seconds of host copies that a microbatch's compute does not hide. Broadcasts.

        num_tokens: tokens of the microbatch on the rank; ratio: share of them that is offloaded;
        compute_s: seconds of its kernels, forward + backward. Copies go out in forward and return
        in backward.
        """
        one_way_s = np.asarray(num_tokens) * ratio * self.host_s_per_token
        forward_s = self.forward_share * np.asarray(compute_s)
        out_s = np.maximum(one_way_s - forward_s, 0.0)
        back_s = np.maximum(one_way_s - (np.asarray(compute_s) - forward_s), 0.0)
        return out_s + back_s

    # ---- construction, JSON ----

    @classmethod
    def from_coefficients(
        cls, *, quadratic_s: float, linear_s: float, fixed_s: float = 0.0, **others: Any
    ) -> CostModel:
        """Cost model from seconds per token^2, per token and per microbatch (forward + backward).

        `others` are further fields by name; by default communication and memory are free.
        """
        return cls(quadratic_s=quadratic_s, linear_s=linear_s, fixed_s=fixed_s, **others)

    @classmethod
    def from_transformer(
        cls,
        *,
        num_layers: int,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_kv_heads: int,
        vocab_size: int,
        head_dim: int | None = None,
        flops_per_s: float = 400e12,
        attention_flops_per_s: float | None = None,
        intra_node_bytes_per_s: float = 150e9,
        inter_node_bytes_per_s: float = 40e9,
        host_bytes_per_s: float = 0.0,
        bytes_per_element: int = 2,
        pp_size: int = 1,
        tp_size: int = 1,
        **others: Any,
    ) -> CostModel:
        """Cost model of a Llama-shaped decoder (gated MLP, GQA), from arithmetic alone.

        flops_per_s and attention_flops_per_s (default: the same) are what one GPU sustains, not its
        peak. For a mixture of experts, intermediate_size is the sum over the active experts.
        Forward + backward is 3x forward for matmuls, 3.5x for causal attention (2 L^2 heads *
        head_dim forward FLOPs per layer). Rings carry KV in forward, and KV and its fp32 gradients
        in backward. `others` are further fields by name and override derived values.
        """
        if num_layers % pp_size:
            raise ValueError(f"num_layers={num_layers} is not divisible by pp_size={pp_size}")
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        layers, q_size, kv_size = (
            num_layers // pp_size,
            num_heads * head_dim,
            num_kv_heads * head_dim,
        )
        matrix = hidden_size * (2 * q_size + 2 * kv_size + 3 * intermediate_size)
        linear_flops = 3 * 2 * (layers * matrix + hidden_size * vocab_size / pp_size) / tp_size
        quadratic_flops = 3.5 * 2 * layers * q_size / tp_size
        # Norm inputs and outputs, q k v before and after RoPE, attention output, 4 MLP tensors.
        kept = 4 * hidden_size + 3 * q_size + 3 * kv_size + 4 * intermediate_size
        derived: dict[str, Any] = {
            "quadratic_s": quadratic_flops / (attention_flops_per_s or flops_per_s),
            "linear_s": linear_flops / flops_per_s,
            "kv_bytes_per_token": layers * 2 * kv_size / tp_size * (2 * bytes_per_element + 4),
            "intra_node_bytes_per_s": intra_node_bytes_per_s,
            "inter_node_bytes_per_s": inter_node_bytes_per_s,
            "activation_bytes_per_token": layers * kept * bytes_per_element / tp_size,
            "temporary_bytes_per_token": (
                (3 * intermediate_size + 4 * hidden_size) * bytes_per_element / tp_size
            ),
            "num_layers": layers,
            "host_bytes_per_s": host_bytes_per_s,
        }
        return cls(**{**derived, **others})

    def to_json(self, report: dict[str, Any] | None = None) -> str:
        """JSON text; an infinite bandwidth is null. report: see the module docstring."""
        values = {k: None if v == math.inf else v for k, v in asdict(self).items()}
        more = {} if report is None else {"report": to_plain(report, "report")}
        return json.dumps({"version": FORMAT_VERSION, **values, **more}, indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> CostModel:
        """Inverse of `to_json`. Raises ValueError for text that is not a cost model."""
        data = parse_json(text, "a CostModel")
        if not isinstance(data, dict) or "version" not in data:
            raise ValueError("not a CostModel in JSON: no object with a field 'version'")
        version = data.pop("version")
        data.pop("report", None)
        if isinstance(version, bool) or version != FORMAT_VERSION:
            raise ValueError(f"cost model has version {shown(version)}, expected {FORMAT_VERSION}")
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown or not {"quadratic_s", "linear_s"} <= set(data):
            raise ValueError(
                "cost model: quadratic_s and linear_s are required, others must be fields of "
                f"CostModel; has {shown(sorted(data))}, unknown: {shown(unknown)}"
            )
        values: dict[str, Any] = {k: math.inf if v is None else v for k, v in data.items()}
        return cls(**values)

    def save(self, path: str | Path, report: dict[str, Any] | None = None) -> None:
        """Write a JSON file for `load` and `--cost`. report: see the module docstring."""
        Path(path).write_text(self.to_json(report) + "\n", encoding="ascii")

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """Inverse of `save`. Raises ValueError with the path if it holds no cost model."""
        try:
            return cls.from_json(read_bytes(path))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"no cost model in {path}: {reason}; `hdp profile` writes one"
            ) from error

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names that `preset` takes."""
        return tuple(sorted(path.stem for path in _PRESETS.glob("*.json")))

    @classmethod
    def preset(cls, name: str) -> CostModel:
        """A cost model that ships with the package; "h200" is LLaMA-7B on H200s (h200.py).

        Raises ValueError for an unknown name, listing the presets.
        """
        if name not in cls.presets():
            raise ValueError(f"no cost model preset {name!r}{_known(name, cls.presets())}")
        return cls.load(_PRESETS / f"{name}.json")

    @classmethod
    def find(cls, source: str) -> CostModel:
        """The cost model that `--cost SOURCE` names: the file at this path if any, else a preset.

        Raises ValueError if it is neither.
        """
        is_preset = source in cls.presets()
        if Path(source).exists() and not (is_preset and Path(source).is_dir()):
            return cls.load(source)
        if is_preset:
            return cls.preset(source)
        raise ValueError(
            f"no cost model in {source}: neither a file nor a preset"
            f"{_known(source, cls.presets())}; `hdp profile` measures a machine and writes a file"
        )


def _known(name: str, presets: Sequence[str]) -> str:
    """End of an error message about an unknown name: the closest preset, and all of them."""
    meant = get_close_matches(name, presets, n=1)
    guess = f"did you mean {meant[0]!r}? " if meant else ""
    return f" ({guess}presets: {', '.join(presets)})"
