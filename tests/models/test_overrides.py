"""--config-overrides: merged into nested entries, checked by name, and right where recommended."""

from __future__ import annotations

import json
import re

import pytest

from hdp.models.loading import build_model
from tests.tiny_models import tiny_config, tiny_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def build(overrides, model_type="llama", **entries):
    config = tiny_config(model_type, **entries)
    return build_model(config, skeleton=True, config_overrides=overrides).config


def recommended(error) -> list[dict]:
    """The overrides that an error's text recommends."""
    return [
        json.loads(text)
        for text in re.findall(
            r"pass --config-overrides '(.*?)'|"
            r"\(--config-overrides '(.*?)'\)",
            str(error),
        )
        for text in text
        if text
    ]


@pytest.mark.parametrize("source", ["mapping", "folder", "old folder", "config"])
def test_rope_parameters_keep_the_models_theta(source, tmp_path):
    entries = tiny_config("llama", rope_theta=5e5)
    given = {"mapping": entries, "folder": tmp_path, "old folder": tmp_path}.get(source)
    if source == "old folder":  # as transformers 4 wrote it
        (tmp_path / "config.json").write_text(json.dumps({**entries, "rope_scaling": None}))
    else:
        saved = build_model(entries, skeleton=True).config
        saved.save_pretrained(tmp_path)
        given = given or saved
    for name in ("rope_parameters", "rope_scaling"):
        made = build_model(given, skeleton=True, config_overrides={name: YARN}).config
        assert made.rope_parameters == {"rope_theta": 5e5, **YARN}


def test_a_rope_type_takes_its_parameters_with_it():
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"rope_theta": 5e5, "original_max_position_embeddings": 16}
    kept = {"rope_theta": 5e5, "original_max_position_embeddings": 16}
    made = build({"rope_parameters": {"factor": 2.0}}, rope_parameters=llama3).rope_parameters
    assert made == {**llama3, "factor": 2.0}, "the same type keeps its parameters"
    made = build({"rope_scaling": {"type": "linear", "factor": 3.0}}, rope_parameters=llama3)
    assert made.rope_parameters == {"rope_type": "linear", "factor": 3.0, **kept}
    made = build({"rope_parameters": None}, rope_parameters=llama3).rope_parameters
    assert made == {"rope_type": "default", **kept}, "null turns scaling off"


def test_rope_theta_of_an_old_config_can_be_overridden(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama", rope_theta=5e5)))
    made = build_model(tmp_path, skeleton=True, config_overrides={"rope_theta": 1e6}).config
    assert made.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_hidden_layer": 1}, "no entry 'num_hidden_layer'; close matches: num_hidden_layers"),
        (
            {"rope_parameters": {"rope_typ": "yarn"}},
            "no entry 'rope_typ'; close matches: rope_type",
        ),
        ({"rope_parameters": {"rope_type": "yarm"}}, "unknown rope_type 'yarm'; .*: yarn"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "Missing required keys .*factor"),
        ({"rope_parameters": 3}, "rope_parameters must be an object like .*, got 3"),
        ({"model_type": "lama"}, "unknown model_type 'lama'; close matches: llama"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"hidden_size": "two"}, "'hidden_size' expected int, got str .value: 'two'"),
        ({"hidden_size": 33}, r"hidden size \(33\) is not a multiple"),
        ({"num_attention_heads": 0}, 'ZeroDivisionError.*"num_attention_heads": 0'),
        ({"vocab_size": -5}, "negative dimension -5"),
        ({"pad_token_id": 1000}, 'Padding_idx .*"pad_token_id": 1000'),
        ({"rms_norm_eps": None}, "'rms_norm_eps' expected float"),
    ],
    ids=str,
)
def test_bad_values_are_one_line(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(overrides)
    assert "\n" not in str(caught.value)


def test_heads_that_no_ring_can_share():
    with pytest.raises(ValueError, match=r"num_attention_heads=4 is not a multiple of .*=3"):
        build({"num_key_value_heads": 3})


@pytest.mark.parametrize(
    ("model_type", "entries"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("phi3", {"sliding_window": 8}),
        ("starcoder2", {"sliding_window": 8, "residual_dropout": 0.1, "embedding_dropout": 0.2}),
        ("gpt_neox", {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        (
            "phi3",
            {
                "original_max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                },
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_recommended_overrides_work(model_type, entries, tmp_path):
    """Follow each recommendation, for the entries themselves and for a config.json saved with them:
    that one also lists each layer's kind of attention."""
    from transformers import AutoConfig

    config = tiny_config(model_type, **entries)
    AutoConfig.for_model(**config).save_pretrained(tmp_path)
    for given in (config, tmp_path):
        with pytest.raises(ValueError, match="cannot run under ring attention") as caught:
            build_model(given, skeleton=True)
        choices = recommended(caught.value)
        assert choices, caught.value
        if "rope_parameters" in choices[0]:  # alternatives
            kinds = [choice["rope_parameters"]["rope_type"] for choice in choices]
            assert kinds == (["default"] if model_type == "phi3" else ["yarn", "default"])
            for choice in choices:
                build_model(given, skeleton=True, config_overrides=choice)
        else:  # one for each feature
            together = {name: value for choice in choices for name, value in choice.items()}
            build_model(given, skeleton=True, config_overrides=together)


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_lists_of_layers_follow_their_number(num_layers, tmp_path):
    tiny_model("qwen3").config.save_pretrained(tmp_path)
    overrides = {"num_hidden_layers": num_layers}
    model = build_model(tmp_path, skeleton=True, config_overrides=overrides)
    assert (
        model.config.layer_types
        == ["full_attention"] * num_layers
        == ["full_attention"] * len(model.layers)
    )
