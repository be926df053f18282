"""Token log-probabilities from hidden states, without materializing the full logits.

A 128K-token sequence with a 128K vocabulary has 64 GiB of fp32 logits. Nothing downstream needs
them: an objective needs one number per token, the log-probability of its label. So the LM head and
the softmax are one autograd function that processes `chunk_tokens` tokens at a time:

    forward    logits of a chunk -> lse and the label's logit -> logprob; saves only the lse
    backward   recomputed logits of the chunk -> softmax from the lse -> gradients

The steps from logits to logprobs and from logits to their gradient are ops (hdp/ops/native.py).
With csrc/ built, each is a single pass, and the gradient overwrites the logits.

Recomputation costs one more LM head matmul. Peak memory is one chunk of logits, plus the weight
gradient, which is summed over chunks in fp32 and rounded once.

Invariants (each has a test of the same name in tests/models/test_logprobs.py):

* equals_dense           values and gradients are those of a dense log_softmax
* no_full_logits         no tensor is larger than chunk_tokens x vocab_size or the weight
* ignored_cost_nothing   a label of -100 has logprob 0 and no gradient, and is in no matmul
* temperature_and_entropy   of a dense softmax of logits / temperature, values and gradients
* one_weight_rounding    the weight gradient of bf16 runs is summed in fp32 and rounded once
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hdp.ops.native import IGNORE_INDEX, softmax_cross_entropy, softmax_cross_entropy_backward_

# Default size of one chunk of logits: 2^27 fp32 numbers are 512 MiB.
_CHUNK_ELEMENTS = 2**27


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability of each token's label under softmax(hidden @ weight.T + bias).

    Args:
        hidden: (total_tokens, hidden_size) last hidden states; fp64, fp32, bf16 or fp16.
        weight: (vocab_size, hidden_size) of the LM head, in the dtype of `hidden`.
        labels: (total_tokens,) int64, already shifted; -100 is ignored.
        bias: (vocab_size,) of the LM head, or None.
        chunk_tokens: how many tokens' logits exist at once; None: 512 MiB worth.
        softcap: turn logits into softcap * tanh(logits / softcap), as Gemma does; None: no cap.
        temperature: divides the (capped) logits, as in the sampling whose log-probabilities these
            are.

    Returns:
        (total_tokens,) logprobs, fp64 for fp64 input and fp32 otherwise; 0 where the label is -100.

    Raises:
        ValueError: mismatched shapes or dtypes, a temperature that is not above 0, or a label
            outside the vocabulary (checked on the CPU only: on a GPU the check would have to wait
            for the device).
    """
    options = _options(hidden, weight, labels, bias, chunk_tokens, softcap, temperature)
    return _ChunkedLogprobs.apply(hidden, weight, bias, labels, options)[0]


def chunked_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> TokenStats:
    """`chunked_logprobs`, and the entropy of each labeled token's distribution, in one pass."""
    options = _options(hidden, weight, labels, bias, chunk_tokens, softcap, temperature)
    options = replace(options, entropy=True)
    logprobs, entropy = _ChunkedLogprobs.apply(hidden, weight, bias, labels, options)
    return TokenStats(logprobs, entropy)


class TokenStats(NamedTuple):
    """What the head knows of each token's distribution. (total_tokens,) each; 0 without a label."""

    logprobs: Tensor  # of the label
    entropy: Tensor  # nats


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    chunk_tokens: int
    softcap: float | None
    temperature: float
    entropy: bool = False


def _options(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk_tokens: int | None,
    softcap: float | None,
    temperature: float,
) -> _Options:
    """The checked options of the head."""
    _check_inputs(hidden, weight, labels, bias)
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_ELEMENTS // weight.shape[0])
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} must be above 0 and finite")
    if softcap and temperature != 1.0:
        # The op caps what it is given; capped logits of a sampler are divided afterwards.
        raise ValueError(f"softcap={softcap} with temperature={temperature}: use temperature 1")
    return _Options(chunk_tokens=chunk_tokens, softcap=softcap, temperature=temperature)


def _check_inputs(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {labels.shape}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{shapes}: expected (tokens, hidden) and (vocab, hidden)")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{shapes}: expected one label per token")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}, expected torch.int64")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight is {weight.dtype}; cast one of them")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} for {weight.shape[0]} vocabulary entries")
    if labels.device.type == "cpu" and labels.numel():
        bad = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= weight.shape[0]))]
        if bad.numel():
            raise ValueError(
                f"label {int(bad[0])} is outside the vocabulary of {weight.shape[0]} "
                f"({bad.numel()} such labels); check that the tokenizer matches the model"
            )


class _ChunkedLogprobs(torch.autograd.Function):
    """The LM head, log_softmax and gather in one function; see the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        # Ignored tokens (prompts, padding) are left out of every matmul. On a GPU, nonzero waits
        # for the layers to finish, once per microbatch: far cheaper than the head on the prompts.
        kept = torch.nonzero(labels != IGNORE_INDEX).squeeze(1)
        head = _Head(hidden, weight, bias, options.temperature)
        logprobs = torch.zeros(labels.shape, dtype=head.dtype, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        lse = torch.empty(kept.shape, dtype=head.dtype, device=hidden.device)
        for start in range(0, len(kept), options.chunk_tokens):
            chunk = slice(start, start + options.chunk_tokens)
            tokens = kept[chunk]
            logits = head.logits(hidden[tokens])
            logprobs[tokens], lse[chunk] = softmax_cross_entropy(
                logits, labels[tokens], options.softcap
            )
            if options.entropy:
                entropy[tokens] = _entropy(logits, lse[chunk], options.softcap)[1]
        ctx.save_for_backward(hidden, weight, bias, labels, kept, lse, entropy)
        ctx.options = options
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, kept, lse, entropy = ctx.saved_tensors
        options: _Options = ctx.options
        head = _Head(hidden, weight, bias, options.temperature)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = _zeros(weight, head.dtype) if need_weight else None
        grad_bias = _zeros(bias, head.dtype) if need_bias else None
        for start in range(0, len(kept), options.chunk_tokens):
            chunk = slice(start, start + options.chunk_tokens)
            tokens = kept[chunk]
            chunk_hidden = hidden[tokens]
            logits = head.logits(chunk_hidden)
            d_entropy = None
            if options.entropy:
                d_entropy = _entropy_backward(
                    logits, lse[chunk], entropy[tokens], grad_entropy[tokens], options.softcap
                )
            # d logprob / d logits = onehot(label) - softmax(logits), written over the logits.
            d_logits = softmax_cross_entropy_backward_(
                logits,
                labels[tokens],
                lse[chunk],
                grad_logprobs[tokens],
                softcap=options.softcap,
                grad_dtype=hidden.dtype,
            )
            if d_entropy is not None:
                d_logits += d_entropy.to(d_logits.dtype)
            if options.temperature != 1.0:
                d_logits /= options.temperature
            if grad_bias is not None:
                grad_bias += d_logits.sum(0, dtype=head.dtype)
            if grad_hidden is not None:
                grad_hidden[tokens] = d_logits @ weight
            if grad_weight is not None:
                _add_matmul(grad_weight, d_logits.t(), chunk_hidden)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _entropy(logits: Tensor, lse: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(log-probabilities of all entries, entropy) of a chunk: H = -sum p log p."""
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    logp = capped - lse[:, None]
    return logp, -(logp.exp() * logp).sum(1)


def _entropy_backward(
    logits: Tensor, lse: Tensor, entropy: Tensor, grad: Tensor, softcap: float | None
) -> Tensor:
    """d H / d logits = -p (log p + H), times the gradient of each row's entropy."""
    logp, _ = _entropy(logits, lse, softcap)
    d = -grad[:, None] * logp.exp() * (logp + entropy[:, None])
    return d * (1.0 - torch.tanh(logits / softcap).square()) if softcap else d


class _Head:
    """The LM head: logits in fp32 (fp64 for fp64 parameters), divided by the temperature."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float):
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        if not _has_mixed_matmul(hidden):
            weight = weight.to(self.dtype)  # once, not once per chunk
        self.weight, self.bias, self.temperature = weight, bias, temperature

    def logits(self, hidden: Tensor) -> Tensor:
        """(num_tokens, vocab_size) logits before any soft cap."""
        logits = _matmul(hidden, self.weight.t(), self.dtype)
        if self.bias is not None:
            logits += self.bias
        if self.temperature != 1.0:
            logits /= self.temperature
        return logits


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def _has_mixed_matmul(x: Tensor) -> bool:
    """Whether half-precision matmuls on this device can return their fp32 accumulators."""
    return x.is_cuda and hasattr(torch.ops.aten.mm, "dtype")


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`: a half-precision product is not rounded back to half precision."""
    if a.dtype == b.dtype == dtype:
        return a @ b
    if a.dtype == b.dtype and _has_mixed_matmul(a):
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += _matmul(a, b, total.dtype)
