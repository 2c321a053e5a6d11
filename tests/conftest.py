"""Which tests run, and on which backend.

Modules marked `on_each_backend` run on NumPy and on the CUDA backend in the emulator: as it is, with narrow networks
taken as a whole, and, where `layers` asks for it, layer by layer. Where `hopper` asks for it, cases of 16-bit dtypes
that are not `thorough` run layer by layer on the kernels for Hopper, too, but not with --quick.

With --quick, which `make test` gives, tests marked `thorough` are left out, Hypothesis tries few examples, and of a
test with many combinations of parameters only so many run that each value of each parameter has one.
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence

import hypothesis
import pytest

import gpuback._backends.protocol
import gpuback._backends.registry
import gpuback._network.mlp
from gpuback._backends.registry import Backend, BackendStatus

BACKENDS = ("numpy", "emulated", "layers", "hopper")
MOST_EXAMPLES = 10
"""That Hypothesis tries with --quick."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=BACKENDS, help="run tests of this backend only")
    parser.addoption("--quick", action="store_true", help="leave out thorough tests, and most combinations of the rest")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "on_each_backend(layers, hopper): backend='auto' is one after the other")
    config.addinivalue_line("markers", "numpy_only: about how NumPy does it, or too large for the emulator")
    config.addinivalue_line(
        "markers", "thorough(first): with --quick none of its cases runs but the first ones, so many"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("on_each_backend")
    if marker:
        backends = [*BACKENDS[:2], *(name for name in BACKENDS[2:] if marker.kwargs.get(name))]
        if metafunc.definition.get_closest_marker("numpy_only"):
            backends = [*BACKENDS[:1]]
        metafunc.parametrize("_backend", backends, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--backend")
    chosen = [item for item in items if _runs_at_all(item) and wanted in (None, _backend_of(item))]
    if config.getoption("--quick"):
        chosen = _quick(chosen)
        for item in chosen:
            _try_few_examples(item)
    if left_out := set(items).difference(chosen):
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = chosen


def _backend_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("_backend", "numpy") if callspec else "numpy"


def _runs_at_all(item: pytest.Item) -> bool:
    """A single case may be marked `numpy_only`, too."""
    backend = _backend_of(item)
    if backend == "hopper" and (
        item.callspec.params.get("dtype") not in ("bfloat16", "float16") or item.get_closest_marker("thorough")
    ):
        return False
    return backend == "numpy" or item.get_closest_marker("numpy_only") is None


def _quick(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests that run with --quick, in their order."""
    functions = defaultdict(list)
    for item in items:
        if _backend_of(item) == "hopper":
            continue
        functions[item.parent, getattr(item, "originalname", item.name), _backend_of(item)].append(item)
    quick = {case for cases in functions.values() for case in _a_case_of_each_value(_without_thorough(cases))}
    return [item for item in items if item in quick]


def _without_thorough(cases: Sequence[pytest.Item]) -> list[pytest.Item]:
    """A function's cases but for those marked `thorough`, of which the first run as `first` says."""
    kept, thorough = [], 0
    for case in cases:
        marker = case.get_closest_marker("thorough")
        thorough += marker is not None
        if marker is None or thorough <= marker.kwargs.get("first", 0):
            kept.append(case)
    return kept


def _a_case_of_each_value(cases: Sequence[pytest.Item]) -> list[pytest.Item]:
    """A few cases of a function, with every value of every parameter. Among equally good ones the first, so that they
    are always the same."""
    values = {
        case: {(name, id(value)) for name, value in case.callspec.params.items()}
        if hasattr(case, "callspec")
        else {case}
        for case in cases
    }
    missing, chosen = set().union(*values.values()), []
    while missing:
        best = max(cases, key=lambda case: len(values[case] & missing))
        chosen.append(best)
        missing -= values[best]
    return chosen


def _try_few_examples(item: pytest.Item) -> None:
    """Where Hypothesis draws a test's arguments. What the test itself says comes before a profile, so it is changed."""
    settings = getattr(item.obj, "_hypothesis_internal_use_settings", None)
    if settings and settings.max_examples > MOST_EXAMPLES:
        item.obj._hypothesis_internal_use_settings = hypothesis.settings(settings, max_examples=MOST_EXAMPLES)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether --quick was given: for tests that repeat themselves in several ways, of which one will do."""
    return request.config.getoption("--quick")


@pytest.fixture(autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What backend="auto" stands for, and who runs `fused_backward` on NumPy arrays."""
    if getattr(request, "param", "numpy") == "numpy":
        yield
        return
    from support.requirements import require_emulator

    require_emulator()
    from support.emulated import emulated_ops  # the emulator cannot be imported everywhere

    fused_backward = sys.modules["gpuback._backends.fused_backward"]

    make = functools.partial(emulated_ops, fuse_networks=request.param == "emulated", hopper=request.param == "hopper")
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
    monkeypatch.setattr(fused_backward, "_kept", fused_backward._KeptLayers())
    ops.launcher.failed_records.clear()
    yield
    assert not ops.launcher.failed_records, "a step of training could not be recorded"
