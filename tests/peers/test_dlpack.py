"""Arrays of PyTorch, JAX and others as data: taken by DLPack, without a copy where device and dtype match."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.requirements import require_gpu

import gpuback
from gpuback import MLP, Adam, TrainStep
from gpuback._backends.cuda.ops import CudaOps
from gpuback._network.inputs import as_batch
from gpuback._training.batches import Samples
from gpuback.errors import DeviceError, DtypeError


def of_jax(array: np.ndarray) -> jax.Array:
    with jax.enable_x64(True):
        return jnp.asarray(array)


LIBRARIES: dict[str, Callable[[np.ndarray], Any]] = {"numpy": np.asarray, "torch": torch.tensor, "jax": of_jax}
ADDRESS: dict[str, Callable[[Any], int]] = {
    "numpy": lambda array: array.ctypes.data,
    "torch": lambda tensor: tensor.data_ptr(),
    "jax": lambda array: array.unsafe_buffer_pointer(),
}
each_library = pytest.mark.parametrize("library", LIBRARIES)


def data(dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((21, 6)).astype(dtype), rng.uniform(0, 3, 21).astype(dtype)
    return x, rng.integers(5, size=21), w


# --- without a copy


@each_library
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_has_the_networks_dtype_is_not_copied(library: str, dtype: str) -> None:
    net = MLP([6, 5], dtype=dtype, backend="numpy", seed=0)
    given = [LIBRARIES[library](array) for array in data(dtype)]
    samples = Samples.checked(net, *given)
    for array, taken in zip(given, (samples.x, samples.y, samples.weight), strict=True):
        assert taken.ctypes.data == ADDRESS[library](array)
        assert taken.shape == tuple(array.shape)


def test_probability_rows_and_rows_of_values_are_not_copied() -> None:
    rows = torch.rand(21, 5)
    for loss in ("cross_entropy", "squared_error", "binary_cross_entropy"):
        net = MLP([6, 5], loss=loss, backend="numpy", seed=0)
        assert as_batch(torch.ones(21, 6), rows, None, net.architecture, net.ops)[1].ctypes.data == rows.data_ptr()


def test_what_a_tensor_holds_later_is_what_the_next_step_reads() -> None:
    net, x = MLP([6, 5], backend="numpy", seed=0), torch.zeros(1, 6)
    taken = net.ops.asarray(x, net.theta.dtype, "x")
    x.fill_(7)
    assert (taken == 7).all()


@each_library
def test_other_dtypes_are_converted_and_the_given_array_is_left_alone(library: str) -> None:
    net = MLP([6, 5], backend="numpy", seed=0)
    x, _, _ = data("float64")
    given = LIBRARIES[library](x)
    taken = net.ops.asarray(given, net.theta.dtype, "x")
    assert taken.tobytes() == x.astype(np.float32).tobytes()
    assert np.array_equal(np.asarray(given), x)


# --- training


@each_library
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_training_has_the_same_bits_whosever_the_arrays_are(library: str, dtype: str) -> None:
    """JAX's buffers are read-only: nothing may write to x, y or the weights."""
    x, y, w = (LIBRARIES[library](array) for array in data("float64" if dtype == "float64" else "float32"))
    nets = [MLP([6, 9, 5], activation="gelu", dtype=dtype, backend="numpy", seed=0) for _ in range(2)]
    for net, arrays in zip(nets, (data(str(x.dtype).rpartition(".")[2]), (x, y, w)), strict=True):
        TrainStep(net, Adam(0.01))(*arrays)
        net.value_and_grad(arrays[0], arrays[1], sample_weight=arrays[2], need_input_grad=True)
        gpuback.fit(net, *arrays[:2], sample_weight=arrays[2], epochs=2, batch_size=8, seed=0, validation=arrays[:2])
    assert nets[0].theta.tobytes() == nets[1].theta.tobytes()


def test_read_only_data_whose_rows_are_not_shuffled() -> None:
    net, twin = (MLP([6, 5], backend="numpy", seed=0) for _ in range(2))
    x, y, _ = data()
    gpuback.fit(net, of_jax(x), of_jax(y), epochs=2, batch_size=8, shuffle=False)
    gpuback.fit(twin, x, y, epochs=2, batch_size=8, shuffle=False)
    assert net.theta.tobytes() == twin.theta.tobytes()


# --- tensors that are not plain memory


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(6, 2).T,
        torch.arange(24.0).reshape(2, 12)[:, ::2],
        torch.arange(1.0, 7.0).expand(2, 6),
        torch.complex(torch.ones(2, 6), torch.arange(12.0).reshape(2, 6)).conj().imag,
    ],
    ids=["transposed", "strided", "expanded", "negated lazily"],
)
def test_tensors_in_any_layout(tensor: torch.Tensor) -> None:
    net = MLP([6, 5], backend="numpy", seed=0)
    expected = np.array(tensor.tolist(), np.float32)
    assert net.ops.asarray(tensor, net.theta.dtype, "x").tobytes() == expected.tobytes()


def deleted() -> jax.Array:
    array = jnp.ones((2, 6)) + 1
    array.delete()
    return array


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: torch.ones(2, 6, requires_grad=True), r"x: .* Tensor of float32: .*tensor.detach\(\)"),
        (lambda: torch.ones(2, 6).bfloat16(), r"x: .* Tensor of bfloat16, which NumPy .*x.float\(\)"),
        (lambda: torch.ones(2, 6).to(torch.float8_e4m3fn), r"x: .* Tensor of float8_e4m3fn, .*x.float\(\)"),
        (lambda: jnp.ones((2, 6), jnp.bfloat16), r"x: .*Array.* of bfloat16, .*x.astype\('float32'\) in JAX"),
        (lambda: torch.ones(2, 6).to_sparse(), "x: .*layout"),
        (lambda: torch.ones(2, 6, device="meta"), "x: expected an array in memory, got a Tensor: .*meta"),
        (lambda: torch.ones(2, 6, dtype=torch.complex64), "x: expected real numbers, got dtype complex64"),
        (lambda: torch.ones(2, 6, dtype=torch.complex64).conj(), "x: .*conjugate"),
        (deleted, "x: expected an array in memory"),
    ],
    ids=["requires grad", "bfloat16", "float8", "JAX bfloat16", "sparse", "meta", "complex", "conjugated", "deleted"],
)
def test_what_cannot_be_shared_is_refused_with_what_to_do(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(DtypeError, match=message):
        MLP([6, 5], backend="numpy", seed=0).forward(make())


def test_the_remedy_for_bfloat16_loses_nothing() -> None:
    net, x = MLP([6, 5], dtype="bfloat16", backend="numpy", seed=0), torch.randn(3, 6).bfloat16()
    assert net.forward(x.float()).tobytes() == net.forward(np.array(x.tolist())).tobytes()


def test_traced_arrays_are_refused() -> None:
    net = MLP([6, 5], backend="numpy", seed=0)
    with pytest.raises(DtypeError, match="x: "):
        jax.jit(net.forward)(jnp.ones((2, 6)))


@pytest.mark.parametrize("name", ["y", "sample_weight"])
def test_errors_name_the_argument(name: str) -> None:
    arrays = {"x": np.ones((2, 6)), "y": np.ones((2, 1)), "sample_weight": np.ones(2)}
    arrays[name] = torch.ones(arrays[name].shape, requires_grad=True)
    with pytest.raises(DtypeError, match=f"^{name}: .*detach"):
        MLP([6, 1], loss="squared_error", backend="numpy", seed=0).loss(**arrays)


# --- a GPU's memory, with stand-ins for CuPy and for the tensor: there is no GPU here


class OnDevice:
    """A tensor in the memory of the DLPack device (kind, 0)."""

    dtype = "float32"

    def __init__(self, kind: int) -> None:
        self.kind = kind

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("CuPy asks for it, nobody else")


def cupy_like(from_dlpack: Callable[[Any], Any]) -> CudaOps:
    xp = SimpleNamespace(ndarray=SimpleNamespace, from_dlpack=from_dlpack, ascontiguousarray=lambda array: array)
    return CudaOps(xp, SimpleNamespace(device_id=0, address=lambda array: 512))


@pytest.mark.parametrize("kind", [2, 13])
def test_data_on_the_gpu_are_taken_by_cupy_where_they_are(kind: int) -> None:
    tensor = OnDevice(kind)
    view = SimpleNamespace(dtype=np.dtype(np.float32), itemsize=4, device=SimpleNamespace(id=0))
    ops = cupy_like(lambda given: view if given is tensor else None)
    assert ops.asarray(tensor, np.dtype(np.float32), "x") is view
    assert ops.to_array(tensor, "x") is view


def test_what_cupy_refuses_is_refused_in_gpubacks_words() -> None:
    def from_dlpack(_: Any) -> Any:
        raise BufferError("Can't export tensors that require gradient, use tensor.detach()")

    with pytest.raises(DtypeError, match=r"^x: .*OnDevice of float32: .*tensor.detach\(\)"):
        cupy_like(from_dlpack).asarray(OnDevice(2), np.dtype(np.float32), "x")


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_not_copied() -> None:
    require_gpu()
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    net, given = MLP([6, 5], backend="cupy", seed=0), [torch.tensor(array, device="cuda") for array in data()]
    for tensor, taken in zip(given, as_batch(*given, net.architecture, net.ops), strict=True):
        assert taken.data.ptr == tensor.data_ptr()


@pytest.mark.parametrize("kind", [2, 8, 10, 13], ids=["CUDA", "Metal", "ROCm", "CUDA, managed"])
def test_a_network_on_numpy_takes_nothing_from_a_device(kind: int) -> None:
    with pytest.raises(DeviceError, match=rf"^x: expected data in host memory .*device \({kind}, 0"):
        MLP([6, 5], backend="numpy", seed=0).forward(OnDevice(kind))
