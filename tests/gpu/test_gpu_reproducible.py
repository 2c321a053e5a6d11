"""reproducible=True on a real GPU: cuBLAS's products of integers are exact, and everything has NumPy's bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.combinations import in_turn
from support.reference_bits import KNOWN, trained
from support.requirements import require_gpu

import gpuback._backends.registry
from gpuback import MLP, SGD, Adam, AdamW, TrainStep, datasets, fit
from gpuback._core.elementary_activations import FORWARD
from gpuback._core.losses import LOSSES
from gpuback._cuda import cublas as blas
from gpuback.errors import BackendError
from gpuback.testing import fingerprint, random_batch

pytestmark = pytest.mark.gpu

DTYPES = ("float32", "bfloat16", "float16")
PAIRS = [(loss.name, output) for loss in LOSSES.values() for output in loss.outputs]


@pytest.fixture(scope="module", autouse=True)
def cupy() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUPY_TF32", "1")
        require_gpu()
        import cupy

        yield cupy


# ---- Products


def between(x: Any, xp: Any) -> Any:
    """The same matrix as a part of longer rows, which hold NaN."""
    whole = xp.full((len(x), x.shape[1] + 3), np.nan)
    whole[:, 1:-2] = x
    return whole[:, 1:-2]


FORMS = {
    "tight": lambda x, xp: x,
    "part": between,
    "transposed": lambda x, xp: x.T.copy().T,
    "part, transposed": lambda x, xp: between(x.T, xp).T,
}


@pytest.mark.parametrize(
    "m, k, n", [(1, 1, 1), (3, 8192, 5), (1, 300, 129), (257, 1000, 129), (129, 1, 33), (640, 77, 1)]
)
@pytest.mark.parametrize("left_form, right_form", list(itertools.product(FORMS, repeat=2)))
def test_products_of_integers_are_exact(left_form, right_form, m, k, n, cupy):
    """Of up to 20 bits, with every sum below 2⁵³; many have all of those bits."""
    multiply = blas.bind_multiply()
    rng = np.random.default_rng([m, k, n])
    left, right = rng.integers(0, 2**20, (m, k)), rng.integers(-(2**20), 2**20, (k, n))
    operands = [
        FORMS[form](cupy.asarray(x.astype(np.float64)), cupy) for form, x in ((left_form, left), (right_form, right))
    ]
    out = cupy.full((m, n + 2), np.nan)
    multiply(*operands, out[:, :n])
    np.testing.assert_array_equal(out[:, :n].get(), (left @ right).astype(np.float64))
    assert np.isnan(out[:, n:].get()).all()


def test_products_run_on_the_current_stream(cupy):
    multiply, x = blas.bind_multiply(), cupy.full((2000, 2000), 3.0)
    out = cupy.empty_like(x)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(20):
            multiply(x, x, out)
        out *= 0  # ordered after them, or some of them win
    stream.synchronize()
    assert not out.get().any()


def test_cublas_that_emulates_float64_is_refused(monkeypatch):
    monkeypatch.setenv(blas.EMULATION, "1")
    gpuback._backends.registry._cupy_ops_on.cache_clear()
    with pytest.raises(BackendError, match=rf"{blas.EMULATION}=1 .*unset {blas.EMULATION}"):
        MLP((3, 2), reproducible=True, backend="cupy")
    MLP((3, 2), backend="cupy")


# ---- Networks


def bits(array: Any) -> bytes:
    array = array.get() if hasattr(array, "get") else np.asarray(array)
    return array.astype(np.float32 if array.itemsize == 2 else array.dtype).tobytes()


def twins(sizes: tuple[int, ...] = (37, 130, 65, 10), **options: Any) -> list[MLP]:
    return [MLP(sizes, backend=name, reproducible=True, seed=0, **options) for name in ("numpy", "cupy")]


def results(net: MLP, x: Any, y: Any, weight: Any = None) -> dict[str, bytes]:
    found = {"y_hat": net.forward(x), "loss": net.loss(x, y, sample_weight=weight)}
    loss, gradients = net.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)
    found |= {"loss again": loss, "dx": gradients.inputs, "gradient": gradients.theta.copy()}
    net.value_and_grad(x, y, out=gradients, accumulate=True)
    found["accumulated"] = gradients.theta
    return {name: bits(array) for name, array in found.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation, choice", in_turn(list(FORWARD), PAIRS))
def test_networks(activation, choice, dtype):
    loss, output = choice
    numpy_net, net = twins(loss=loss, output=output, activation=activation, dtype=dtype)
    x, y = random_batch(net, 101)
    weight = np.random.default_rng(0).random(101)
    assert results(net, x, y) == results(numpy_net, x, y)
    assert results(net, x, y, weight) == results(numpy_net, x, y, weight)
    x[3, 1], x[5, 2], x[6], x[7] = np.nan, -np.inf, 1e30, 1e-41
    assert results(net, x, y) == results(numpy_net, x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes, batch_size",
    [((1, 1), 1), ((3, 2, 1), 2), ((64, 64, 64), 4096), ((1000, 513, 10), 700), ((5, 33, 3), 9000), ((8200, 9, 3), 65)],
    ids=str,
)
def test_shapes(sizes, batch_size, dtype):
    """The last two take several blocks, of rows and of terms."""
    numpy_net, net = twins(sizes, activation="silu", loss="squared_error", dtype=dtype)
    x, y = random_batch(net, batch_size)
    assert results(net, x, y) == results(numpy_net, x, y)


def test_labels_as_probability_rows():
    numpy_net, net = twins()
    x, _ = random_batch(net, 50)
    y = np.random.default_rng(0).random((50, 10))
    assert results(net, x, y) == results(numpy_net, x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_traces(dtype):
    numpy_net, net = twins(activation=("gelu", "softplus"), dtype=dtype)
    x, y = random_batch(net, 70)
    found, expected = (each.trace(x, y) for each in (net, numpy_net))
    for name in ("h", "dh", "da", "dW", "db"):
        for mine, theirs in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert mine is theirs is None or bits(mine) == bits(theirs), name
    assert bits(found.output) == bits(expected.output) and found.loss == expected.loss


OPTIMIZERS = {
    "sgd": lambda: SGD(0.1),
    "nesterov": lambda: SGD(0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda: Adam(0.01),
    "adamw": lambda: AdamW(0.01, weight_decay=0.1),
    "frozen parts": lambda: Adam(0.01, trainable=[False, (False, True), True], multipliers=[1, 0.1, (1, 2)]),
    "weights decay": lambda: SGD(0.1, momentum=0.9, weight_decay=0.1, decay_biases=False),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_steps(optimizer, clip_norm, dtype):
    nets, losses = twins(activation=("elu", "tanh"), dtype=dtype), []
    for net in nets:
        step = TrainStep(net, OPTIMIZERS[optimizer](), clip_norm=clip_norm)
        losses.append([bits(step(*random_batch(net, 129, seed))) for seed in range(20)])
    assert losses[0] == losses[1]
    assert fingerprint(nets[0]) == fingerprint(nets[1])
    assert nets[0].ops.norm(nets[0].theta) == nets[1].ops.norm(nets[1].theta)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fit_on_digits(dtype):
    pytest.importorskip("sklearn")
    data = datasets.load("digits")
    nets = twins((64, 64, 10), dtype=dtype)
    histories = [fit(net, data.x, data.y, epochs=3, seed=0, validation=0.2) for net in nets]
    assert fingerprint(nets[0]) == fingerprint(nets[1])
    assert histories[0].loss == histories[1].loss and histories[0].validation_loss == histories[1].validation_loss


@pytest.mark.parametrize("case", KNOWN, ids="-".join)
def test_fingerprints_are_the_known_ones(case):
    assert fingerprint(trained(*case, backend="cupy")) == KNOWN[case]


def test_neither_streams_nor_the_order_of_rows_matter(cupy):
    _, net = twins()
    x, y = random_batch(net, 300)
    order = np.random.default_rng(0).permutation(300)
    plain = net.value_and_grad(x, y)[1].theta
    with cupy.cuda.Stream(non_blocking=True):
        shuffled = bits(net.value_and_grad(x[order], y[order])[1].theta)
    assert shuffled == bits(plain)
