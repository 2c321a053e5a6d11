"""CuPy on a real GPU beside NumPy: every operation, dtype and family of shapes, and what users do with both.

One operation is held to the contract's tolerance, by the float64 oracle of support/layer_calls.py. Whole networks are
compared by norms, since roundings travel. CUPY_TF32=1, which makes CuPy's own products use TF32, may change nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.combinations import in_turn
from support.gpu_networks import OPTIMIZERS, each_dtype, twins
from support.layer_calls import ACTIVATIONS, DTYPES, LAYOUTS, Layer, assert_right, layer, relaid
from support.oracle import G
from support.requirements import require_gpu

import gpuback
from gpuback import MLP, SGD, Adam, TrainStep, datasets, fit
from gpuback._backends.cuda.ops import CudaOps
from gpuback._backends.registry import ops_for
from gpuback._core.activations import ACTIVATIONS as TABLE
from gpuback._core.losses import LOSSES
from gpuback._core.precision import Precision
from gpuback._network.backprop import empty_gradients
from gpuback._network.inputs import as_batch
from gpuback._training import checkpoint
from gpuback.errors import DeviceError, DivergedError, LabelError
from gpuback.testing import random_batch, tolerance

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:overflow encountered in exp")]

PRECISIONS = {name: Precision.of(dtype, allow_tf32=name == "tf32") for name, dtype in DTYPES.items()}
CLOSE = {"float64": 1e-12, "float32": 2e-5, "tf32": 3e-3, "bfloat16": 3e-2, "float16": 6e-3}
"""Between two backends' results for a small network, relative to the norm."""

SHAPES = [
    *((1, 1, 1), (1, 300, 5), (2, 3, 1), (65, 40, 129), (100, 17, 33)),
    *((300, 64, 64), (333, 64, 128), (5000, 128, 64), (4096, 128, 128), (257, 37, 101)),  # narrow on both sides
    *((1000, 72, 136), (520, 130, 70), (1037, 256, 64), (3000, 500, 300), (40, 1000, 700)),  # not narrow
    *((20_001, 5, 3), (66_000, 64, 64)),
]


@pytest.fixture(scope="module", autouse=True)
def cupy() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUPY_TF32", "1")
        require_gpu()
        import cupy

        yield cupy


@pytest.fixture
def on_device(cupy: Any) -> Callable[[NDArray], Any]:
    """Copies an array together with how it lies in memory: its strides, and its address modulo 256."""

    def copy(x: NDArray) -> Any:
        low, high = np.lib.array_utils.byte_bounds(x)
        first = low % 256
        memory = cupy.empty(first + high - low, np.uint8)
        memory[first:] = cupy.asarray(np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low)))
        start = memory.data + first + (x.__array_interface__["data"][0] - low)
        return cupy.ndarray(x.shape, x.dtype, memptr=start, strides=x.strides)

    return copy


def host(array: Any) -> NDArray:
    return array.get() if hasattr(array, "get") else array


def assert_close(name: str, dtype: str, gpu: Any, cpu: Any) -> None:
    gpu, cpu = (np.asarray(host(x), np.float64) for x in (gpu, cpu))
    assert gpu.shape == cpu.shape, name
    error, size = np.linalg.norm(gpu - cpu), np.linalg.norm(cpu)
    assert error <= CLOSE[dtype] * max(size, 1e-3), f"{name}: off by {error / size:.2g} of its norm"


# ---- fused_backward


def layer_case(dtype: str, shape: tuple[int, int, int], **options: Any) -> Layer:
    if dtype == "float64" and np.prod(shape) > 3_000_000:  # the oracle's long double has no BLAS
        shape = shape[0], *(min(n, 3_000_000 // shape[0] // 6, 100) for n in shape[1:])
    return layer(np.random.default_rng([*shape]), shape, dtype, **options)


def backward(case: Layer, on_device: Any, **options: Any) -> tuple[Any, Any, Any]:
    moved = replace(case, **{name: on_device(getattr(case, name)) for name in ("da", "h_prev", "a_prev", "W")})
    return moved.backward(**options)


def on_host(results: tuple[Any, ...]) -> list[NDArray]:
    return [x.get() for x in results]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_backward_of_any_shape(shape: tuple[int, int, int], dtype: str, on_device: Any) -> None:
    activation = ACTIVATIONS[SHAPES.index(shape) % len(ACTIVATIONS)]
    for kind in ("mixed", "positive"):
        case = layer_case(dtype, shape, activation=activation, kind=kind)
        first, again = (on_host(backward(case, on_device)) for _ in range(2))
        assert_right(case, *first)
        assert [x.tobytes() for x in first] == [x.tobytes() for x in again]


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_backward_with_each_activation(activation: str, dtype: str, on_device: Any) -> None:
    for shape in [(40, 33, 21), (257, 64, 96), (300, 150, 200)]:
        case = layer_case(dtype, shape, activation=activation)
        assert_right(case, *on_host(backward(case, on_device)))


def off_by_one(x: NDArray) -> NDArray:
    """Begins at an odd element, with rows an odd number of elements apart. GPUs read nothing between elements."""
    pitch = x.shape[1] | 1
    room = np.full(1 + len(x) * pitch, np.nan, x.dtype)
    view = room[1:].reshape(len(x), pitch)[:, : x.shape[1]]
    view[...] = x
    return view


@each_dtype
@pytest.mark.parametrize("layout", ["off by one", *(name for name in LAYOUTS if name != "unaligned")])
def test_fused_backward_of_any_layout(layout: str, dtype: str, on_device: Any) -> None:
    for shape in [(7, 5, 3), (257, 64, 96), (300, 150, 200)]:
        case = layer_case(dtype, shape, activation="gelu")
        names = ("da", "h_prev", "a_prev", "W")
        given = [getattr(case, name) for name in names]
        laid_out = [off_by_one(x) if layout == "off by one" else relaid(x, layout) for x in given]
        case = replace(case, **dict(zip(names, laid_out, strict=True)))
        assert_right(case, *on_host(backward(case, on_device)))


@each_dtype
@pytest.mark.parametrize("need_da_prev", [True, False])
def test_fused_backward_adds_to_what_is_there(need_da_prev: bool, dtype: str, on_device: Any, cupy: Any) -> None:
    for shape in [(7, 5, 3), (3000, 64, 96), (3000, 150, 200)]:
        case = layer_case(dtype, shape, activation="tanh")
        total = PRECISIONS[dtype].accumulator
        n_out, n_in = case.W.shape
        before = np.random.default_rng(1).standard_normal((n_out, n_in)).astype(total)
        dW, db = cupy.asarray(before), cupy.asarray(before[:, 0].copy())
        results = backward(case, on_device, need_da_prev=need_da_prev, accumulate=True, dW=dW, db=db)
        assert results[0] is dW and results[1] is db and (results[2] is not None) == need_da_prev
        da_prev = results[2].get() if need_da_prev else None
        assert_right(case, dW.get(), db.get(), da_prev, dW_before=before, db_before=before[:, 0])


@each_dtype
def test_integers_are_exact(dtype: str, on_device: Any) -> None:
    for shape in [(15, 7, 6), (257, 48, 33), (65_537, 3, 2), (5000, 128, 128), (1000, 300, 200), (2, 20_000, 3)]:
        rng = np.random.default_rng(4)
        B, n_out, n_in = shape
        da, h, W = (rng.integers(-3, 4, s) for s in ((B, n_out), (B, n_in), (n_out, n_in)))
        operands = [on_device(x.astype(DTYPES[dtype])) for x in (da, h, W)]
        dW, db, da_prev = on_host(gpuback.fused_backward(*operands, allow_tf32=dtype == "tf32"))
        np.testing.assert_array_equal(dW, da.T @ h)
        np.testing.assert_array_equal(db, da.sum(axis=0))
        np.testing.assert_array_equal(da_prev, (da @ W).astype(np.float32).astype(da_prev.dtype))


@pytest.mark.parametrize("shape", [(7, 5, 3), (65, 40, 129), (1000, 200, 300)])
def test_float32_is_not_tf32_unless_allowed(shape: tuple[int, int, int], on_device: Any) -> None:
    case = layer_case("float32", shape, scale=1.1)
    exact = case.da.astype(float).T @ case.h_prev
    limit = tolerance(np.abs(case.da.astype(float)).T @ np.abs(case.h_prev), len(case.da), "float32")
    assert np.all(np.abs(backward(case, on_device)[0].get() - exact) <= limit)
    assert np.any(np.abs(backward(case, on_device, allow_tf32=True)[0].get() - exact) > limit)


def test_subnormal_numbers_count(on_device: Any) -> None:
    tiny = np.full((1, 3), 2.0**-140, np.float32)
    da, h_prev, W = (on_device(x.astype(np.float32)) for x in (tiny, np.ones((1, 3)), np.eye(3)))
    for result in on_host(gpuback.fused_backward(da, h_prev, W)):
        assert (result == tiny[0, 0]).all()


@each_dtype
def test_on_a_stream_of_ones_own(dtype: str, on_device: Any, cupy: Any) -> None:
    """Many calls on two streams at once share no workspace."""
    case = layer_case(dtype, (3000, 64, 96), activation="tanh")
    expected = [x.tobytes() for x in on_host(backward(case, on_device))]
    moved = replace(case, **{name: on_device(getattr(case, name)) for name in ("da", "h_prev", "a_prev", "W")})
    cupy.cuda.runtime.deviceSynchronize()  # such streams do not wait for the copies
    streams, results = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)], []
    for _ in range(10):
        for stream in streams:
            with stream:
                results.append(moved.backward())
    for stream in streams:
        stream.synchronize()
    for result in results:
        assert [x.tobytes() for x in on_host(result)] == expected


# ---- Forward passes, layer by layer


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_hidden_layer(activation: str, dtype: str, cupy: Any) -> None:
    """h = g(h_prev Wᵀ + b) as the bound operation gives it, against float64."""
    precision, row = PRECISIONS[dtype], TABLE[activation]
    ops = ops_for("cupy")
    wide = np.longdouble if dtype == "float64" else np.float64
    u = 2.0**-53 if dtype == "float64" else 2.0**-24
    for shape in [(1, 1, 1), (37, 5, 300), (257, 64, 64), (1000, 130, 70), (5000, 128, 200)]:
        case = layer_case(dtype, shape, activation="identity", scale=0.1)
        rows, (n_out, n_in) = len(case.da), case.W.shape
        bias = np.random.default_rng(2).standard_normal(n_out).astype(precision.accumulator)

        def padded(x: NDArray) -> Any:
            out = ops.padded(*x.shape, precision.operand)
            out[...] = cupy.asarray(x)
            return out

        h_prev, W = padded(case.h_prev), padded(case.W)
        h = ops.padded(rows, n_out, precision.operand)
        a = ops.padded(rows, n_out, precision.operand) if row.derivative_from == "a" else None
        workspace = ops.workspace(rows, (n_in, n_out), precision)
        ops.bind_forward(W, cupy.asarray(bias), h, a, row, workspace)(h_prev)

        operands = case.h_prev.astype(wide), case.W.astype(wide)
        exact = operands[0] @ operands[1].T + bias
        magnitude = np.abs(operands[0]) @ np.abs(operands[1]).T + np.abs(bias)
        options = {"dtype": precision.operand, "allow_tf32": precision.tf32, "stored": True}
        limit = tolerance(magnitude, n_in + 1, exact=exact, **options)
        if a is not None:
            assert np.all(np.abs(a.get().astype(wide) - exact) <= limit)
            exact, limit = a.get().astype(wide), 0.0  # g reads a as it is stored
        limit = 1.13 * limit + 16 * u * (1 + np.abs(exact))  # no g is steeper than 1.13
        exact = G[activation](exact)
        limit = limit + tolerance(0 * exact, 1, exact=exact, **options)
        assert np.all(np.abs(h.get().astype(wide) - exact) <= limit), shape


# ---- Networks

OUTPUTS = [(loss, output) for loss, row in LOSSES.items() for output in row.outputs]
NETWORKS = [
    *(((7, 33, 64, 5), 37), ((64, 128, 10), 1), ((20, 200, 3), 300), ((3, 64, 64, 64, 2), 1000), ((5, 1), 9)),
    *(((9, *[31] * 12, 5), 300), ((64,) * 8, 5000), ((9, *[50] * 9, 5), 700), ((100, 128, 90, 128, 7), 300)),
]
"""Narrow ones in one launch and in two, and one that goes layer by layer."""


@pytest.fixture(params=["fused_step", "layers"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow networks as a whole, as ever, or layer by layer."""
    if request.param == "layers":
        monkeypatch.setattr(CudaOps, "fused_network", lambda *network, **needs: None)


@each_dtype
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("activation, choice", in_turn(ACTIVATIONS, OUTPUTS))
def test_networks(activation: str, choice: tuple[str, str | None], dtype: str) -> None:
    loss, output = choice
    turn = ACTIVATIONS.index(activation) + OUTPUTS.index((loss, output))
    sizes, rows = NETWORKS[turn % len(NETWORKS)]
    cpu, gpu = twins(sizes, dtype, activation=activation, loss=loss, output=output)
    assert (cpu.backend, gpu.backend) == ("numpy", "cupy")
    x, y = random_batch(cpu, rows, turn)
    if loss in ("absolute_error", "quantile"):
        y += 4 * np.sign(y)  # residuals whose sign no rounding changes
    weight = np.random.default_rng(turn).uniform(0.1, 2.0, rows) if turn % 2 else None
    given = {"sample_weight": weight, "need_input_grad": True}
    assert_close("ŷ", dtype, gpu.forward(x), cpu.forward(x))
    assert_close("loss", dtype, gpu.loss(x, y, sample_weight=weight), cpu.loss(x, y, sample_weight=weight))
    (value, found), (expected, exact) = (net.value_and_grad(x, y, **given) for net in (gpu, cpu))
    assert_close("loss", dtype, value, expected)
    assert_close("∇θ", dtype, found.theta, exact.theta)
    inputs = [host(gradients.inputs) for gradients in (found, exact)]
    if dtype == "tf32" and activation in ("relu", "leaky_relu"):  # rounding may lead across a kink
        off = np.linalg.norm(inputs[0] - inputs[1], axis=1)
        inputs = [dx[off <= np.quantile(off, 0.99)] for dx in inputs]
    assert_close("∂loss/∂x", dtype, *inputs)
    for net, gradients in ((gpu, found), (cpu, exact)):
        net.value_and_grad(x[:1], y[:1], out=gradients, accumulate=True)
    assert_close("the sum of two ∇θ", dtype, found.theta, exact.theta)


@each_dtype
def test_labels_as_probability_rows(dtype: str) -> None:
    cpu, gpu = twins((7, 33, 5), dtype)
    x, y = random_batch(cpu, 50)
    rows = 0.9 * np.eye(5)[y] + 0.02
    for net in (cpu, gpu):
        assert net.value_and_grad(x, rows)[0].dtype == net.theta.dtype
    assert_close("∇θ", dtype, gpu.value_and_grad(x, rows)[1].theta, cpu.value_and_grad(x, rows)[1].theta)


@each_dtype
def test_the_same_bits_again_whatever_the_stream(dtype: str, cupy: Any) -> None:
    _, net = twins((64, 128, 64, 10), dtype, activation="gelu")
    x, y = random_batch(net, 4000)
    value, gradients = net.value_and_grad(x, y, need_input_grad=True)
    expected = [a.get().tobytes() for a in (value, gradients.theta, gradients.inputs)]
    for turn in range(5):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            other = net if turn % 2 else net.to("cupy")
            value, gradients = other.value_and_grad(x, y, need_input_grad=True)
            stream.synchronize()
        assert [a.get().tobytes() for a in (value, gradients.theta, gradients.inputs)] == expected


def test_a_label_out_of_range_on_the_device(cupy: Any) -> None:
    """The host cannot look without waiting: loss and gradients become NaN, and nothing is read out of bounds."""
    cpu, gpu = twins((7, 33, 5), "float32")
    x, y = random_batch(cpu, 50)
    for label in (5, -1, 2**40, -(2**62)):
        wrong = y.copy()
        wrong[17] = label
        with pytest.raises(LabelError):
            gpu.value_and_grad(x, wrong)
        value, gradients = gpu.value_and_grad(x, cupy.asarray(wrong), need_input_grad=True)
        assert np.isnan(float(value))
        assert np.isnan(gradients.inputs.get()).any(axis=1).tolist() == [b == 17 for b in range(50)]
    assert_close("∇θ", "float32", gpu.value_and_grad(x, cupy.asarray(y))[1].theta, cpu.value_and_grad(x, y)[1].theta)


def test_arrays_of_both_kinds_are_refused_together(on_device: Any) -> None:
    case = layer_case("float32", (7, 5, 3))
    arrays = {"da": case.da, "h_prev": case.h_prev, "W": case.W}
    for name in arrays:
        with pytest.raises(DeviceError, match=r"numpy.ndarray.*cupy.ndarray|cupy.ndarray.*numpy.ndarray"):
            gpuback.fused_backward(**arrays | {name: on_device(arrays[name])})
    cpu, gpu = twins((3, 4, 2), "float32")
    with pytest.raises(DeviceError):
        cpu.forward(on_device(case.h_prev))
    assert_close("ŷ", "float32", gpu.forward(on_device(case.h_prev)), gpu.forward(case.h_prev))


# ---- Training


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_optimizers(optimizer: str, dtype: str, cupy: Any) -> None:
    """Twenty updates from the same gradients."""
    nets = twins((60, 70, 50), dtype)
    optimizers = [OPTIMIZERS[optimizer]() for _ in nets]
    rng = np.random.default_rng(6)
    for _ in range(20):
        gradients = empty_gradients(nets[0].architecture, nets[0].ops)
        gradients.theta[:] = rng.standard_normal(nets[0].n_parameters) * 10.0 ** rng.integers(-6, 2)
        moved = empty_gradients(nets[1].architecture, nets[1].ops)
        moved.theta[...] = cupy.asarray(gradients.theta)
        optimizers[0].step(nets[0], gradients)
        optimizers[1].step(nets[1], moved)
    assert_close("θ", dtype, nets[1].theta, nets[0].theta)
    assert [o.step_count for o in optimizers] == [20, 20]


@each_dtype
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_training_steps(clip_norm: float | None, optimizer: str, dtype: str) -> None:
    nets = twins((20, 64, 40, 5), dtype, activation="tanh")
    steps = [TrainStep(net, OPTIMIZERS[optimizer](), clip_norm=clip_norm) for net in nets]
    x, y = random_batch(nets[0], 200)
    for turn in range(6):
        rows = slice(0, 200 - 20 * (turn % 2))
        cpu, gpu = (step(x[rows], y[rows]) for step in steps)
        assert_close("loss", dtype, gpu, cpu)
    start = twins((20, 64, 40, 5), dtype, activation="tanh")[0].theta
    loose = {"float64": 1e-9, "float32": 1e-3, "tf32": 0.05}.get(dtype, 0.2)
    moved = nets[0].theta - start
    assert np.linalg.norm(nets[1].theta.get() - start - moved) <= loose * np.linalg.norm(moved)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_repeated_training_gives_the_same_bits(optimizer: str) -> None:
    def train() -> bytes:
        net = twins((20, 64, 40, 5), "bfloat16")[1]
        step = TrainStep(net, OPTIMIZERS[optimizer](), clip_norm=0.5)
        for turn in range(10):
            step(*random_batch(net, 3000, turn))
        return net.theta.get().tobytes()

    assert train() == train()


@each_dtype
def test_a_step_that_is_not_finite_is_not_made(dtype: str) -> None:
    cpu, gpu = twins((4, 8, 3), dtype)
    x, y = random_batch(cpu, 30)
    bad = x.copy()
    bad[3, 1] = np.nan
    steps = [TrainStep(net, Adam(0.01), clip_norm=1.0) for net in (cpu, gpu)]
    for batch in (x, x, bad, x):
        losses = [float(step(batch, y)) for step in steps]
        assert np.isnan(losses[0]) == np.isnan(losses[1])
    assert [step.diverged_at for step in steps] == [2, 2]
    assert [step.optimizer.step_count for step in steps] == [3, 3]
    assert np.isfinite(gpu.theta.get()).all()


def test_a_halted_run_stays_where_it_was() -> None:
    _, net = twins((4, 8, 3), "float32")
    x, y = random_batch(net, 30)
    step = TrainStep(net, SGD(0.1))
    good = as_batch(x, y, None, net.architecture, net.ops)
    bad = as_batch(x * np.nan, y, None, net.architecture, net.ops)
    step._step(*good, stop_after_nonfinite=True)
    kept = net.theta.get().tobytes()
    for batch in (bad, good, good):
        step._step(*batch, stop_after_nonfinite=True)
    assert net.theta.get().tobytes() == kept
    assert step.diverged_at == 1 and step.optimizer.step_count == 1


@pytest.mark.parametrize("backend", ["numpy", "cupy"])
def test_fit_says_at_which_step_it_diverged(backend: str) -> None:
    """A learning rate at which θ, and with it a later loss, overflows."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((400, 4)), rng.standard_normal((400, 2))
    net = MLP((4, 16, 2), loss="squared_error", activation="relu", backend=backend, seed=0)
    with pytest.raises(DivergedError) as error:
        fit(net, x, y, optimizer=SGD(1e6), epochs=20, batch_size=40, seed=0)
    assert error.value.step <= 40


@pytest.fixture(scope="module")
def digits() -> tuple[NDArray, NDArray]:
    pytest.importorskip("sklearn")
    data = datasets.load("digits")
    return np.asarray(data.x, np.float32), np.asarray(data.y)


def accuracy(net: MLP, x: NDArray, y: NDArray) -> float:
    return float(np.mean(np.argmax(host(net.forward(x)), axis=1) == y))


@each_dtype
def test_fit_learns_as_well(dtype: str, digits: tuple[NDArray, NDArray]) -> None:
    x, y = digits
    x = (x - x.mean()) / x.std()
    scores, losses = [], []
    for net in twins((x.shape[1], 64, 32, 10), dtype):
        history = fit(net, x[300:], y[300:], epochs=12, batch_size=64, seed=0, validation=(x[:300], y[:300]))
        scores.append(accuracy(net, x[:300], y[:300]))
        losses.append(history.loss)
        assert history.steps == 12 * -(-len(x[300:]) // 64)
    assert min(scores) > 0.88 and abs(scores[0] - scores[1]) < 0.03, scores
    np.testing.assert_allclose(losses[1], losses[0], rtol={"bfloat16": 0.1, "float16": 0.05}.get(dtype, 0.02))


# ---- Files


@each_dtype
@pytest.mark.parametrize("there, back", [("numpy", "cupy"), ("cupy", "numpy")])
def test_models_move_between_backends(there: str, back: str, dtype: str, tmp_path: Any) -> None:
    net = twins((5, 8, 3), dtype)[there == "cupy"]
    net.save(tmp_path / "net")
    loaded = MLP.load(tmp_path / "net", backend=back)
    assert loaded.backend == back and loaded.sizes == net.sizes
    assert host(loaded.theta).tobytes() == host(net.theta).tobytes()


@pytest.mark.parametrize("optimizer", ["momentum", "Adam"])
@pytest.mark.parametrize("there, back", [("numpy", "cupy"), ("cupy", "numpy"), ("cupy", "cupy")])
def test_checkpoints_move_between_backends(
    there: str, back: str, optimizer: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_WRITES", 0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 4)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    options = {"batch_size": 50, "seed": 1, "checkpoint": tmp_path / "run"}

    def network(backend: str) -> MLP:
        return MLP((4, 16, 2), activation="tanh", backend=backend, seed=0)

    whole = network(back)
    fit(whole, x, y, optimizer=OPTIMIZERS[optimizer](), epochs=6, **options | {"checkpoint": None})
    fit(network(there), x, y, optimizer=OPTIMIZERS[optimizer](), epochs=3, **options)
    resumed = network(back)
    history = fit(resumed, x, y, optimizer=OPTIMIZERS[optimizer](), epochs=6, resume=True, **options)
    assert history.epochs == 6 and history.steps == 60
    if there == back:
        assert host(resumed.theta).tobytes() == host(whole.theta).tobytes()
    error = np.linalg.norm(host(resumed.theta) - host(whole.theta)) / np.linalg.norm(host(whole.theta))
    assert error < 1e-3
