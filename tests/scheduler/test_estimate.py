"""estimate_cost(): what tensor parallelism, stages and recompute change, by hand."""

from __future__ import annotations

import pytest

from hdp.scheduler import estimate_cost

SHAPE = {
    **{"num_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 8},
    **{"num_kv_heads": 2, "head_dim": 8, "vocab_size": 128},
}
PLAIN = estimate_cost(SHAPE, device_type="cuda", bytes_per_element=2)


def cost(**options):
    return estimate_cost(SHAPE, device_type="cuda", bytes_per_element=2, **options)


def test_tensor_parallelism_divides_work_and_memory() -> None:
    half = cost(tp_size=2)
    for name in ("quadratic_s", "linear_s", "kv_bytes_per_token", "activation_bytes_per_token"):
        assert getattr(half, name) == pytest.approx(getattr(PLAIN, name) / 2), name


def test_key_heads_are_repeated_where_there_are_too_few() -> None:
    assert cost(tp_size=8).kv_bytes_per_token == cost(tp_size=2).kv_bytes_per_token


def test_without_sequence_parallelism_norms_are_whole() -> None:
    divided, whole = cost(tp_size=2), cost(tp_size=2, sequence_parallel=False)
    more = whole.activation_bytes_per_token - divided.activation_bytes_per_token
    assert more == 4 * (4 * 64 * 2) / 2  # layers, 4 rows of bf16, the half that is not divided
    assert whole.linear_s == divided.linear_s
    assert cost(sequence_parallel=False) == PLAIN


def test_stages_divide_layers() -> None:
    stage = cost(pp_size=2)
    assert stage.num_layers == 2
    assert stage.linear_s == pytest.approx(PLAIN.linear_s / 2)
    with pytest.raises(ValueError, match="num_layers=4 is not divisible by pp_size=3"):
        cost(pp_size=3)


def test_recompute_is_a_second_forward() -> None:
    attention, layers = cost(recompute="selective"), cost(recompute="full")
    assert attention.quadratic_s == layers.quadratic_s == pytest.approx(PLAIN.quadratic_s * 9 / 7)
    assert attention.linear_s == PLAIN.linear_s
    assert layers.linear_s == pytest.approx(PLAIN.linear_s * 4 / 3)
    # 2 bytes twice and 4 of gradients; then 2 bytes three times
    assert layers.kv_bytes_per_token == pytest.approx(PLAIN.kv_bytes_per_token * 10 / 8)
    assert attention.activation_bytes_per_token == PLAIN.activation_bytes_per_token
    assert layers.activation_bytes_per_token == 4 * 64 * 2  # inputs of the layers
    one_layer = PLAIN.activation_bytes_per_token / 4
    assert layers.temporary_bytes_per_token == PLAIN.temporary_bytes_per_token + one_layer
    assert cost(tp_size=2, recompute="full").activation_bytes_per_token == 4 * 64 * 2 / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute": "some"}, "recompute='some'; choose one of none, selective, full"),
        ({"tp_size": 0}, "tp_size=0 must be at least 1"),
        ({"pp_size": -1}, "pp_size=-1 must be at least 1"),
    ],
)
def test_bad_input(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cost(**options)
