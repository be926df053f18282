"""`where`: the implementation of the ops that a test runs."""

from __future__ import annotations

import dataclasses

import pytest

from hdp.ops import native as ops
from tests.ops.op_cases import LIBRARIES


@pytest.fixture(params=["reference", *LIBRARIES])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "reference" (as if there were no library), "cpu" or "cuda"."""
    if request.param == "reference":
        nothing = dataclasses.replace(ops.LIBRARY, devices=frozenset())
        monkeypatch.setattr(ops, "LIBRARY", nothing)
    return request.param
