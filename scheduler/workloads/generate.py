"""Workloads: generators of batch lengths, for planning without a dataset.

Long-context batches are long-tailed: most *samples* are short, yet a few long ones hold a large
share of all *tokens*. Both matter to a planner (short ones should not communicate, long ones need
many ranks), so the corpora here are built from published token shares, from which the sample shares
follow:

    bucket i holds a share t_i of all tokens
    =>  it holds a share (t_i / mean_i) / sum_j (t_j / mean_j) of all samples

* `github-like`, `byted-like`: the two corpora of the ByteScale paper (Fig. 4): shares per octave
  from 2K to 2M tokens.
* `wikipedia-like`, `lognormal`, `bimodal`: the usual distributions for comparing planners, up to
  256K tokens.
* `rl-rollout*`: groups of responses to one prompt, log-normal, truncated at the response cap;
  responses of one group are correlated, as half of the log-variance belongs to the prompt.

Everything is seeded (`numpy.random.Generator`, PCG64): the same name, count and seed give the same
lengths on every machine. `hdp.scheduler.workloads.read.read_lengths` takes real ones.

    from hdp.scheduler.workloads.generate import draw
    seqlens = draw("byted-like", num_tokens=32 * 2**20, seed=0)
    seqlens = draw("lognormal", num_sequences=8192, max_length=65536)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hdp.scheduler.plain import shown, whole

from .limit import MOST_SEQUENCES, counted, limit_lengths

KI = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A named length distribution; `sample(rng, n)` returns (n,) int64 lengths in tokens, all >=
    1."""

    name: str
    about: str
    max_length: int  # tokens; no sample is longer
    sample: Callable[[np.random.Generator, int], np.ndarray]


# ---- samplers ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Mixture of length buckets, specified by shares of *tokens*.

    `edges` has one more entry than `token_share`; bucket i is (edges[i], edges[i + 1]]. Samples are
    uniform in the first bucket; in the others *tokens* are spread evenly over the logarithm of the
    length, as they are over octaves in the corpora that this describes (density of samples: 1 /
    length^2). With `last_at_edge` all samples of the last bucket are exactly at its upper edge, as
    in a corpus whose longest documents were truncated there.
    """

    edges: tuple[int, ...]
    token_share: tuple[float, ...]
    last_at_edge: bool = False

    def means(self) -> np.ndarray:
        """(num_buckets,) float64: mean length per bucket, tokens."""
        low, high = np.array(self.edges[:-1], float), np.array(self.edges[1:], float)
        means = np.log(high / low) / (1 / low - 1 / high)
        means[0] = (low[0] + high[0]) / 2
        if self.last_at_edge:
            means[-1] = high[-1]
        return means

    def sample_share(self) -> np.ndarray:
        """(num_buckets,) float64: share of samples per bucket; sums to 1."""
        weight = np.array(self.token_share) / self.means()
        return weight / weight.sum()

    def __call__(self, rng: np.random.Generator, n: int) -> np.ndarray:
        bucket = rng.choice(len(self.token_share), size=n, p=self.sample_share())
        u = rng.random(n)
        low, high = (
            np.array(self.edges[:-1], float)[bucket],
            np.array(self.edges[1:], float)[bucket],
        )
        lengths = low / (1 - u * (1 - low / high))
        lengths = np.where(bucket == 0, low + (high - low) * u, lengths)
        if self.last_at_edge:
            lengths = np.where(bucket == len(self.token_share) - 1, high, lengths)
        return np.ceil(lengths).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormal:
    """Log-normal lengths clipped to [1, cap]; with `group` > 1 members of a group share half of the
    log-variance."""

    median: float
    sigma: float
    cap: int
    group: int = 1

    def __call__(self, rng: np.random.Generator, n: int) -> np.ndarray:
        z = rng.standard_normal(n)
        if self.group > 1:
            shared = np.repeat(rng.standard_normal(-(-n // self.group)), self.group)[:n]
            z = np.sqrt(0.5) * (z + shared)
        lengths = self.median * np.exp(self.sigma * z)
        return np.clip(np.round(lengths), 1, self.cap).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bimodal:
    """A share `long_share` of the samples is uniform in `long`, the rest uniform in `short`
    (tokens, inclusive)."""

    long_share: float
    short: tuple[int, int]
    long: tuple[int, int]

    def __call__(self, rng: np.random.Generator, n: int) -> np.ndarray:
        is_long = rng.random(n) < self.long_share
        short = rng.integers(self.short[0], self.short[1] + 1, n)
        long = rng.integers(self.long[0], self.long[1] + 1, n)
        return np.where(is_long, long, short).astype(np.int64)


# The paper's Fig. 4: shares of tokens per octave; labels are upper edges. For GitHub the figure
# gives one number fewer than it has octaves up to 128K: the 34.0 % below 4K are split so that 72 %
# of the samples are <= 2K, as its other half states. For Byted the order of 10.7 and 14.2 is
# unknown, and the one octave that is not 7.6 % is assumed to be the first.
_OCTAVES = (128, *(KI << k for k in range(1, 12)))
_GITHUB = (22.0, 12.0, 11.4, 10.4, 9.7, 9.5, 8.8, 6.4, 4.5, 3.0, 2.3)
_BYTED = (10.2, 7.6, 7.6, 7.6, 7.6, 7.6, 7.6, 7.3, 14.2, 10.7, 12.1)

_ALL = (
    Workload(
        name="github-like",
        about="code (ByteScale Fig. 4): 16 % of the tokens in sequences over 128K, up to 2M",
        max_length=2048 * KI,
        sample=Buckets(edges=_OCTAVES, token_share=_GITHUB),
    ),
    Workload(
        name="byted-like",
        about="a production mix (ByteScale Fig. 4): 44 % of the tokens over 128K, up to 2M",
        max_length=2048 * KI,
        sample=Buckets(edges=_OCTAVES, token_share=_BYTED, last_at_edge=True),
    ),
    Workload(
        name="wikipedia-like",
        about="articles: log-normal, median 500, sigma 1.1, up to 256K",
        max_length=256 * KI,
        sample=LogNormal(median=500, sigma=1.1, cap=256 * KI),
    ),
    Workload(
        name="lognormal",
        about="log-normal, median 1.1K, sigma 1.7, up to 256K",
        max_length=256 * KI,
        sample=LogNormal(median=1100, sigma=1.7, cap=256 * KI),
    ),
    Workload(
        name="lognormal-2k",
        about="log-normal, median 2K, sigma 1.5, up to 256K",
        max_length=256 * KI,
        sample=LogNormal(median=2000, sigma=1.5, cap=256 * KI),
    ),
    Workload(
        name="bimodal",
        about="95 % in 256..2K, 5 % in 32K..256K",
        max_length=256 * KI,
        sample=Bimodal(long_share=0.05, short=(256, 2 * KI), long=(32 * KI, 256 * KI)),
    ),
    Workload(
        name="rl-rollout",
        about="reasoning rollouts, 16 per prompt: median 6K, 6 % cut at 20,480",
        max_length=20480,
        sample=LogNormal(median=6000, sigma=0.8, cap=20480, group=16),
    ),
    Workload(
        name="rl-rollout-early",
        about="rollouts early in training, 16 per prompt: median 500, p99 5.1K, up to 20,480",
        max_length=20480,
        sample=LogNormal(median=500, sigma=1.0, cap=20480, group=16),
    ),
    Workload(
        name="rl-rollout-32k",
        about="long reasoning rollouts, 16 per prompt: median 8K, 6 % cut at 32,768",
        max_length=32768,
        sample=LogNormal(median=8000, sigma=0.9, cap=32768, group=16),
    ),
)
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _ALL}


# ---- drawing ----


def draw(
    name: str,
    *,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    overlong: str = "truncate",
) -> np.ndarray:
    """(n,) int64 lengths of the named workload: `num_sequences` of them, or enough for
    `num_tokens` tokens.

    With `num_tokens` the batch is filled in draw order and the last sequence is truncated, so the
    total is exact (the fixed token batch of pre-training). `max_length` limits lengths first, as
    `limit_lengths` does. Raises ValueError for an unknown name or counts that are not positive.
    """
    workload = _get(name)
    if isinstance(seed, int) and seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    seed = whole("seed", seed, low=0, most=2**63 - 1)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if (num_sequences is None) == (num_tokens is None):
        raise ValueError(
            f"give one of num_sequences and num_tokens, not {num_sequences} and {num_tokens}"
        )
    if num_sequences is not None:
        num_sequences = counted("num_sequences", num_sequences, most=MOST_SEQUENCES)
        return limit_lengths(workload.sample(rng, num_sequences), max_length, overlong)
    assert num_tokens is not None
    num_tokens = counted("num_tokens", num_tokens, most=2**53)
    parts: list[np.ndarray] = []
    missing = num_tokens
    while missing > 0:
        if 1024 * len(parts) > MOST_SEQUENCES:
            raise ValueError(
                f"num_tokens={num_tokens} takes more than {MOST_SEQUENCES} sequences of {name}; "
                "ask for fewer tokens"
            )
        part = limit_lengths(workload.sample(rng, 1024), max_length, overlong)
        if not len(part):
            raise ValueError(f"no sequence of {name} is within max_length={max_length}: raise it")
        ends = np.cumsum(part)
        part = part[: int(np.searchsorted(ends, missing)) + 1]
        parts.append(part)
        missing -= int(part.sum())
    lengths = np.concatenate(parts)
    lengths[-1] += missing  # missing <= 0: truncate the last one
    return lengths


def with_longest(seqlens: np.ndarray, longest: int) -> np.ndarray:
    """A copy with the longest sequence set to `longest`, as planner comparisons do."""
    seqlens = seqlens.copy()
    seqlens[int(np.argmax(seqlens))] = longest
    return seqlens


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkSet:
    """One row of the planner comparison: lengths, a cluster and its capacity."""

    label: str
    workload: str
    hdp_size: int
    max_tokens_per_rank: int
    num_sequences: int | None = None  # either this
    num_tokens: int | None = None  # or this
    longest: int | None = None  # one sequence is forced to this length

    def seqlens(self, seed: int = 0) -> np.ndarray:
        """(n,) int64 lengths, tokens."""
        lengths = draw(
            self.workload, num_sequences=self.num_sequences, num_tokens=self.num_tokens, seed=seed
        )
        return lengths if self.longest is None else with_longest(lengths, self.longest)


def _by_count(workload: str, num: int, ranks: int, longest: int | None = None) -> BenchmarkSet:
    return BenchmarkSet(
        label=f"{workload.removesuffix('-like')} {num}/{ranks}",
        workload=workload,
        num_sequences=num,
        hdp_size=ranks,
        max_tokens_per_rank=16 * KI,
        longest=longest,
    )


def _by_tokens(ranks: int, tokens_per_rank: int) -> BenchmarkSet:
    return BenchmarkSet(
        label=f"lognormal-2k {tokens_per_rank // KI}K each/{ranks}",
        workload="lognormal-2k",
        num_tokens=ranks * tokens_per_rank,
        hdp_size=ranks,
        max_tokens_per_rank=32 * KI,
        longest=256 * KI,
    )


# Two published comparisons of planners. The first (16,384 tokens per rank, lengths up to 256K)
# names median, number of sequences and ranks; the second (32,768 per rank, one sequence of 256K)
# names median, sigma, tokens and ranks. What they leave open is fixed here: sigma 1.7 in the first,
# with which Megatron's released scheduler reproduces its published score; bimodal's two ranges; one
# 256K article in Wikipedia.
BENCHMARK_SETS: tuple[BenchmarkSet, ...] = (
    _by_count("lognormal", 512, 64),
    _by_count("lognormal", 2048, 64),
    _by_count("lognormal", 8192, 256),
    _by_count("lognormal", 8192, 1024),
    _by_count("lognormal", 16384, 4096),
    _by_count("lognormal", 65536, 16384),
    _by_count("bimodal", 512, 16),
    _by_count("bimodal", 8192, 256),
    _by_count("wikipedia-like", 8192, 256, longest=256 * KI),
    _by_tokens(64, 32 * KI),
    _by_tokens(64, 64 * KI),
    _by_tokens(64, 128 * KI),
    _by_tokens(512, 128 * KI),
)


def _get(name: str) -> Workload:
    if not isinstance(name, str) or name not in WORKLOADS:
        raise ValueError(f"no workload {shown(name)}; choose one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]
