"""`where`: which implementation of the ops a test runs."""

from __future__ import annotations

import dataclasses

import pytest

from hdp.ops import native as ops
from tests.ops.op_cases import LIBRARIES


@pytest.fixture(params=["reference", *LIBRARIES])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "reference" (as if no library were there), "cpu" or "cuda"."""
    if request.param == "reference":
        nothing = dataclasses.replace(ops.LIBRARY, devices=frozenset())
        monkeypatch.setattr(ops, "LIBRARY", nothing)
    return request.param
