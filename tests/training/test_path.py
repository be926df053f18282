"""A batch takes the path that docs/architecture.md describes, in that order."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import torch

from hdp.data.feed import StepFeed
from hdp.data.sample import Sample, SampleList
from hdp.data.sampler import Sampler
from hdp.distributed.fsdp import shard
from hdp.distributed.mesh import HDPMesh
from hdp.scheduler import CostModel, plan
from hdp.training.step import StepContext, train_step
from tests.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
MOST = 15
COST = CostModel.from_coefficients(quadratic_s=1e-9, linear_s=1e-6)


def described() -> list[tuple[str, str]]:
    """(file, function) of each numbered step of that section."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.partition("## The path of a batch")[2].partition("\n## ")[0]
    steps = re.findall(r"^(\d+)\. `([\w.]+)` \(`([\w/.]+)`\)", section, re.M)
    assert [int(number) for number, _, _ in steps] == [*range(1, len(steps) + 1)]
    return [(file, function) for _, function, file in steps]


def one_step(feed: StepFeed, context: StepContext) -> None:
    train_step(context, feed.make((0, 0)))


def called(feed: StepFeed, context: StepContext) -> list[tuple[str, str]]:
    """(file, function) of the package in order of their first call in a step."""
    seen: dict[tuple[str, str], None] = {}

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)):
            function = getattr(code, "co_qualname", code.co_name)  # from Python 3.11 on
            seen.setdefault((str(Path(code.co_filename).relative_to(ROOT)), function))

    sys.setprofile(note)
    try:
        one_step(feed, context)
    finally:
        sys.setprofile(None)
    return list(seen)


def test_a_batch_takes_the_described_path():
    steps = described()
    assert 10 <= len(steps) <= MOST
    source = SampleList([Sample(input_ids=np.arange(40)) for _ in range(4)])
    sampler = Sampler(source.seqlens, batch_tokens=80)
    with HDPMesh.create(device="cpu") as mesh:
        model = shard(tiny_model(dtype=torch.float32), mesh.device_mesh)
        context = StepContext.create(mesh, model, torch.optim.SGD(model.parameters(), lr=0.1))
        with StepFeed(
            source,
            sampler,
            lambda seqlens: plan(seqlens, hdp_size=1, max_tokens_per_rank=80, cost=COST),
            rank=0,
            position=(0, 0),
        ) as feed:
            calls = called(feed, context)
    if sys.version_info < (3, 11):
        steps = [(file, function.rpartition(".")[2]) for file, function in steps]
    missing = [step for step in steps if step not in calls]
    assert not missing, f"a batch does not pass {missing}"
    order = [calls.index(step) for step in steps]
    assert order == sorted(order), [calls[i] for i in sorted(order)]
