"""Memory of one rank in a training step: how many tokens its activations leave room for.

A rank holds, with N parameters on R ranks, master weights of m bytes (fp32: 4), compute in e bytes:

    sharded      m N / R each: weights, gradients, two moments of AdamW, the EMA if there is one
    whole        e N gathered weights, since all are gathered once per step; m N gradients, which
                 microbatches add up before the one reduction; buffers of two FSDP units in flight
    per token    what forward saves for backward (activation_plan.py), or with checkpointing each
                 layer's input and one layer's rest; one layer's working memory; ring buffers
    head         one chunk of logits with its gradient, and the fp32 gradient of the head's weight

and what is left over per_token is the number of tokens. `reserve` stays free: allocators fragment,
and libraries take workspaces. Nothing here is measured; `max_tokens` errs on the side of too few
(tests/training/test_capacity.py compares it with the bytes that torch saves).

    memory = rank_memory(shape, num_params=8.03e9, unit_params=1.27e9, ranks=8, ...)
    memory.max_tokens(80e9)
    print(memory.table(80e9))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .activation_plan import decoder_classes
from .estimate import estimate_cost

LOGITS_PER_CHUNK = 2**27  # hdp/models/logprobs.py computes as many logits at once
ROUND_TOKENS = 256
RESERVE_SHARE, RESERVE_BYTES = 0.08, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of one rank: `fixed` and `per_token` by name, and the head's chunk of logits."""

    fixed: dict[str, float]
    per_token: dict[str, float]
    logits_bytes_per_token: float  # of the tokens in one chunk
    chunk_tokens: int

    @property
    def fixed_bytes(self) -> float:
        return sum(self.fixed.values())

    @property
    def bytes_per_token(self) -> float:
        """Without logits."""
        return sum(self.per_token.values())

    def total_bytes(self, tokens: int) -> float:
        """All of a microbatch of `tokens` tokens."""
        logits = self.logits_bytes_per_token * min(tokens, self.chunk_tokens)
        return self.fixed_bytes + self.bytes_per_token * tokens + logits

    def max_tokens(self, device_bytes: float, *, reserve: float | None = None) -> int:
        """The most tokens that fit, a multiple of 256 above that; 0 if nothing fits.

        reserve: bytes that stay free; None: 8 % and 1 GiB.
        """
        room = device_bytes - default_reserve(device_bytes, reserve) - self.fixed_bytes
        per_token = self.bytes_per_token
        tokens = room / (per_token + self.logits_bytes_per_token)
        if tokens > self.chunk_tokens:
            tokens = (room - self.logits_bytes_per_token * self.chunk_tokens) / per_token
        whole = max(int(tokens), 0)
        return whole // ROUND_TOKENS * ROUND_TOKENS if whole >= ROUND_TOKENS else whole

    def table(self, device_bytes: float, tokens: int, *, reserve: float | None = None) -> str:
        """The arithmetic, one line per term, for people."""
        gib = 2.0**30
        lines = [f"{'memory of one rank':40}{device_bytes / gib:9.2f} GiB"]
        kept = default_reserve(device_bytes, reserve)
        terms = {**self.fixed, "reserve": kept}
        lines += [f"  - {name:36}{size / gib:9.2f}" for name, size in terms.items()]
        chunk = min(tokens, self.chunk_tokens)
        logits = self.logits_bytes_per_token * chunk
        lines.append(f"  - {f'logits of {chunk:,} tokens at once':36}{logits / gib:9.2f}")
        room = device_bytes - sum(terms.values()) - logits
        lines.append(f"  = {'room for activations':36}{room / gib:9.2f}")
        for name, size in self.per_token.items():
            lines.append(f"    {name:36}{size / 1024:9.1f} KiB per token")
        lines.append(
            f"{tokens:,} tokens of {self.bytes_per_token / 1024:,.1f} KiB: "
            f"{self.bytes_per_token * tokens / gib:.2f} GiB"
        )
        return "\n".join(lines)


def default_reserve(device_bytes: float, reserve: float | None) -> float:
    """`reserve` if given, else 8 % of the device and 1 GiB."""
    return RESERVE_SHARE * device_bytes + RESERVE_BYTES if reserve is None else reserve


def rank_memory(
    shape: Mapping[str, int],
    *,
    num_params: float,
    unit_params: float,
    ranks: int,
    compute_bytes: int = 2,
    master_bytes: int = 4,
    checkpointing: bool = False,
    ema: bool = False,
    device_type: str = "cuda",
) -> RankMemory:
    """The memory of one rank that trains a decoder of the given shape.

    shape: num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size
    num_params, unit_params: of the model, and of its two largest FSDP units (layers, the rest)
    ranks: over which FSDP shards. compute_bytes, master_bytes: per element
    """
    e, m = compute_bytes, max(master_bytes, compute_bytes)
    hidden, vocab = shape["hidden_size"], shape["vocab_size"]
    layers, head_dim = shape["num_layers"], shape["head_dim"]
    q_size, kv_size = shape["num_heads"] * head_dim, shape["num_kv_heads"] * head_dim
    share = num_params * m / ranks
    fixed = {
        f"weights, 1/{ranks} of {m} bytes": share,
        f"gradients, 1/{ranks}": share,
        f"AdamW, 1/{ranks}": 2 * share,
        **({f"EMA, 1/{ranks}": share} if ema else {}),
        f"gathered weights of {e} bytes": num_params * e,
        f"gradients before reduction, {m} bytes": num_params * m,
        "buffers to gather and reduce": unit_params * (e + m),
        "gradient of the head": hidden * vocab * (m + e),
    }
    cost = estimate_cost(shape, device_type=device_type, bytes_per_element=e)
    sizes: dict[str, Any] = dict(shape)
    saved = sum(c.bytes_per_token for c in decoder_classes(cost, **sizes, bytes_per_element=e))
    inputs = layers * hidden * e
    kept = inputs + (saved - inputs) / layers if checkpointing else saved
    mlp, attention = 3 * shape["intermediate_size"], 3 * (q_size + 2 * kv_size)
    rings = 2 * 2 * kv_size * e + 3 * 2 * kv_size * m + 2 * q_size * m if ranks > 1 else 0
    return RankMemory(
        fixed=fixed,
        per_token={
            "layer inputs, and one layer" if checkpointing else "saved for backward": kept,
            "one layer's working memory": (max(mlp, attention) + 2 * hidden) * e,
            "final norm and head": hidden * (2 * m + 4 * e),
            "ring buffers": rings,
            "token ids and log-probabilities": 64,
        },
        logits_bytes_per_token=2 * vocab * m,  # and their gradient, or a copy on the way to it
        chunk_tokens=max(1, LOGITS_PER_CHUNK // vocab),
    )
