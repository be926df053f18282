"""chunked_logprobs against a dense log_softmax: values, gradients, memory, edge cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hdp.models.logprobs import IGNORE_INDEX, chunked_logprobs, chunked_token_stats
from hdp.objectives import token_cross_entropy


def _inputs(tokens, hidden_size, vocab, *, dtype=torch.float64, bias=False, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return x.requires_grad_()

    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORE_INDEX
    return (
        normal(tokens, hidden_size),
        normal(vocab, hidden_size),
        labels,
        (normal(vocab) if bias else None),
    )


def _dense_logprobs(hidden, weight, labels, bias=None, softcap=None):
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")


def _gradients(logprobs, tensors, seed=1):
    coefficients = torch.randn(
        logprobs.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    loss = (coefficients.to(logprobs.dtype) * logprobs.tanh()).sum()
    return torch.autograd.grad(loss, [x for x in tensors if x is not None])


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 23),
    chunk_tokens=st.integers(1, 30),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
    ignored=st.sampled_from([0.0, 0.5, 1.1]),
)
def test_equals_dense(tokens, chunk_tokens, bias, softcap, ignored):
    hidden, weight, labels, b = _inputs(tokens, 6, 11, bias=bias, ignored=ignored, seed=tokens)
    ours = chunked_logprobs(
        hidden, weight, labels, bias=b, chunk_tokens=chunk_tokens, softcap=softcap
    )
    dense = _dense_logprobs(hidden, weight, labels, b, softcap)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    for got, want in zip(
        _gradients(ours, [hidden, weight, b]), _gradients(dense, [hidden, weight, b]), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_temperature_and_entropy(softcap, chunk_tokens):
    """Values and gradients of both, against a dense softmax; no entropy without a label."""
    temperature = 1.0 if softcap else 0.6
    hidden, weight, labels, bias = _inputs(11, 6, 13, bias=True)
    logits = F.linear(hidden, weight, bias)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits / temperature
    logp = logits.log_softmax(-1)
    labeled = labels != IGNORE_INDEX
    want_entropy = torch.where(labeled, -(logp.exp() * logp).sum(-1), 0.0)
    want_logprobs = torch.where(labeled, logp.gather(1, labels.clamp(min=0)[:, None])[:, 0], 0.0)
    stats = chunked_token_stats(
        hidden,
        weight,
        labels,
        bias=bias,
        chunk_tokens=chunk_tokens,
        softcap=softcap,
        temperature=temperature,
    )
    torch.testing.assert_close(stats.logprobs, want_logprobs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats.entropy, want_entropy, rtol=1e-12, atol=1e-12)
    tensors = [hidden, weight, bias]
    for ours, dense in ((stats.entropy, want_entropy), (sum(stats), want_entropy + want_logprobs)):
        got = torch.autograd.grad(ours.tanh().sum(), tensors, retain_graph=True)
        want = torch.autograd.grad(dense.tanh().sum(), tensors, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    plain = chunked_logprobs(
        hidden, weight, labels, bias=bias, softcap=softcap, temperature=temperature
    )
    torch.testing.assert_close(plain, want_logprobs, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(plain.sum(), tensors)
    for a, b in zip(gradients, torch.autograd.grad(want_logprobs.sum(), tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperatures_are_named(temperature):
    hidden, weight, labels, _ = _inputs(3, 6, 13)
    with pytest.raises(ValueError, match=f"temperature={temperature} must be above 0"):
        chunked_logprobs(hidden, weight, labels, temperature=temperature)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap):
    hidden, weight, labels, bias = _inputs(7, 4, 9, bias=True)
    assert torch.autograd.gradcheck(
        lambda h, w, b: chunked_logprobs(h, w, labels, bias=b, chunk_tokens=3, softcap=softcap),
        (hidden, weight, bias),
    )


def test_loss_is_cross_entropy_however_cut():
    hidden, weight, labels, _ = _inputs(40, 8, 13)
    count = int((labels != IGNORE_INDEX).sum())
    parts = [
        token_cross_entropy(
            chunked_logprobs(hidden[span], weight, labels[span]), global_count=count
        )
        for span in (slice(0, 1), slice(1, 27), slice(27, 40))
    ]
    logits = F.linear(hidden, weight)
    torch.testing.assert_close(sum(parts), F.cross_entropy(logits, labels), rtol=1e-13, atol=0)


def test_loss_weights():
    logprobs = torch.tensor([-1.0, -2.0, -4.0])
    weights = torch.tensor([0.0, 0.5, 1.0])
    loss = token_cross_entropy(logprobs, global_count=10, weights=weights)
    assert float(loss) == pytest.approx(0.5)


class _LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operator returns, and the work of all matmuls."""

    def __init__(self):
        super().__init__()
        self.numel = 0
        self.shape = ()
        self.matmul_work = 0  # sum of m * k * n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.numel() > self.numel:
                self.numel, self.shape = x.numel(), tuple(x.shape)
        if func is torch.ops.aten.mm.default:
            self.matmul_work += args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_full_logits(dtype):
    tokens, hidden_size, vocab, chunk_tokens = 1000, 16, 400, 20
    hidden, weight, labels, _ = _inputs(tokens, hidden_size, vocab, dtype=dtype)
    with _LargestTensor() as largest:
        logprobs = chunked_logprobs(hidden, weight, labels, chunk_tokens=chunk_tokens)
        logprobs.sum().backward()
    limit = max(chunk_tokens * vocab, vocab * hidden_size, tokens * hidden_size)
    assert largest.numel <= limit, f"{largest.shape} has more than {limit} elements"
    # The same watcher does see the dense logits, so the limit means something.
    with _LargestTensor() as largest:
        _dense_logprobs(hidden, weight, labels).sum().backward()
    assert largest.numel == tokens * vocab


def test_default_chunk_is_bounded():
    hidden, weight, labels, _ = _inputs(64, 2, 2**22, dtype=torch.bfloat16, ignored=0.0)
    with _LargestTensor() as largest, torch.no_grad():
        chunked_logprobs(hidden, weight, labels)
    assert largest.numel <= 2**27


def test_ignored_cost_nothing():
    hidden, weight, labels, _ = _inputs(50, 6, 11, ignored=0.0)
    labels[5:45] = IGNORE_INDEX

    def run(h, y):
        with _LargestTensor() as watcher:
            logprobs = chunked_logprobs(h, weight, y, chunk_tokens=4)
            grads = torch.autograd.grad(logprobs.sum(), [h, weight])
        return logprobs, grads, watcher.matmul_work

    logprobs, (grad_hidden, _), work = run(hidden, labels)
    assert (logprobs[5:45] == 0).all() and (logprobs[:5] < 0).all()
    assert (grad_hidden[5:45] == 0).all() and (grad_hidden[:5] != 0).any()
    few = torch.cat([hidden[:5], hidden[45:]]).detach().requires_grad_()
    *_, work_of_few = run(few, torch.cat([labels[:5], labels[45:]]))
    assert work == work_of_few


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_unlabeled_tokens_still_reach_every_parameter(tokens):
    hidden, weight, labels, bias = _inputs(tokens, 6, 11, bias=True, ignored=1.1)
    loss = token_cross_entropy(chunked_logprobs(hidden, weight, labels, bias=bias), global_count=3)
    loss.backward()
    assert float(loss.detach()) == 0
    for x in (hidden, weight, bias):
        assert x.grad is not None and x.grad.shape == x.shape and (x.grad == 0).all()


def test_bf16_is_as_accurate_as_its_inputs():
    hidden, weight, labels, _ = _inputs(200, 32, 50, dtype=torch.bfloat16)
    ours = chunked_logprobs(hidden, weight, labels, chunk_tokens=17)
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = _dense_logprobs(*exact_inputs, labels)
    assert ours.dtype == torch.float32
    # fp64 represents the inputs exactly, so the forward is accurate to fp32, not merely to bf16.
    torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-5)
    got = torch.autograd.grad(ours.sum(), [hidden, weight])
    want = torch.autograd.grad(exact.sum(), exact_inputs)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.bfloat16
        assert (g.double() - w).norm() / w.norm() < 5e-3


def test_one_weight_rounding():
    """Summing many chunks in bf16 would lose the small terms; fp32 keeps them."""
    tokens = 4096
    hidden = torch.ones(tokens, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64)
    logprobs = chunked_logprobs(hidden, weight, labels, chunk_tokens=1)
    (grad,) = torch.autograd.grad(logprobs.sum(), [weight])
    assert grad.tolist() == [[tokens / 2], [-tokens / 2]]


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    logprobs = chunked_logprobs(hidden, weight, torch.tensor([0, 0]))
    logprobs.sum().backward()
    assert logprobs.tolist() == [0.0, -2e4]
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_frozen_inputs_get_no_gradient():
    hidden, weight, labels, _ = _inputs(5, 3, 4)
    (grad,) = torch.autograd.grad(chunked_logprobs(hidden.detach(), weight, labels).sum(), [weight])
    assert grad.shape == weight.shape
    assert not chunked_logprobs(hidden.detach(), weight.detach(), labels).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, y: (h, w[:, :2], y), "expected"),
        (lambda h, w, y: (h, w, y[:-1]), "one label per token"),
        (lambda h, w, y: (h, w, y.int()), "int64"),
        (lambda h, w, y: (h, w.float(), y), "cast one"),
        (lambda h, w, y: (h, w, y + 4), r"outside the vocabulary of 4 .*tokenizer"),
        (lambda h, w, y: (h, w, y - 5), "outside the vocabulary"),
    ],
)
def test_bad_inputs_are_named(change, message):
    hidden, weight, labels, _ = _inputs(5, 3, 4, ignored=0.0)
    with pytest.raises(ValueError, match=message):
        chunked_logprobs(*change(hidden, weight, labels))


def test_bad_counts_are_named():
    with pytest.raises(ValueError, match="at least one label token"):
        token_cross_entropy(torch.zeros(3), global_count=0)
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        chunked_logprobs(*_inputs(2, 3, 4)[:3], chunk_tokens=0)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_cuda_bf16_is_as_accurate_as_its_inputs(softcap):
    """On CUDA, half-precision matmuls return their fp32 sums, a different path from the CPU's."""
    hidden, weight, labels, _ = _inputs(4000, 256, 5000, dtype=torch.bfloat16)
    hidden, weight = (x.detach().cuda().requires_grad_() for x in (hidden / 8, weight / 8))
    labels = labels.cuda()
    ours = chunked_logprobs(hidden, weight, labels, chunk_tokens=700, softcap=softcap)
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = _dense_logprobs(*exact_inputs, labels, softcap=softcap)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad(ours.sum(), [hidden, weight])
    want = torch.autograd.grad(exact.sum(), exact_inputs)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() / w.norm() < 5e-3
