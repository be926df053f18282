"""The example through Megatron's own pretrain(): 4 ranks train as one does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.megatron import cuda_shim
from tests.patience import patience
from tests.run_ranks import run_ranks

pytest.importorskip("megatron.core")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not find_spec("megatron.training"), reason="megatron.training is in wheels since 0.17"
    ),
]

ROOT = Path(__file__).resolve().parents[2]
FLAGS = """
--num-layers 2 --hidden-size 64 --num-attention-heads 8 --group-query-attention
--num-query-groups 4 --ffn-hidden-size 96 --swiglu --normalization RMSNorm --disable-bias-linear
--position-embedding-type rope --untie-embeddings-and-output-weights --seq-length 256
--max-position-embeddings 1024 --micro-batch-size 1 --global-batch-size 16 --train-iters 20
--lr 1e-2 --lr-decay-style constant --transformer-impl local --tokenizer-type NullTokenizer
--vocab-size 127 --distributed-backend gloo --use-cpu-initialization --calculate-per-token-loss
--dataloader-type external --spec hdp.megatron layer_spec --no-masked-softmax-fusion
--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
--no-gradient-accumulation-fusion --no-persist-layer-norm --attention-dropout 0
--hidden-dropout 0 --eval-iters 1 --eval-interval 20 --log-interval 1 --clip-grad 1.0
--weight-decay 0
"""


def write_documents(rank: int, world: int, prefix: str) -> None:
    """200 documents of 2 to 1000 tokens that count upwards, as Megatron's .bin and .idx."""
    cuda_shim.install()
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    rng = np.random.default_rng(0)
    for length in np.clip(rng.lognormal(4, 1.2, 200), 2, 1000).astype(int):
        tokens = torch.from_numpy(np.cumsum(rng.integers(0, 3, length)) % 100)
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def example(ranks: int, *flags: str) -> str:
    """What a run of the example prints."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", str(ranks), "-m", "tests.megatron.run_on_cpu"]
    done = subprocess.run(
        [*launch, "examples/megatron/pretrain_gpt.py", *FLAGS.split(), *flags],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=patience(150),
    )
    return done.stdout + done.stderr


def test_four_ranks_train_as_one_does(tmp_path: Path) -> None:
    prefix = str(tmp_path / "documents")
    run_ranks(write_documents, 1, prefix)
    losses = []
    for ranks, most in ((1, 1024), (4, 300)):
        text = example(ranks, "--data-path", prefix, "--hdp-max-tokens-per-rank", str(most))
        found = re.findall(r"lm loss(?: value)?: ([0-9.E+-]+)", text)
        assert len(found) == 22, text[-3000:]  # 20 steps, validation and the validation at the end
        losses.append([float(loss) for loss in found])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0][19] < 0.5 * losses[0][0], "it learns"


def test_bad_flags_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    flags = ["--data-path", str(tmp_path / "none"), "--hdp-max-tokens-per-rank", "100"]
    text = example(1, *flags, "--attention-dropout", "0.1")
    assert "hdp.megatron: no dropout in attention: set --attention-dropout 0" in text
