"""RunData: what a run trains on, what it is evaluated on, and in which order.

One data set is used as it is. Several without weights are one data set: each sequence comes once
per epoch. With weights, each is a source of a mixture. A share that is held out for evaluation is
taken from all of them first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hdp import console
from hdp.config import TrainConfig
from hdp.console import count
from hdp.data import MixtureSampler, Sampler, TokenDataset, Tokenizer, open_dataset, open_source
from hdp.data.joined_source import JoinedSource
from hdp.data.naming import parse_names
from hdp.data.pairs import PairDataset, PairSampler, open_labeled, open_pairs
from hdp.data.prepare.cache import cache_folder, open_tokenizer
from hdp.data.sample import content_checksum
from hdp.data.selection import Selection, count_shared, hold_out, subset
from hdp.distributed.agree import agree_on_values
from hdp.distributed.mesh import HDPMesh
from hdp.scheduler import CostModel
from hdp.scheduler.policies.memory import shard_capacity

from .task import is_paired

T = TypeVar("T")
Dataset = TokenDataset | Selection | PairDataset  # what a run trains on
DEMO_LENGTH = 2048  # limit of the demo data: batches are the same on any number of ranks
_MAX_COUNTED = 300_000  # sequences: above that, the length of an epoch is estimated
_MOST_WALKED = 2000  # steps: in more, rounding up to a whole one does not show


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """The data of a run."""

    training: Dataset
    evaluation: Selection | None
    sampler: Sampler | MixtureSampler
    sources: tuple[str, ...]  # names of a mixture's sources; () without weights

    def epochs_line(self) -> str:
        """How often each source of a mixture has been seen up to the sampler's position."""
        if not isinstance(self.sampler, MixtureSampler) or not self.sources:
            return ""
        seen = self.sampler.epochs_by_source(self.sampler.position)
        parts = (f"{name} {count:.2f}" for name, count in zip(self.sources, seen, strict=True))
        return f"epochs of each data set so far: {', '.join(parts)}"


def limit_demo_data(config: TrainConfig, hdp_size: int, *, say: bool) -> TrainConfig:
    """The demo data in pieces that the ranks hold, unless the configuration limits them itself."""
    if config.data != "stdlib" or config.max_length is not None:
        return config
    length = DEMO_LENGTH
    if config.max_tokens_per_rank != "auto":
        length = min(length, hdp_size * config.tokens_per_rank)
    if say:
        console.note(
            f"data stdlib: --max-length {length} --overlong split, because its longest file has "
            "about 190,000 tokens; set --max-length for another limit"
        )
    return replace(config, max_length=length, overlong="split")


def open_run_data(config: TrainConfig) -> RunData:
    """Open the training and evaluation data that `config` names, and order the training data.

    Raises ValueError for data that cannot be read, an evaluation set that is empty or cannot be
    used, and weights or a context schedule that the data cannot satisfy.
    """
    if config.objective != "sft":
        return _open_answers(config)
    names = parse_names(config.data)
    datasets = open_training_data(config)
    training: TokenDataset | Selection = datasets[0] if len(datasets) == 1 else Selection(datasets)
    evaluation = None
    if config.eval_data is not None:
        evaluation = _for_eval(config, lambda: _open_eval(config, datasets[0].tokenizer))
    elif config.held_out_share:
        training, evaluation = hold_out(datasets, config.held_out_share, seed=config.seed)
    if evaluation is not None and config.eval_tokens is not None:
        evaluation = subset(evaluation, config.eval_tokens, seed=config.seed)
    is_mixture = len(names) > 1 and names[0][1] is not None
    return RunData(
        training=training,
        evaluation=evaluation,
        sampler=_sampler(config, training, [weight for _, weight in names if is_mixture]),
        sources=tuple(name for name, _ in names) if is_mixture else (),
    )


def _open_answers(config: TrainConfig) -> RunData:
    """Pairs of answers, or answers that are good or bad, for the objectives that compare them."""
    tokenizer: Any = config.tokenizer
    if tokenizer == "auto":
        tokenizer = "bpe:4096" if config.model == "demo" else config.model
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "pattern": config.pattern,
        "subset": config.subset,
        "split": config.split,
        **_template_options(config),
        "max_length": config.max_length,
        "overlong": config.overlong,
        "strict": config.strict,
        "cache_dir": config.cache_dir,
    }
    training: PairDataset | Selection
    order: dict[str, Any] = {"batch_tokens": config.batch_tokens, "seed": config.seed}
    if is_paired(config):
        training = pairs = open_pairs(config.data, **options)
        sampler: Sampler = PairSampler(pairs.pair_lengths, **order)
    else:
        training = open_labeled(config.data, **options)
        sampler = Sampler(training.seqlens, **order)
    return RunData(training=training, evaluation=None, sampler=sampler, sources=())


def open_training_data(config: TrainConfig) -> list[TokenDataset]:
    """One dataset for each name in `config.data`, all with the same tokenizer.

    A bpe:SIZE tokenizer is trained on all of them. Raises ValueError for data that cannot be read.
    """
    tokenizer: Any = config.tokenizer
    if tokenizer == "auto":
        tokenizer = "bpe:4096" if config.model == "demo" else config.model
    names = [name for name, _ in parse_names(config.data)]
    if len(names) > 1 and tokenizer.startswith("bpe"):
        sources = [
            open_source(name, **_source_options(config, name, config.split)) for name in names
        ]
        tokenizer = open_tokenizer(
            tokenizer,
            JoinedSource(sources),
            cache_dir=cache_folder(config.cache_dir),
            **_template_options(config),
        )
    datasets: list[TokenDataset] = []
    for name in names:
        datasets.append(_open(config, name, tokenizer, config.split))
        tokenizer = datasets[0].tokenizer
    return datasets


def _open(config: TrainConfig, name: str, tokenizer: str | Tokenizer, split: str) -> TokenDataset:
    return open_dataset(
        name,
        tokenizer=tokenizer,
        **_source_options(config, name, split),
        **_template_options(config),
        max_length=config.max_length,
        overlong=config.overlong,
        strict=config.strict,
        cache_dir=config.cache_dir,
    )


def _source_options(config: TrainConfig, name: str, split: str) -> dict[str, Any]:
    # Beside data that may have subsets, a file is read whole; alone, it is refused with a subset.
    may_have_subset = not all(_is_file(other) for other, _ in parse_names(config.data))
    return {
        "text_column": config.text_column,
        "format": config.format,
        "pattern": config.pattern,
        "subset": None if may_have_subset and _is_file(name) else config.subset,
        "split": split,
    }


def _is_file(name: str) -> bool:
    return Path(name).expanduser().is_file()


def _template_options(config: TrainConfig) -> dict[str, Any]:
    return {
        "chat_template": config.chat_template,
        "chat_template_kwargs": config.template_variables,
    }


def _open_eval(config: TrainConfig, tokenizer: Tokenizer | None) -> Selection:
    assert tokenizer is not None and config.eval_data is not None
    if Path(config.eval_data).is_file() and not Path(config.eval_data).stat().st_size:
        raise ValueError("the file is empty")
    name = config.eval_data
    if _is_file(name):  # --split and --subset are about the training data
        config = replace(config, subset=None, split="train")
    split = config.eval_split or config.split
    return Selection([_open(config, name, tokenizer, split)])


def _for_eval(config: TrainConfig, call: Callable[[], T]) -> T:
    """The result of `call`; an error names the flag that it is about."""
    try:
        return call()
    except ValueError as error:
        said = str(error).replace("(--split)", "(--eval-split)")
        raise ValueError(f"--eval-data {config.eval_data}: {said}") from error


def agree_on_data(dataset: Dataset, mesh: HDPMesh) -> None:
    """Raise ValueError on all ranks if they read different tokens. Collective.

    Each node may have its own copy of the data, so contents are compared, not paths or times.
    """
    agree_on_values(
        {
            "number of sequences": len(dataset),
            "number of tokens": int(dataset.seqlens.sum()),
            "vocabulary size": dataset.vocab_size,
            "checksum of the tokens": content_checksum(dataset),
        },
        mesh.hdp_group,
        problem="ranks read different data",
        remedy="give all nodes the same files, tokenizer and cache",
    )


def check_data_fits(
    config: TrainConfig, data: RunData, *, hdp_size: int, cost: CostModel | None = None
) -> None:
    """Raise ValueError if a sequence is longer than all ranks together can hold.

    cost: given, a part of the activations goes to the host, as far as the cost model allows.
    """

    def check(sequences: Dataset) -> None:
        held: int | np.ndarray = config.tokens_per_rank
        if cost is not None:
            most = config.tokens_per_rank
            held = shard_capacity(sequences.seqlens, max_tokens_per_rank=most, cost=cost)
        sequences.check_fits(hdp_size=hdp_size, max_tokens_per_rank=held)

    check(data.training)
    evaluation = data.evaluation
    if evaluation is not None and config.eval_data is None:
        check(evaluation)
    elif evaluation is not None:
        _for_eval(config, lambda: check(evaluation))


def _sampler(
    config: TrainConfig, training: TokenDataset | Selection, weights: Sequence[float | None]
) -> Sampler | MixtureSampler:
    lengths = training.seqlens
    options: dict[str, Any] = {"batch_tokens": config.batch_tokens, "seed": config.seed}
    if not weights and config.curriculum == "none" and not config.context_limits:
        return Sampler(lengths, **options)
    sources = [lengths]
    if weights:
        assert isinstance(training, Selection)
        sources = np.split(lengths, np.cumsum(training.num_by_dataset)[:-1])
    return MixtureSampler(
        sources,
        weights=[float(weight) for weight in weights if weight is not None] or None,
        by=config.mix_by,
        short_first=config.curriculum == "short-first",
        limits=config.context_limits,
        **options,
    )


def describe_data(config: TrainConfig, data: RunData, *, epochs: float | None = None) -> list[str]:
    """Lines about the data for the start of a run; takes a pass over lengths, and reads tokens.

    epochs: what was asked for, if `config.steps` follows from it.
    """
    lines = [
        str(data.training.report),
        _epoch_line(config, data, epochs),
        *_limit_lines(config, data),
    ]
    if data.sources:
        assert isinstance(data.sampler, MixtureSampler)
        total = sum(data.sampler.weights)
        shares = zip(data.sources, data.sampler.weights, strict=True)
        parts = ", ".join(f"{name} {weight / total:.1%}" for name, weight in shares)
        given = sum(weight or 0.0 for _, weight in parse_names(config.data))
        scaled = "" if abs(given - 1) < 1e-6 else f"; the weights add up to {given:g}, scaled to 1"
        lines.insert(1, f"mixture, shares of {config.mix_by}: {parts}{scaled}")
    if data.evaluation is not None:
        lines += _eval_lines(config, data, data.evaluation)
    return lines


def _eval_lines(config: TrainConfig, data: RunData, evaluation: Selection) -> list[str]:
    share = config.held_out_share
    what = (
        f"{share:.2%} of the documents, held out" if config.eval_data is None else config.eval_data
    )
    tokens, labels = int(evaluation.seqlens.sum()), int(evaluation.num_loss_tokens.sum())
    every = ""
    if config.eval_every:
        steps = "step" if config.eval_every == 1 else f"{config.eval_every} steps"
        every = f"every {steps} and "
    lines = [
        f"evaluation {every}at the end: {what}: {count(len(evaluation), 'sequence')}, "
        f"{count(tokens, 'token')}, {labels:,} with loss"
    ]
    if config.eval_data is not None:
        lines += str(evaluation.report).splitlines()[1:]
    shared, compared = count_shared(evaluation, data.training)
    if shared:
        more = "" if compared == len(evaluation) else f" {compared:,} that were compared of the"
        lines.append(
            f"{shared:,} of the{more} {len(evaluation):,} evaluation sequences are also in the "
            "training data: the evaluation loss will be too low"
        )
    return lines


def _epoch_line(config: TrainConfig, data: RunData, epochs: float | None) -> str:
    num_sequences = len(data.training)
    if num_sequences <= _MAX_COUNTED:
        steps = count(data.sampler.num_steps(1.0), "step")
    else:
        steps = f"about {int(data.training.seqlens.sum()) // config.batch_tokens + 1:,} steps"
    return (
        f"1 epoch = {steps} ({count(num_sequences, 'sequence')}); this run: "
        f"{count(config.steps, 'step')}{_rounded_up(config, data, epochs)}"
    )


def _rounded_up(config: TrainConfig, data: RunData, epochs: float | None) -> str:
    """What the epochs that were asked for come to in whole steps, if that shows."""
    if epochs is None or config.steps > _MOST_WALKED:
        return ""
    position: Any = data.sampler.position
    for _ in range(config.steps):
        _, position = data.sampler.batch_at(position)
    done = data.sampler.epochs_done(position)
    if done - epochs < 0.005:
        return ""
    return f" (asked for {epochs:g} epochs, rounded up to whole steps: {done:.2f})"


def _limit_lines(config: TrainConfig, data: RunData) -> list[str]:
    lengths, lines = data.training.seqlens, []
    for batch, limit in config.context_limits:
        fitting = int(np.count_nonzero(lengths <= limit))
        lines.append(
            f"from step {batch + 1} on: sequences of at most {limit:,} tokens, "
            f"{fitting:,} of {len(lengths):,}"
        )
    if config.context_limits and fitting < len(lengths):
        over = count(len(lengths) - fitting, "sequence")
        lines.append(f"never trained on, as over the last limit: {over}")
    return lines
