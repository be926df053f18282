"""LoRA by peft on one process: what it starts as, what peft loads, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

from hdp.models.lora import LoRA, adapters_off, add_lora, has_lora, merged, save_adapter
from hdp.models.scalar_head import ScalarHeadLM
from tests.tiny_models import local_batch, plain_model, random_samples, tiny_model

pytest.importorskip("peft")
SAMPLES = random_samples([33, 20, 9])


def trained(model, seed=7):
    """Adapters whose B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).double() * 0.1
    return model


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "phi3"])
def test_starts_as_the_base(model_type):
    model = tiny_model(model_type)
    base = model(local_batch(SAMPLES), None)
    add_lora(model, LoRA(rank=4), seed=3)
    assert torch.equal(model(local_batch(SAMPLES), None), base)
    trained(model)
    assert not torch.allclose(model(local_batch(SAMPLES), None), base)
    with adapters_off(model):
        assert torch.equal(model(local_batch(SAMPLES), None), base)
    assert not torch.allclose(model(local_batch(SAMPLES), None), base)
    grads = {name for name, p in model.named_parameters() if p.requires_grad}
    assert grads and all("lora_" in name for name in grads)


def test_seed_decides_the_adapter():
    weights = []
    for seed in (1, 1, 2):
        model = tiny_model()
        torch.rand(1)  # the global generator plays no part
        add_lora(model, LoRA(rank=2), seed=seed)
        weights.append(next(p for n, p in model.named_parameters() if "lora_A" in n))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_peft_loads_what_is_saved(targets, tmp_path):
    from peft import PeftModel

    model = tiny_model()
    plain = plain_model(model)
    add_lora(model, LoRA(rank=4, alpha=6, targets=targets))
    trained(model)
    want = model(local_batch(SAMPLES), None)
    save_adapter(model, model.state_dict(), tmp_path, base="somewhere")
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, autocast_adapter_dtype=False)
    assert loaded.peft_config["default"].base_model_name_or_path == "somewhere"
    torch.testing.assert_close(_logprobs(loaded), want)

    state = merged(model, model.state_dict())
    by_peft = loaded.merge_and_unload().state_dict()
    assert set(state) == {f"model.{name}" for name in by_peft}
    for name, x in by_peft.items():
        torch.testing.assert_close(state[f"model.{name}"], x)
    plain.load_state_dict({name.removeprefix("model."): x for name, x in state.items()})
    torch.testing.assert_close(_logprobs(plain), want)


def _logprobs(plain):
    rows = []
    for sample in SAMPLES:
        ids = torch.from_numpy(sample.input_ids)[None]
        logp = plain(input_ids=ids).logits[0].log_softmax(-1)
        labels = torch.from_numpy(sample.labels(0, ids.shape[1]))
        picked = logp.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        rows.append(torch.where(labels >= 0, picked, 0.0))
    return torch.cat(rows)


def test_a_scalar_head_stays_trainable():
    model = ScalarHeadLM.from_causal_lm(tiny_model())
    add_lora(model, LoRA(rank=2))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trainable
    assert all("lora_" in name for name in trainable - {"score.weight"})


def test_merged_without_adapters_is_the_same():
    state = tiny_model().state_dict()
    assert merged(tiny_model(), state) == state


def test_what_is_refused():
    model = tiny_model()
    assert not has_lora(model)
    with pytest.raises(ValueError, match="no LoRA adapters to switch off"), adapters_off(model):
        pass
    with pytest.raises(ValueError, match="no LoRA adapters to save"):
        save_adapter(model, model.state_dict(), "unused")
    with pytest.raises(ValueError, match=r"\['c_attn'\] are not linear layers .* q_proj"):
        add_lora(model, LoRA(targets=("q_proj", "c_attn")))
    with pytest.raises(ValueError, match="are not linear layers"):
        add_lora(model, LoRA(targets="all"))
    with pytest.raises(ValueError, match="include the head"):
        add_lora(model, LoRA(targets=("q_proj", "lm_head")))
    for wrong in ({"rank": 0}, {"alpha": -1.0}, {"targets": ()}):
        with pytest.raises(ValueError, match="LoRA"):
            LoRA(**wrong)
    model = tiny_model()
    add_lora(model, LoRA())
    assert has_lora(model)
    with pytest.raises(ValueError, match="already"):
        add_lora(model, LoRA())
