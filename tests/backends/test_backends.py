"""Which backend can be used, and why or why not; kernels and tables agree on numbers."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import gpuback
import gpuback._backends.registry
from gpuback._backends.cuda import arguments as cuda_arguments
from gpuback._backends.cuda import updates as cuda_updates
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.losses import LOSSES


@pytest.fixture
def fresh_verdict():
    gpuback._backends.registry._cupy_status.cache_clear()
    yield
    gpuback._backends.registry._cupy_status.cache_clear()


def no_device() -> SimpleNamespace:
    return SimpleNamespace(is_available=lambda: False)


def broken_device() -> SimpleNamespace:
    def empty(size):
        raise RuntimeError("cudaErrorInsufficientDriver")

    return SimpleNamespace(is_available=lambda: True, empty=empty)


@pytest.mark.parametrize(
    ("cupy", "reason"),
    [
        (None, "cannot be imported"),
        (no_device(), "no CUDA device or no driver"),
        (broken_device(), "cudaErrorInsufficientDriver"),
    ],
)
def test_cupy_that_cannot_be_used_says_exactly_why(monkeypatch, fresh_verdict, cupy, reason):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    status = gpuback.backends()
    assert status["numpy"].available
    assert not status["cupy"].available
    assert reason in status["cupy"].reason
    with pytest.raises(gpuback.GpubackError, match=re.escape(status["cupy"].reason)):
        gpuback.MLP([2, 2], backend="cupy")
    with pytest.raises(gpuback.GpubackError, match=reason):
        gpuback.MLP([2, 2]).to("cupy")
    assert gpuback.MLP([2, 2], backend="auto").backend == "numpy"


def test_kernel_ids_stand_in_the_kernels_table():
    table = Path(__file__, "../../../kernels/README.md").resolve().read_text(encoding="utf-8")
    cells = [cell.strip() for line in table.splitlines() if line.startswith("|") for cell in line.strip("|").split("|")]
    for row in [*ACTIVATIONS.values(), *LOSSES.values()]:
        assert cells[cells.index(row.name) + 1] == str(row.kernel_id)
    for row in ACTIVATIONS.values():
        assert cells[cells.index(row.name) + 2] == row.derivative_from
    assert sorted(row.kernel_id for row in LOSSES.values()) == list(range(len(LOSSES)))
    for first, source in ((0, "h"), (32, "a")):
        numbers = [row.kernel_id for row in ACTIVATIONS.values() if row.derivative_from == source]
        assert sorted(numbers) == list(range(first, first + len(numbers)))


def enumerators(source: str, name: str) -> dict[str, int]:
    """NAME = number of an enum in a kernel source."""
    text = Path(__file__, "../../../kernels", source).resolve().read_text(encoding="utf-8")
    body = re.search(rf"enum {name} {{(.*?)}};", text, re.DOTALL).group(1)
    return {key: int(value) for key, value in re.findall(r"(\w+) = (-?\d+)", re.sub("//.*", "", body))}


def test_kernels_and_tables_agree_on_numbers():
    assert enumerators("common/activations.cuh", "Activation") == {
        row.name.upper(): row.kernel_id for row in ACTIVATIONS.values()
    }
    assert enumerators("common/loss_formulas.cuh", "Loss") == {
        row.name.upper(): row.kernel_id for row in LOSSES.values()
    }
    assert enumerators("common/loss_formulas.cuh", "OutputFunction") == {"OUTPUT_SOFTMAX": cuda_arguments.SOFTMAX}
    state = enumerators("common/optimizer_formulas.cuh", "State")
    assert state == {name.upper(): place for place, name in enumerate(cuda_updates.STATE)}
    hyper = enumerators("common/optimizer_formulas.cuh", "HyperParameter")
    assert hyper == {name.upper(): place for place, name in enumerate(cuda_updates.HYPER_PARAMETERS)}
