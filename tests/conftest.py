"""Setup shared by all tests.

One thread per process, GPU tests skipped without a GPU, the same hypothesis examples in every run,
and a time limit for each test that grows with the load of the machine.
"""

from __future__ import annotations

import os

# Before anything imports torch or numpy: two OpenMP threads on a busy core turn 0.02 ms into 16 ms.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from tests.patience import patience  # noqa: E402

# "ci" draws the same examples on every run, so a failing test keeps failing. To search further:
#   HYPOTHESIS_PROFILE=explore pytest tests/scheduler
_RELAXED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, database=None, **_RELAXED)
settings.register_profile("explore", max_examples=5000, print_blob=True, **_RELAXED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_cuda():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> object:
    """Scale pytest-timeout's limit, from pyproject.toml or a mark, by `patience`.

    Limits inside tests are shorter, because they report which process hung, and where.
    """
    mark = item.get_closest_marker("timeout")
    seconds = float(mark.args[0] if mark else item.config.getini("timeout") or 0)
    if item.config.getoption("timeout", None) is None:  # not given with --timeout
        item.add_marker(pytest.mark.timeout(patience(seconds)), append=False)
    return (yield)
