"""Published shapes of the models that presets name, and the memory of the GPUs in their names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A dense decoder, from its config.json."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False

    @property
    def layer_params(self) -> int:
        """Matrices; norms are a thousandth of a percent."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * q_size + 2 * kv_size)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def outer_params(self) -> int:
        """Embedding and head."""
        return self.hidden_size * self.vocab_size * (1 if self.tied else 2)

    @property
    def num_params(self) -> int:
        return self.num_layers * self.layer_params + self.outer_params


SHAPES = {
    "meta-llama/Llama-3.2-1B": Shape(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "meta-llama/Llama-3.1-8B": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "Qwen/Qwen3-0.6B": Shape(1024, 3072, 28, 16, 8, 128, 151936, tied=True),
    "Qwen/Qwen3-8B": Shape(4096, 12288, 36, 32, 8, 128, 151936),
    "Qwen/Qwen3-32B": Shape(5120, 25600, 64, 64, 8, 128, 151936),
    "mistralai/Mistral-7B-v0.3": Shape(4096, 14336, 32, 32, 8, 128, 32768),
}
# What a process finds free on an idle GPU: about 1.5 GiB less than the memory that is sold.
FREE_BYTES = {"a100": 79.1e9, "h100": 83.4e9, "h200": 149.5e9, "b200": 190e9}
