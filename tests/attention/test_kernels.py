"""Every block kernel equals the fp64 oracle, and the right one is chosen.

On a GPU, for all that are installed:  python -m pytest -m gpu tests/attention/test_kernels.py
"""

from __future__ import annotations

import sys

import pytest
import torch

from hdp.attention import kernels
from hdp.attention.kernels import KERNELS, choose_kernel, select_kernel
from hdp.attention.kernels.base import Need
from hdp.attention.kernels.select import _choose
from hdp.attention.layout import Segments
from tests.attention.kernel_cases import CASES, GPU_CASES, Case, check_kernel

CPU = torch.device("cpu")
ON_GPU = [name for name in KERNELS if name not in ("cpu-flash", "reference")]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["reference", "cpu-flash"])
def test_kernel_equals_oracle(name: str, dtype: torch.dtype, case: str) -> None:
    torch.manual_seed(3)
    check_kernel(KERNELS[name](), CASES[case], dtype)


@pytest.mark.parametrize("name", ["reference", "cpu-flash"])
def test_rows_may_be_strided(name: str) -> None:
    torch.manual_seed(3)
    check_kernel(KERNELS[name](), CASES["ragged sequences"], torch.float64, strided=True)


# ---- on a GPU ----


def gpu_kernel(name: str, head_dim: int = 128) -> kernels.BlockKernel:
    try:
        device = torch.device("cuda")
        return choose_kernel(device, torch.bfloat16, name, head_dim=head_dim).kernel
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_kernel_equals_oracle(name: str, head_dim: int, case: str) -> None:
    """GQA 32/8 in bf16; both from a dense and from a varlen call where segments are equal."""
    torch.manual_seed(3)
    kernel = gpu_kernel(name, head_dim)
    shape = GPU_CASES[case].scaled(heads=32, kv_heads=8, head_dim=head_dim)
    check_kernel(kernel, shape, torch.bfloat16, "cuda")
    if getattr(kernel, "_dense", False):
        kernel._dense = False
        try:
            check_kernel(kernel, shape, torch.bfloat16, "cuda")
        finally:
            kernel._dense = True


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 1), (28, 4)])
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_heads_and_strides(name: str, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    for case in ("long and short", "rectangle"):
        shape = GPU_CASES[case].scaled(heads=heads, kv_heads=kv_heads, head_dim=128)
        check_kernel(gpu_kernel(name), shape, dtype, "cuda", strided=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_gradients_are_reproducible_when_asked(name: str) -> None:
    kernel = gpu_kernel(name)
    torch.manual_seed(3)
    q, dout = torch.randn(2, 3000, 8, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 3000, 2, 128, device="cuda", dtype=torch.bfloat16)
    segments = Segments((2000, 1000), (2000, 1000), causal=True)
    out, lse = kernel.forward(q, k, v, segments, 0.1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [kernel.backward(dout, q, k, v, out, lse, segments, 0.1) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.gpu
def test_gpu_reference_equals_oracle() -> None:
    check_kernel(KERNELS["reference"](), GPU_CASES["ragged rectangles"], torch.float32, "cuda")


# ---- choosing ----


def need(capability: tuple[int, int] | None = (9, 0), **others) -> Need:
    device_type = "cpu" if capability is None else "cuda"
    return Need(
        **({"device_type": device_type, "capability": capability, "dtype": torch.bfloat16} | others)
    )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Pretend that exactly these libraries are installed."""
    from hdp.attention.kernels import flash_attn, transformer_engine

    def pretend(*names: str) -> None:
        def problem(load, remedy: str) -> str | None:
            name = load.__name__.strip("_").replace("_", "-")
            return None if name in names else f"it is not installed: {remedy}"

        monkeypatch.setattr(flash_attn, "_import_problem", problem)
        reason = None if "transformer-engine" in names else "it is not installed: pip install it"
        monkeypatch.setattr(transformer_engine, "_problem", lambda: reason)
        _choose.cache_clear()

    yield pretend
    _choose.cache_clear()


@pytest.mark.parametrize(
    ("libraries", "capability", "head_dim", "expected"),
    [
        (("flash-attn-4", "flash-attn-3", "transformer-engine"), (9, 0), 128, "flash-attn-4"),
        (("flash-attn-3", "transformer-engine"), (9, 0), 128, "flash-attn-3"),
        (("transformer-engine", "flash-attn-2"), (9, 0), 128, "transformer-engine"),
        (("flash-attn-2",), (9, 0), 128, "flash-attn-2"),
        ((), (9, 0), 128, "torch-flash"),
        (("flash-attn-4", "flash-attn-3"), (10, 0), 128, "flash-attn-4"),
        (("flash-attn-3",), (10, 0), 128, "torch-flash"),
        (("flash-attn-4",), (10, 0), 192, "torch-flash"),
        (("flash-attn-4",), (10, 0), 256, "flash-attn-4"),
        (("flash-attn-4", "flash-attn-2"), (8, 0), 128, "flash-attn-2"),
        (("flash-attn-4",), (8, 6), 128, "torch-flash"),
        (("flash-attn-4",), (12, 0), 128, "torch-flash"),
        (("flash-attn-4",), (7, 5), 128, "reference"),
        (("flash-attn-4",), (9, 0), 20, "reference"),
        (("flash-attn-4",), (9, 0), None, "flash-attn-4"),
    ],
)
def test_best_that_fits_is_chosen(installed, libraries, capability, head_dim, expected) -> None:
    installed(*libraries)
    choice = _choose(need(capability, head_dim=head_dim), None)
    assert choice.kernel.name == expected, choice.why


def test_dtype_decides(installed) -> None:
    installed("flash-attn-4")
    assert _choose(need(dtype=torch.float32), None).kernel.name == "reference"
    assert _choose(need(dtype=torch.float16), None).kernel.name == "flash-attn-4"
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert select_kernel(CPU, dtype).name == "cpu-flash"


def test_the_choice_says_what_was_passed_over(installed) -> None:
    installed()
    why = _choose(need(), None).why
    assert why.startswith("FlashAttention-2 as built into torch (flash-attn-4: it is not installed")
    assert "pip install 'flash-attn-4[cu13]'" in why
    assert choose_kernel(CPU, torch.float32).why.startswith("torch's blocked attention for CPU")


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("flash-attn-4", need((8, 0)), "Hopper and Blackwell GPUs, this one is sm_80"),
        ("flash-attn-4", need((9, 0), head_dim=36), "head_dim 36 is not a multiple of 8"),
        ("flash-attn-4", need((10, 0), head_dim=192), "up to 128, and 256"),
        ("flash-attn-3", need((10, 0)), "runs on Hopper GPUs, this one is sm_100"),
        ("flash-attn-3", need(), "not installed.*'torch-flash' is chosen"),
        ("flash-attn-2", need(), "pip install 'flash-attn>=2.7'"),
        ("transformer-engine", need(), "not installed"),
        ("cudnn", need((8, 0)), "Hopper and Blackwell"),
        ("torch-flash", need((7, 0)), "Ampere and newer GPUs, this one is sm_70"),
        ("torch-flash", need(dtype=torch.float32), "needs bf16 or fp16 on cuda, got float32"),
        ("torch-flash", need(None), "got bfloat16 on cpu.*'cpu-flash' is chosen"),
        ("cpu-flash", need(), "runs on cpu, not cuda"),
        ("flash-9", need(), "'flash-9' is unknown; choose one of"),
    ],
)
def test_a_named_kernel_that_cannot_run_says_why(installed, name, wanted, message) -> None:
    installed()
    with pytest.raises(ValueError, match=message):
        _choose(wanted, name)


def test_named_kernel_is_taken() -> None:
    assert select_kernel(CPU, torch.float32, "reference").name == "reference"
    assert select_kernel(CPU, torch.float32, "cpu-flash", head_dim=16).name == "cpu-flash"


def test_broken_and_missing_installations_give_different_reasons(monkeypatch, tmp_path) -> None:
    """An import that fails in any way becomes a reason, not a crash."""
    for text, reason in (
        ("raise OSError('undefined symbol: _ZN3c10')", "its import fails .undefined symbol"),
        ("import flash_attn_3_cuda_that_is_not_there", "no module flash_attn_3_cuda_that"),
        ("_flash_attn_forward = None", "has no _flash_attn_backward"),
    ):
        (tmp_path / "flash_attn_interface.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
        _choose.cache_clear()
        with pytest.raises(ValueError, match=reason):
            _choose(need(), "flash-attn-3")
        sys.modules.pop("flash_attn_interface", None)
    _choose.cache_clear()


def test_equal_segments_are_uniform() -> None:
    assert Segments((4, 4), (4, 4), True).uniform
    assert Segments((4,), (9,), False).uniform
    assert not Segments((4, 4), (9, 8), False).uniform
    assert not Segments((), (), False).uniform


def test_offsets_are_copied_once_per_segments() -> None:
    """Two layers of a ring of three alternate between three `Segments`: none may evict another."""
    several = [Segments((n, 2), (n, 2), True) for n in (1, 2, 3)]
    first = [segments.cu_tensors(CPU) for segments in several]
    again = [segments.cu_tensors(CPU) for segments in several]
    for (a, b), (c, d), segments in zip(first, again, several, strict=True):
        assert a is c and b is d
        assert a.tolist() == list(segments.cu_seqlens_q)
        assert a.dtype == torch.int32


def test_case_scaled_changes_heads_only() -> None:
    case = GPU_CASES["rectangle"].scaled(heads=32, kv_heads=8, head_dim=64)
    assert case == Case(
        lens_q=(500,), lens_k=(1001,), other_k=(300,), heads=32, kv_heads=8, head_dim=64
    )
