"""Modules marked `on_each_backend` run on NumPy, and a part of their cases on the CUDA backend in the emulator: as it
is, with narrow networks taken as a whole, and, where `layers` asks for it, layer by layer.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest

import gpuback._backends.protocol
import gpuback._backends.registry
import gpuback._network.mlp
from gpuback._backends.registry import Backend, BackendStatus

BACKENDS = ("numpy", "emulated", "layers")
MOST_CASES = {"emulated": 25, "layers": 0}
"""Of one test function, for pairs of values; each value by itself has a case in any event."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=BACKENDS, help="run tests of this backend only")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "on_each_backend(layers): backend='auto' is one after the other")
    config.addinivalue_line("markers", "numpy_only: about how NumPy does it, or too large for the emulator")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("on_each_backend")
    if marker:
        backends = BACKENDS if marker.kwargs.get("layers") else BACKENDS[:2]
        if metafunc.definition.get_closest_marker("numpy_only"):
            backends = BACKENDS[:1]
        metafunc.parametrize("_backend", backends, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted, emulated = config.getoption("--backend"), defaultdict(list)
    for item in items:
        if _backend_of(item) in BACKENDS[1:] and not item.get_closest_marker("numpy_only"):
            emulated[item.parent, item.originalname, _backend_of(item)].append(item)
    kept = {item for (*_, backend), cases in emulated.items() for item in _well_spread(cases, MOST_CASES[backend])}
    chosen, left_out = [], []
    for item in items:
        backend = _backend_of(item)
        runs = item in kept if backend in BACKENDS[1:] else True
        (chosen if runs and wanted in (None, backend or "numpy") else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = chosen


def _backend_of(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("_backend") if callspec else None


def _well_spread(cases: Sequence[pytest.Item], most: int) -> list[pytest.Item]:
    """A few cases of a test: every value of every parameter, then every pair of values as far as `most` cases reach.

    Among equally good ones the first, so that it is always the same.
    """
    chosen: list[pytest.Item] = []
    for together in (1, 2):
        offers = {case: set(itertools.combinations(sorted(case.callspec.indices.items()), together)) for case in cases}
        missing = set().union(*offers.values()).difference(*(offers[case] for case in chosen))
        while missing and (together == 1 or len(chosen) < most):
            best = max(cases, key=lambda case: len(offers[case] & missing))
            chosen.append(best)
            missing -= offers[best]
    return chosen


@pytest.fixture(autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What backend="auto" stands for, and who runs `fused_backward` on NumPy arrays."""
    if getattr(request, "param", "numpy") == "numpy":
        yield
        return
    from support.requirements import require_emulator

    require_emulator()
    from support.emulated import emulated_ops  # the emulator cannot be imported everywhere

    make = functools.partial(emulated_ops, fuse_networks=request.param == "emulated")
    ops, plain_for, plain_of = make(), gpuback._backends.registry.ops_for, gpuback._backends.registry.ops_of

    def ops_for(name: str, *, reproducible: bool = False) -> gpuback._backends.protocol.Ops:
        return plain_for("emulated" if name == "auto" else name, reproducible=reproducible)

    def ops_of(arrays: dict) -> gpuback._backends.protocol.Ops:
        plain_of(arrays)  # refuses what is refused
        return ops

    backend = Backend(make, lambda: BackendStatus(True, "the emulator"))
    monkeypatch.setitem(gpuback._backends.registry.BACKENDS, "emulated", backend)
    monkeypatch.setattr(gpuback._backends.registry, "ops_for", ops_for)
    monkeypatch.setattr(gpuback._network.mlp, "ops_for", ops_for)
    monkeypatch.setattr(gpuback._backends.registry, "ops_of", ops_of)
    ops.launcher.failed_records.clear()
    yield
    assert not ops.launcher.failed_records, "a step of training could not be recorded"
