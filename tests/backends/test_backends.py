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
from gpuback._core.losses import LOSSES, CrossEntropy

LOSS_IDS = {row.name: row.kernel_id for row in LOSSES.values()} | {
    "weighted_cross_entropy": CrossEntropy(label_smoothing=0.1).kernel_id
}


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


@pytest.mark.parametrize(
    ("value", "shown"), [("1", "on A GPU, GPUBACK_HOPPER=1"), ("", "on A GPU"), (None, "on A GPU")]
)
def test_the_switch_of_the_kernels_for_hopper_is_told_beside_the_gpu(monkeypatch, fresh_verdict, value, shown):
    runtime = SimpleNamespace(getDevice=lambda: 0, getDeviceProperties=lambda device: {"name": b"A GPU"})
    cupy = SimpleNamespace(
        is_available=lambda: True, empty=lambda size: None, cuda=SimpleNamespace(runtime=runtime), __version__="14"
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.delenv("GPUBACK_HOPPER", raising=False)
    if value is not None:
        monkeypatch.setenv("GPUBACK_HOPPER", value)
    assert gpuback.backends()["cupy"] == (True, f"CuPy 14 {shown}")


def test_kernel_ids_stand_in_the_kernels_table():
    table = Path(__file__, "../../../kernels/README.md").resolve().read_text(encoding="utf-8")
    cells = [cell.strip() for line in table.splitlines() if line.startswith("|") for cell in line.strip("|").split("|")]
    for name, number in {**{row.name: row.kernel_id for row in ACTIVATIONS.values()}, **LOSS_IDS}.items():
        assert cells[cells.index(name) + 1] == str(number)
    for row in ACTIVATIONS.values():
        assert cells[cells.index(row.name) + 2] == row.derivative_from
    assert sorted(LOSS_IDS.values()) == list(range(len(LOSS_IDS)))
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
    for source in ("common/loss_formulas.cuh", "exact/exact_losses.cu"):
        assert enumerators(source, "Loss") == {name.upper(): number for name, number in LOSS_IDS.items()}
    assert enumerators("common/loss_formulas.cuh", "OutputFunction") == {"OUTPUT_SOFTMAX": cuda_arguments.SOFTMAX}
    state = enumerators("common/optimizer_formulas.cuh", "State")
    assert state == {name.upper(): place for place, name in enumerate(cuda_updates.STATE)}
    hyper = enumerators("common/optimizer_formulas.cuh", "HyperParameter")
    assert hyper == {name.upper(): place for place, name in enumerate(cuda_updates.HYPER_PARAMETERS)}
