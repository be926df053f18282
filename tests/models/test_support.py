"""Models that ring attention would change are rejected with layer, feature and remedy."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from hdp.attention.kernels import KernelPicker
from hdp.attention.layout import RingLayout
from hdp.models.causal_lm import AttnInputs, CausalLM, hdp_attention
from hdp.models.loading import build_model
from hdp.models.support import SUPPORTED_MODELS, check_supported
from tests.tiny_models import tiny_config, tiny_model


def _tiny_plain(model_type, **overrides):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny_config(model_type, **overrides)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


_ROPE = {"rope_theta": 1e4, "factor": 2.0}
REJECTED = {
    "mistral window": (
        "mistral",
        {"sliding_window": 8},
        r"layers\.0\.self_attn: sliding window of 8",
    ),
    "qwen2 window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        r'layers\.1\.self_attn: sliding window of 8 .*"use_sliding_window": false',
    ),
    "qwen3 window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        r"layers\.0\.self_attn: sliding window of 8",
    ),
    "phi3 window": ("phi3", {"sliding_window": 16}, "sliding window of 16"),
    "starcoder2 window": ("starcoder2", {"sliding_window": 16}, "sliding window of 16"),
    "dynamic rope": (
        "llama",
        {"rope_parameters": {**_ROPE, "rope_type": "dynamic"}},
        r"rotary_emb: RoPE type 'dynamic' depends on the longest .*'yarn'",
    ),
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                **_ROPE,
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            }
        },
        "RoPE type 'longrope'",
    ),
    "non-causal": ("llama", {"is_causal": False}, r"layers\.0\.self_attn: non-causal"),
    "soft cap": ("gemma2", {}, r"self_attn: soft-capping of attention scores at 50"),
    "head": ("cohere", {}, "lm_head: logit_scale=0.0625"),
    "sinks": ("gpt_oss", {"num_local_experts": 2}, r"self_attn: attention sinks"),
    "experts": ("mixtral", {"num_local_experts": 2}, r"layers\.0\.mlp: mixture of experts"),
    "other": (
        "cohere",
        {},
        "unknown attention class CohereAttention .*supported model types: arcee",
    ),
    "disguised": ("internlm3", {}, r"unknown attention class LlamaAttention .*'internlm3'"),
    "no attention": ("mamba", {}, r"layers\.0 has no attention module|no list of decoder layers"),
    "encoder": ("bert", {"is_decoder": True}, "no list of decoder layers"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case):
    model_type, overrides, message = REJECTED[case]
    model = _tiny_plain(model_type, **overrides)
    with pytest.raises(ValueError, match="cannot run under ring attention") as caught:
        CausalLM(model)
    assert re.search(message, str(caught.value)), caught.value


# ernie4_5 has no such entry, but keeps it.
@pytest.mark.parametrize("model_type", sorted(SUPPORTED_MODELS))
def test_attention_dropout_is_rejected(model_type):
    model = _tiny_plain(model_type, attention_dropout=0.1)
    with pytest.raises(ValueError, match=r'attention dropout of 0.1.*"attention_dropout": 0.0'):
        check_supported(model)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        *(("starcoder2", name) for name in ("residual_dropout", "embedding_dropout")),
        *(("phi3", name) for name in ("resid_pdrop", "embd_pdrop")),
        *(("gpt_neox", "hidden_dropout"), ("seed_oss", "residual_dropout")),
        *(("llama", name) for name in ("layerdrop", "router_jitter_noise", "drop_path_rate")),
    ],
)
def test_other_randomness_is_rejected(model_type, name):
    model = _tiny_plain(model_type, **{name: 0.1})
    text = f"{name.replace('_', ' ')} of 0.1"
    with pytest.raises(ValueError, match=f'{text}.*results would depend on .*"{name}": 0.0'):
        check_supported(model)
    check_supported(_tiny_plain(model_type, **{name: 0.0}))


def test_a_dropout_module_is_rejected():
    model = _tiny_plain("llama")
    model.model.layers[1].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.2))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.act_fn\.1: dropout of 0\.2"):
        check_supported(model)


def test_dropout_of_heads_for_other_tasks_is_harmless():
    assert _tiny_plain("gpt_neox").config.classifier_dropout > 0
    check_supported(_tiny_plain("gpt_neox"))


def test_config_overrides_fix_it():
    for model_type, entry in {"mistral": "sliding_window", "qwen2": "use_sliding_window"}.items():
        config = tiny_config(model_type, sliding_window=8, max_window_layers=0)
        config["use_sliding_window"] = True
        with pytest.raises(ValueError, match="sliding window"):
            build_model(config)
        value = None if entry == "sliding_window" else False
        build_model(config, config_overrides={entry: value})


@pytest.mark.parametrize("keyword", ["sliding_window", "softcap", "s_aux", "position_bias"])
def test_rejected_at_run_time_too(keyword):
    module = nn.Module()
    module.layer_idx = 3
    q = torch.zeros(1, 2, 4, 8)
    inputs = AttnInputs(RingLayout(local_seqlens=(4,)), None, KernelPicker())
    hdp_attention(module, q, q, q, None, hdp_batch=inputs, **{keyword: None})
    with pytest.raises(ValueError, match="layer 3: ring attention does not support"):
        hdp_attention(module, q, q, q, None, hdp_batch=inputs, **{keyword: 5})
    with pytest.raises(ValueError, match="attention mask"):
        hdp_attention(module, q, q, q, torch.zeros(4, 4), hdp_batch=inputs)
    with pytest.raises(ValueError, match=r"dropout 0\.1"):
        hdp_attention(module, q, q, q, None, hdp_batch=inputs, dropout=0.1)


def test_base_model_alone_is_rejected():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"wrap the model in hdp\.models\.causal_lm\.CausalLM"):
        model.model(input_ids=torch.ones(1, 3, dtype=torch.int64), use_cache=False)
