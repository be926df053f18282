"""Train a GPT with megatron-core's pretrain() and HDP: what is added to a script is marked HDP.

    torchrun --nproc-per-node 8 examples/megatron/pretrain_gpt.py --data-path my_document \\
        --spec hdp.megatron layer_spec --dataloader-type external --calculate-per-token-loss \\
        --attention-dropout 0 --hdp-max-tokens-per-rank 8192 ... your flags of Megatron

For megatron-core 0.18 or 0.19 (Python 3.12). Documents of Megatron's .bin/.idx files are sequences
of their own lengths, at most --max-position-embeddings. --global-batch-size counts sequences, so
consumed samples, learning rates and resuming stay Megatron's; --micro-batch-size must be 1.
docs/megatron.md says how to choose the sizes and what the refusals mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

import hdp.megatron  # HDP
from hdp.data.sample import Sample
from hdp.scheduler import CostModel, estimate_cost, plan


def add_arguments(parser: Any) -> Any:
    group = parser.add_argument_group("hdp")
    group.add_argument("--hdp-max-tokens-per-rank", type=int, required=True)
    group.add_argument("--hdp-cost", help="a cost model of `hdp profile`; default: an estimate")
    group.add_argument("--hdp-policy", default="hdp")
    return parser


def cost_model(args: Any) -> CostModel:
    """Seconds of a sequence on a rank: measured, or estimated from the shape of the model."""
    if args.hdp_cost:
        return CostModel.find(args.hdp_cost)
    shape = {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_heads": args.num_attention_heads,
        "num_kv_heads": args.num_query_groups or args.num_attention_heads,
        "head_dim": args.kv_channels,
        "vocab_size": args.padded_vocab_size,
    }
    return estimate_cost(
        shape,
        device_type="cuda" if torch.cuda.is_available() else "cpu",
        bytes_per_element=2 if args.bf16 or args.fp16 else 4,
        tp_size=args.tensor_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
        pp_size=args.pipeline_model_parallel_size,
        recompute=args.recompute_granularity or "none",
    )


class Steps:
    """Steps of `batch` documents each, shuffled anew in each epoch, from a position on."""

    def __init__(self, path: str, position: int, args: Any) -> None:
        self.documents = IndexedDataset(path)
        self.position, self.args, self.cost = position, args, cost_model(args)

    def __iter__(self) -> Iterator[hdp.megatron.RankStep]:
        return self

    def __next__(self) -> hdp.megatron.RankStep:
        args, count = self.args, len(self.documents)
        numbers = range(self.position, self.position + args.global_batch_size)
        self.position = numbers.stop
        samples = [self.sample(self.document(number, count)) for number in numbers]
        made = plan(
            [len(sample.input_ids) for sample in samples],
            max_tokens_per_rank=args.hdp_max_tokens_per_rank,
            cost=self.cost,
            policy=args.hdp_policy,
            **hdp.megatron.plan_options(),
        )
        return hdp.megatron.pack_step(made, samples)

    def document(self, number: int, count: int) -> int:
        """The document at a place of the shuffled epochs; the same on all ranks."""
        rng = np.random.default_rng([self.args.seed, number // count])
        return int(rng.permutation(count)[number % count])

    def sample(self, document: int) -> Sample:
        tokens = self.documents.get(document, length=None)[: self.args.max_position_embeddings]
        return Sample(input_ids=np.asarray(tokens))


def datasets_provider(num_samples: Any, vp_stage: int | None = None) -> Any:
    args = get_args()
    (path,) = args.data_path
    train = Steps(path, args.consumed_train_samples, args)
    return train, Steps(path, args.consumed_valid_samples, args), None


# HDP: on all ranks, for each packs its own
setattr(datasets_provider, "is_distributed", True)  # noqa: B010


def main() -> None:
    args = parse_and_validate_args(extra_args_provider=add_arguments)
    hdp.megatron.check_arguments(args)  # HDP
    training.get_forward_backward_func = hdp.megatron.wrap(  # HDP
        training.get_forward_backward_func
    )
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets_provider,
        ModelType.encoder_or_decoder,
        hdp.megatron.forward_step,  # HDP
    )


if __name__ == "__main__":
    main()
