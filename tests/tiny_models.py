"""Tiny Hugging Face models, their packed batches, and the plain model as an oracle."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from hdp.data.pack import PackedBatch, Sample, pack_rank
from hdp.models.causal_lm import CausalLM
from hdp.models.loading import build_model
from hdp.scheduler import StepPlan

VOCAB = 61
_TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SPECIAL = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 16},  # not hidden_size / num_attention_heads
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0]},
}


def tiny_config(model_type: str = "llama", **overrides) -> dict:
    return {"model_type": model_type, **_TINY, **_SPECIAL.get(model_type, {}), **overrides}


def tiny_model(
    model_type: str = "llama", *, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides
) -> CausalLM:
    """A model whose biases and norms are not the zeros and ones of a freshly built one."""
    model = build_model(tiny_config(model_type, **overrides), dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (0.05 * noise).to(dtype)
    return model


def keep_norms_exact(model: nn.Module) -> nn.Module:
    """Make RMS norms compute in the dtype of their input.

    transformers' norms round to fp32 even in an fp64 model. Two runs that differ by 1e-16 can then
    differ by 1e-7 where a value lies halfway between two fp32 numbers, which makes tests flaky.
    """

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = forward.__get__(module)
    return model


def random_samples(seqlens, *, vocab: int = VOCAB, masked: float = 0.2, seed: int = 0):
    """Samples of random tokens; a fraction `masked` of them are not labels."""
    rng = np.random.default_rng(seed)
    return [
        Sample(input_ids=rng.integers(3, vocab, n), loss_mask=rng.random(n) >= masked)
        for n in seqlens
    ]


def local_batch(samples) -> PackedBatch:
    """All samples in one microbatch of one rank."""
    seqlens = [len(sample.input_ids) for sample in samples]
    return pack_rank(local_plan(seqlens), 0, samples)[0]


def local_plan(seqlens) -> StepPlan:
    return StepPlan.from_lists(
        seqlens,
        [[0]] * len(seqlens),
        [[list(range(len(seqlens)))]],
        max_tokens_per_rank=sum(seqlens),
    )


def plain_model(model: CausalLM, attn_implementation: str = "sdpa") -> nn.Module:
    """The same weights in an untouched transformers model."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(
        copy.deepcopy(model.config),
        dtype=next(model.parameters()).dtype,
        attn_implementation=attn_implementation,
    )
    plain.load_state_dict(model.model.state_dict())
    return plain.train(model.training)


def plain_logprobs(plain: nn.Module, samples) -> list[Tensor]:
    """One (seqlen,) tensor of label logprobs per sequence, one forward each; 0 if unlabeled."""
    result = []
    for sample in samples:
        seqlen = len(sample.input_ids)
        labels = torch.from_numpy(sample.labels(0, seqlen))
        input_ids = torch.from_numpy(np.asarray(sample.input_ids, dtype=np.int64))[None]
        logits = plain(input_ids=input_ids, use_cache=False).logits[0]
        picked = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        result.append(torch.where(labels == -100, 0.0, picked))
    return result
