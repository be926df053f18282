"""Presets fit the machines that they name, by the arithmetic of --max-tokens-per-rank auto."""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest

from hdp.config import TrainConfig
from hdp.config_file import load_config, preset_names, preset_path
from hdp.scheduler.costs.memory import RankMemory, rank_memory
from tests.model_shapes import FREE_BYTES, SHAPES

pytest.importorskip("yaml")

MACHINE = re.compile(r"-(\d+)x([a-z]\d+)(?:-(\d+)k)?$")
ON_GPUS = [name for name in preset_names() if MACHINE.search(name)]


def memory_of(config: TrainConfig, ranks: int) -> RankMemory:
    shape = SHAPES[config.model]
    sizes = {name: value for name, value in asdict(shape).items() if name != "tied"}
    return rank_memory(
        sizes,
        num_params=shape.num_params,
        unit_params=shape.layer_params + max(shape.layer_params, shape.outer_params),
        ranks=ranks,
        checkpointing=config.activation_checkpointing,
        ema=bool(config.ema_decay),
    )


def test_there_are_presets_for_cpus_and_gpus() -> None:
    assert len(ON_GPUS) >= 6 and set(preset_names()) - set(ON_GPUS) == {"demo-cpu"}


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_preset_fits_its_machine(name: str) -> None:
    config = load_config(preset_path(name), TrainConfig)
    match = MACHINE.search(name)
    assert match
    ranks, gpu, longest = int(match[1]), match[2], int(match[3] or 0)
    assert (config.hdp_size or 1) == ranks and config.device == "cuda"
    assert config.run_dir == f"runs/{name}" and f"--preset {name} " in preset_path(name).read_text()
    most = memory_of(config, ranks).max_tokens(FREE_BYTES[gpu])
    assert most / 2 <= config.tokens_per_rank <= most, f"{name}: {most:,} tokens fit"
    assert ranks * config.tokens_per_rank >= longest * 1024


@pytest.mark.parametrize("name", ON_GPUS)
def test_the_gigabytes_in_the_comment_are_those_of_the_arithmetic(name: str) -> None:
    config = load_config(preset_path(name), TrainConfig)
    text = preset_path(name).read_text().replace("\n# ", " ")
    memory = memory_of(config, config.hdp_size or 1)
    said = re.search(r"(\d+) GB are weights", text)
    per_token = re.search(r"a token takes ([\d.]+) MiB", text)
    assert said and abs(int(said[1]) - memory.fixed_bytes / 1e9) < 1
    assert per_token and abs(float(per_token[1]) - memory.bytes_per_token / 2**20) < 0.06


def test_other_machines_have_less_room() -> None:
    """What the presets say of machines that do not do."""
    config = load_config(preset_path("llama3.1-8b-16xh100-128k"), TrainConfig)
    assert memory_of(config, 8).max_tokens(FREE_BYTES["h100"]) < 1024


def test_shapes_have_the_published_sizes() -> None:
    published = {
        "meta-llama/Llama-3.2-1B": 1.24,
        "meta-llama/Llama-3.1-8B": 8.03,
        "Qwen/Qwen3-0.6B": 0.6,
        "Qwen/Qwen3-8B": 8.2,
        "Qwen/Qwen3-32B": 32.8,
        "mistralai/Mistral-7B-v0.3": 7.25,
    }
    for name, billions in published.items():
        assert SHAPES[name].num_params / 1e9 == pytest.approx(billions, rel=0.01), name
