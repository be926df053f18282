"""A scalar head against transformers' own sequence classifier, on one process."""

from __future__ import annotations

import copy

import pytest
import torch

from hdp.models.scalar_head import ScalarHeadLM
from tests.tiny_models import keep_norms_exact, local_batch, random_samples, tiny_model

SAMPLES = random_samples([33, 1, 20, 9])


def plain_classifier(model):
    """transformers' classifier with the same weights."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels = model.num_outputs
    plain = AutoModelForSequenceClassification.from_config(
        config, dtype=torch.float64, attn_implementation="sdpa"
    )
    plain.load_state_dict(model.state_dict())
    return keep_norms_exact(plain)


@pytest.mark.parametrize("num_outputs", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_plain_classifier(num_outputs, tied):
    source = tiny_model(tie_word_embeddings=tied)
    model = ScalarHeadLM.from_causal_lm(keep_norms_exact(source), num_outputs=num_outputs)
    plain = plain_classifier(model)
    outputs = model(local_batch(SAMPLES), None)
    assert outputs.shape == (63,) if num_outputs == 1 else (63, num_outputs)
    outputs.square().sum().backward()
    rows = []
    for sample in SAMPLES:
        ids = torch.from_numpy(sample.input_ids)[None]
        rows.append(plain.score(plain.model(input_ids=ids).last_hidden_state[0]))
        last = plain(input_ids=ids).logits[0]
        torch.testing.assert_close(rows[-1][-1], last)  # what the classifier itself returns
    want = torch.cat(rows)
    torch.testing.assert_close(outputs, want[:, 0] if num_outputs == 1 else want)
    want.square().sum().backward()
    for (name, p), (other, q) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(p.grad, q.grad)


def test_head_depends_on_the_seed_alone():
    heads = [
        ScalarHeadLM.from_causal_lm(tiny_model(seed=m), seed=s).score.weight
        for m, s in ((0, 1), (2, 1), (0, 3))
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    with pytest.raises(ValueError, match="num_outputs=0 must be at least 1"):
        ScalarHeadLM.from_causal_lm(tiny_model(), num_outputs=0)
