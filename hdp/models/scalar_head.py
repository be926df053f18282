"""ScalarHeadLM: numbers per token instead of log-probabilities. Reward models, critics, Q-values.

The language model's head is taken off, and a matrix of num_outputs rows put in its place; the rest
of the forward is `CausalLM`'s. The parts have the names that transformers' sequence classifiers
give them, so a trained reward model loads with AutoModelForSequenceClassification.

    critic = ScalarHeadLM.from_causal_lm(load_model("Qwen/Qwen3-0.6B"))
    values = critic(batch, comm)                      # (total_tokens,)

Row i is computed from the tokens up to i: as a critic's, it is the value of the state before the
token that row i predicts; as a reward model's, the score of the answer that ends at i.

Invariants (tests of the same names in tests/models/test_scalar_head.py): equals_plain_classifier in
values and gradients; rank0_weights_count, of the new head, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_lm import AttnInputs, CausalLM, last_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hdp.attention.comm import RingComm
    from hdp.data.pack import PackedBatch


class ScalarHeadLM(nn.Module):
    """A causal LM's layers under a head of `num_outputs` numbers per token.

    backbone: a transformers model without head. score: the head, (num_outputs, hidden_size),
    without bias. The rest is `CausalLM`'s. FSDP2's root module, like that.
    """

    def __init__(self, backbone: nn.Module, score: nn.Linear, source: CausalLM) -> None:
        super().__init__()
        self.model: Any = backbone
        self.score = score
        self.kernels, self.stored_dtype = source.kernels, source.stored_dtype

    @classmethod
    def from_causal_lm(
        cls, model: CausalLM, *, num_outputs: int = 1, seed: int = 0
    ) -> ScalarHeadLM:
        """The layers of `model`, which it shares, under a new random head.

        seed: of the head, normal with the config's initializer_range. Raises ValueError unless
        num_outputs is at least 1.
        """
        if num_outputs < 1:
            raise ValueError(f"num_outputs={num_outputs} must be at least 1")
        config, weight = model.config, next(model.parameters())
        score = nn.Linear(
            config.hidden_size, num_outputs, bias=False, device=weight.device, dtype=weight.dtype
        )
        generator = torch.Generator().manual_seed(seed)
        std = getattr(config, "initializer_range", None) or 0.02
        with torch.no_grad():
            drawn = torch.randn(score.weight.shape, generator=generator, dtype=torch.float64)
            if not weight.is_meta:
                score.weight.copy_(drawn * std)
        return cls(model.model.base_model, score, model).train(model.training)

    @property
    def num_outputs(self) -> int:
        """Numbers per token."""
        return self.score.out_features

    @property
    def config(self) -> PreTrainedConfig:
        """The transformers config of the layers."""
        return cast("PreTrainedConfig", self.model.config)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers: FSDP2's units."""
        return cast(nn.ModuleList, self.model.layers)

    def forward(self, batch: PackedBatch, comm: RingComm | None = None) -> Tensor:
        """(total_tokens,) numbers, or (total_tokens, num_outputs) if there are several.

        fp32 (fp64 for fp64 weights). batch: on the model's device. comm: required when batch.layout
        has a ring.
        """
        hidden = last_hidden(self.model, batch, AttnInputs(batch.layout, comm, self.kernels))
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # In fp32: bf16 could not tell the scores of two good answers apart.
        outputs = F.linear(hidden.to(dtype), self.score.weight.to(dtype))
        return outputs[:, 0] if self.num_outputs == 1 else outputs
