"""The model without attention: saved bytes are counted, and costs are slopes of the rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hdp.profile.model import SHORT, counting_saved, model_costs


class Layer(nn.Module):
    """Two functions save its input; a third saves the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x.sin()


@pytest.mark.parametrize("tokens", [5, 9])
def test_saved_bytes_are_storages_once_without_parameters(tokens: int) -> None:
    model = nn.Sequential(Layer(), Layer())
    x = torch.randn(tokens, 6, requires_grad=True)
    with counting_saved(model, []) as count:
        out = model(x)
        saved = count()
    out.sum().backward()
    assert saved == 2 * tokens * 6 * 4, "the inputs of two layers, each once"


def test_checkpointed_layers_keep_their_inputs() -> None:
    layers = [Layer(), Layer()]
    x = torch.randn(5, 6, requires_grad=True)
    for layer in layers:
        inner = layer.forward
        layer.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
    model = nn.Sequential(*layers)
    with counting_saved(model, layers) as count:
        model(x).sum().backward()
        assert count() == 2 * 5 * 6 * 4


def test_model_costs_are_slopes() -> None:
    def row(tokens: int, peak: int | None) -> dict:
        return {
            "tokens": tokens,
            "seqlen": SHORT,
            "forward_s": 0.3 * (0.01 + 2e-5 * tokens),
            "seconds": 0.01 + 2e-5 * tokens,
            "saved_bytes": 1000 + 4096 * tokens,
            "peak_bytes": peak,
        }

    costs = model_costs([row(n, 5000 + 5120 * n) for n in (64, 256, 1024)])
    assert costs.linear_s == pytest.approx(2e-5, rel=1e-6)
    assert costs.fixed_s == pytest.approx(0.01, rel=1e-6)
    assert costs.forward_share == pytest.approx(0.3)
    assert costs.activation_bytes_per_token == pytest.approx(4096)
    assert costs.temporary_bytes_per_token == pytest.approx(1024)
    assert model_costs([row(n, None) for n in (64, 256)]).temporary_bytes_per_token is None
