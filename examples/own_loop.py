"""Write your own training loop: your data, model and optimizer, HDP's training step.

    torchrun --standalone --nproc-per-node 4 examples/own_loop.py

The data here is the source code of Python's standard library, one byte per token. Four calls make
it hybrid data parallel: `shard` distributes the model, `plan` assigns ranks to each sequence,
`make_step` packs this rank's share, and `train_step` runs it.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch

import hdp
from hdp.scheduler import estimate_cost

MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 8192,
}
NUM_STEPS, SEQUENCES_PER_STEP, MAX_LENGTH = 8, 16, 4096


def read_samples() -> hdp.SampleList:
    """Files of 100 to MAX_LENGTH bytes; longer ones are truncated."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [np.frombuffer(file.read_bytes()[:MAX_LENGTH], dtype=np.uint8) for file in files]
    return hdp.SampleList([hdp.Sample(input_ids=text) for text in texts if len(text) > 100])


def main() -> None:
    with hdp.HDPMesh.create() as mesh:
        data = read_samples()
        model = hdp.build_model(MODEL)
        shape = hdp.transformer_shape(model)
        hdp.shard(model, mesh.device_mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        context = hdp.StepContext.create(mesh, model, optimizer, grad_clip=1.0)
        cost = estimate_cost(shape, device_type=mesh.device.type, bytes_per_element=4)
        rng = np.random.default_rng(0)  # same seed on all ranks, so all compute the same plan
        for number in range(1, NUM_STEPS + 1):
            ids = rng.choice(len(data), SEQUENCES_PER_STEP, replace=False)
            plan = hdp.plan(
                data.seqlens[ids],
                hdp_size=mesh.hdp_size,
                max_tokens_per_rank=MAX_LENGTH // mesh.hdp_size + 1024,
                ranks_per_node=mesh.ranks_per_node,
                cost=cost,
            )
            step = hdp.make_step(data, ids, plan, mesh.hdp_rank).to(mesh.device)
            result = hdp.train_step(context, step)
            if mesh.hdp_rank == 0:
                rings = np.bincount(plan.degrees)[1:].tolist()
                print(
                    f"step {number}  loss {result.loss:.3f}  sequences on 1, 2, ... ranks {rings}"
                )


if __name__ == "__main__":
    main()
