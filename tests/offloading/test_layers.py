"""hdp/offloading is layered by file, and its objects form no reference cycles."""

from __future__ import annotations

import gc
import re
import weakref

import hdp.offloading
from hdp.offloading.types import ActivationPolicy
from tests.offloading.offload_engines import (
    every_policy,
    forward_of,
    gradients,
    loss_of,
    make_input,
    make_model,
    open_engine,
)
from tests.source_tree import MODULES, imports

PACKAGE = "hdp.offloading"


def test_each_layer_imports_only_those_above_it():
    """In the order in which the package's docstring lists them, all of them."""
    listed = re.findall(r"^    (\w+) {2,}\S", hdp.offloading.__doc__, re.M)
    files = {name.rpartition(".")[2] for name in MODULES if name.startswith(f"{PACKAGE}.")}
    assert set(listed) == files and len(listed) == len(files)
    for place, name in enumerate(listed):
        for imported, _ in imports(MODULES[f"{PACKAGE}.{name}"]):
            if imported.startswith(f"{PACKAGE}."):
                assert imported.split(".")[2] in listed[:place], f"{name} imports {imported}"


@every_policy
def test_no_reference_cycles(policy):
    """A forward and its Saved are freed with the graph, without the garbage collector."""
    model, x = make_model(2), make_input()
    with open_engine() as engine:
        gradients(model, x, forward_of(engine, policy))  # torch keeps a frame of its first mode
        gc.disable()
        try:
            forward = forward_of(engine, policy)
            with forward:
                loss = loss_of(model(x))
            gone = [weakref.ref(part) for part in (forward, forward._order, forward._registry)]
            del forward
            loss.backward()
            del loss
            engine.stats()  # frees what has lost its last owner
            assert [ref() for ref in gone] == [None] * len(gone)
        finally:
            gc.enable()


def test_a_context_around_many_steps_does_not_grow():
    """Uses that backward is done with are dropped while the context stays open."""
    model, x = make_model(2), make_input()
    with open_engine() as engine, forward_of(engine, ActivationPolicy(ratio=0.5)) as forward:
        sizes = []
        for _ in range(4):
            loss_of(model(x)).backward()
            sizes.append(len(forward._order._uses))
        assert len(set(sizes)) == 1, sizes
