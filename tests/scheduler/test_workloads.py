"""Named workloads: their statistics are the published ones, on every machine the same lengths."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hdp.scheduler.workloads.generate import (
    BENCHMARK_SETS,
    KI,
    WORKLOADS,
    Buckets,
    draw,
    with_longest,
)
from hdp.scheduler.workloads.limit import limit_lengths
from hdp.scheduler.workloads.read import read_lengths

MANY = 1_000_000


@pytest.fixture(scope="module")
def lengths() -> dict[str, np.ndarray]:
    return {name: draw(name, num_sequences=MANY, seed=3) for name in WORKLOADS}


def _token_share_over(seqlens: np.ndarray, limit: int) -> float:
    return float(seqlens[seqlens > limit].sum() / seqlens.sum())


def _sample_share_up_to(seqlens: np.ndarray, limit: int) -> float:
    return float((seqlens <= limit).mean())


@pytest.mark.parametrize("name", WORKLOADS)
def test_lengths_are_positive_and_capped(name: str, lengths: dict[str, np.ndarray]) -> None:
    assert lengths[name].dtype == np.int64
    assert lengths[name].min() >= 1
    assert lengths[name].max() <= WORKLOADS[name].max_length


def test_byted_like_has_the_published_shares(lengths: dict[str, np.ndarray]) -> None:
    seqlens = lengths["byted-like"]
    assert _token_share_over(seqlens, 128 * KI) == pytest.approx(0.443, abs=0.02)
    assert _token_share_over(seqlens, 256 * KI) == pytest.approx(0.370, abs=0.02)
    assert _token_share_over(seqlens, 2048 * KI - 1) == pytest.approx(0.121, abs=0.02)
    assert _sample_share_up_to(seqlens, 4 * KI) == pytest.approx(0.80, abs=0.03)
    assert float((seqlens == 2048 * KI).mean()) == pytest.approx(0.0005, abs=0.0002)


def test_github_like_has_the_published_shares(lengths: dict[str, np.ndarray]) -> None:
    seqlens = lengths["github-like"]
    assert _token_share_over(seqlens, 128 * KI) == pytest.approx(0.162, abs=0.015)
    assert _token_share_over(seqlens, 256 * KI) == pytest.approx(0.098, abs=0.015)
    assert _sample_share_up_to(seqlens, 2 * KI) == pytest.approx(0.72, abs=0.02)


@pytest.mark.parametrize(
    ("name", "median", "cap", "capped"),
    [("rl-rollout", 6000, 20480, 0.06), ("rl-rollout-32k", 8000, 32768, 0.06)],
)
def test_rollouts_are_lognormal_cut_at_the_cap(
    name: str, median: int, cap: int, capped: float, lengths: dict[str, np.ndarray]
) -> None:
    assert np.median(lengths[name]) == pytest.approx(median, rel=0.02)
    assert float((lengths[name] == cap).mean()) == pytest.approx(capped, abs=0.01)


def test_early_rollouts_have_p99_5k(lengths: dict[str, np.ndarray]) -> None:
    assert np.median(lengths["rl-rollout-early"]) == pytest.approx(500, rel=0.02)
    assert np.percentile(lengths["rl-rollout-early"], 99) == pytest.approx(5100, rel=0.03)


def test_rollouts_of_one_prompt_share_half_the_variance(lengths: dict[str, np.ndarray]) -> None:
    logs = np.log(lengths["rl-rollout-early"]).reshape(-1, 16)  # its cap hardly cuts
    of_means = logs.mean(axis=1).var()
    assert of_means / logs.var() == pytest.approx(0.5 + 0.5 / 16, abs=0.02)


def test_bimodal_is_five_percent_long(lengths: dict[str, np.ndarray]) -> None:
    assert float((lengths["bimodal"] >= 32 * KI).mean()) == pytest.approx(0.05, abs=0.002)


def test_bucket_means_are_those_of_the_samples() -> None:
    buckets = Buckets(edges=(10, 100, 1000), token_share=(1, 3), last_at_edge=False)
    seqlens = buckets(np.random.default_rng(0), MANY)
    short = seqlens[seqlens <= 100]
    assert buckets.means()[0] == pytest.approx(short.mean(), rel=0.02)
    assert seqlens[seqlens > 100].sum() / seqlens.sum() == pytest.approx(0.75, abs=0.01)


def test_same_seed_same_lengths() -> None:
    # Pinned values: a batch named by workload and seed means the same lengths everywhere.
    assert draw("lognormal", num_sequences=4, seed=0).tolist() == PINNED_LOGNORMAL
    assert draw("lognormal", num_sequences=4, seed=1).tolist() != PINNED_LOGNORMAL
    assert draw("byted-like", num_sequences=4, seed=0).tolist() == PINNED_BYTED


PINNED_LOGNORMAL = [1453, 696, 6460, 348]
PINNED_BYTED = [1234, 321, 2935, 646]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_batch_of_tokens_is_exact(name: str) -> None:
    seqlens = draw(name, num_tokens=3_000_001, max_length=100_000)
    assert seqlens.sum() == 3_000_001
    assert seqlens.min() >= 1
    assert seqlens.max() <= 100_000


@pytest.mark.parametrize(
    ("overlong", "expected"),
    [
        ("drop", [5, 8]),
        ("truncate", [5, 8, 8, 8]),
        ("split", [5, 8, 8, 8, 8, 3]),
    ],
)
def test_overlong_sequences_are_treated_as_named(overlong: str, expected: list[int]) -> None:
    assert limit_lengths(np.array([5, 8, 16, 11]), 8, overlong).tolist() == expected


def test_overlong_error_names_count_and_longest() -> None:
    with pytest.raises(ValueError, match=r"2 sequences .* max_length=8 \(longest: 16\)"):
        limit_lengths(np.array([5, 8, 16, 11]), 8, "error")


def test_split_keeps_every_token() -> None:
    seqlens = draw("byted-like", num_sequences=20_000)
    pieces = limit_lengths(seqlens, 4096, "split")
    assert pieces.sum() == seqlens.sum()
    assert pieces.max() == 4096


def test_with_longest_forces_one() -> None:
    assert with_longest(np.array([3, 9, 1]), 100).tolist() == [3, 100, 1]


def test_benchmark_sets_are_what_their_labels_say() -> None:
    assert len({row.label for row in BENCHMARK_SETS}) == len(BENCHMARK_SETS)
    for row in BENCHMARK_SETS:
        seqlens = row.seqlens()
        assert row.num_sequences in (None, len(seqlens))
        assert seqlens.max() <= 256 * KI <= row.hdp_size * row.max_tokens_per_rank
        if row.longest:
            assert seqlens.max() == row.longest


# ---- reading files ----


def test_reads_text_npy_json_plan_and_folder(tmp_path) -> None:
    want = [7, 1, 300]
    (tmp_path / "a.txt").write_text("# lengths\n7\n\n1 # short\n300\n")
    np.save(tmp_path / "a.npy", np.array(want, dtype=np.int32))
    (tmp_path / "a.json").write_text(json.dumps(want))
    (tmp_path / "plan.json").write_text(json.dumps({"seqlens": want}))
    (tmp_path / "cache").mkdir()
    np.save(tmp_path / "cache" / "seqlens.npy", np.array(want))
    for name in ("a.txt", "a.npy", "a.json", "plan.json", "cache"):
        seqlens = read_lengths(tmp_path / name)
        assert seqlens.dtype == np.int64
        assert seqlens.tolist() == want, name


def test_reads_workloads_and_limits(tmp_path) -> None:
    assert len(read_lengths("workload:bimodal", num_sequences=10)) == 10
    assert read_lengths("workload:bimodal", num_tokens=99_999).sum() == 99_999
    (tmp_path / "a.txt").write_text("5\n9\n2\n")
    assert read_lengths(tmp_path / "a.txt", num_sequences=2, max_length=6).tolist() == [5, 6]
    assert read_lengths(tmp_path / "a.txt", num_tokens=6).tolist() == [5, 9]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"5\nx\n", r"a.txt:2: 'x' is not an integer"),
        ("a.txt", b"5\n1.5\n", r"a.txt:2"),
        ("a.txt", b"5\n0\n", r"length 1 is 0"),
        ("a.txt", b"5\n-3\n", r"length 1 is -3"),
        ("a.txt", b"", r"no lengths"),
        ("a.txt", b"\xff\xfe", r"cannot read"),
        ("a.json", b"{", r"cannot read"),
        ("a.json", b"{}", r"holds no list"),
        ("a.json", b"[1, 2.5]", r"length 1 is 2.5, not an integer"),
        ("a.json", b"[1, true]", r"length 1 is True"),
        ("a.npy", b"junk", r"cannot read lengths from .*a.npy"),
        ("a.txt", b"99999999999999999999\n", r"cannot read"),
        ("a.json", b"[99999999999999999999]", r"cannot read"),
        ("a.npy", b"", r"cannot read"),
    ],
)
def test_bad_files_are_clear_errors(tmp_path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_lengths(tmp_path / name)


def test_bad_arrays_are_clear_errors(tmp_path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"one-dimensional integer array"):
        read_lengths(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"float64"):
        read_lengths(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([5], dtype="timedelta64[s]"))
    with pytest.raises(ValueError, match="timedelta64"):
        read_lengths(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([1, 2**63 + 5], dtype=np.uint64))
    with pytest.raises(ValueError, match="length 1 is 9223372036854775813, too large for int64"):
        read_lengths(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("workload:nope", {}, "no workload 'nope'; choose one of github-like"),
        ("no-such-file", {}, "no file no-such-file"),
        ("workload:bimodal", {"num_sequences": 0}, "at least 1, not 0"),
        ("workload:bimodal", {"num_tokens": -5}, "at least 1, not -5"),
        ("workload:bimodal", {"num_sequences": 5, "num_tokens": 5}, "give one of"),
        ("workload:bimodal", {"num_sequences": 5, "max_length": 0}, "at least 1, not 0"),
        ("workload:bimodal", {"num_sequences": 5, "overlong": "cut"}, "not 'cut'"),
        ("workload:github-like", {"num_tokens": 5, "max_length": 3, "overlong": "drop"}, "within"),
    ],
)
def test_bad_requests_are_clear_errors(source: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_lengths(source, **options)


def test_more_lengths_than_the_file_has(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("5\n")
    with pytest.raises(ValueError, match="has 1 lengths, fewer than num_sequences=2"):
        read_lengths(tmp_path / "a.txt", num_sequences=2)


def test_an_empty_folder_is_a_clear_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="without a length index"):
        read_lengths(tmp_path)
