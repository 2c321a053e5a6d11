"""A batch in two phases on NumPy, by rows and by parameters: right, and the same bits on any number of threads."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpuback
from gpuback._backends.numpy import plans
from gpuback._backends.numpy.phases import NumpyPhases
from gpuback.testing import random_batch, tolerance

pytestmark = pytest.mark.numpy_only

FORMS: dict[str, dict[str, Any]] = {
    "float64": {"dtype": "float64"},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "tf32": {"allow_tf32": True},
}
SIZES, BATCH = (17, 90, 40, 3), 197


@pytest.fixture(autouse=True)
def _phases_for_small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "WORTH_THREADS", 0)
    monkeypatch.setattr(plans, "BLOCK_BYTES", 0)
    monkeypatch.setattr(plans, "PIECE_FLOPS", 2e5)
    monkeypatch.setattr(plans, "FEWEST_PIECE_FLOPS", 1)


@pytest.fixture(params=[1, 2, 3, 5])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(plans, "blas_threads", lambda: request.param)
    return int(request.param)


def network(**options: Any) -> gpuback.MLP:
    return gpuback.MLP(SIZES, activation=["gelu", "relu"], seed=2, **options)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_trace(form: str) -> None:
    net = network(**FORMS[form])
    x, y = random_batch(net, BATCH)
    weight = np.random.default_rng(1).uniform(0, 2, BATCH)
    assert isinstance(net._acquire(BATCH), NumpyPhases)
    loss, gradients = net.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)
    t = net.trace(x, y, sample_weight=weight)
    dtype, terms = (
        FORMS[form].get("dtype", "float32"),
        {"terms": BATCH, **({"allow_tf32": True} if form == "tf32" else {})},
    )
    assert abs(loss - t.loss) <= 1e-5 * t.loss
    # Products of other shapes may round h and da otherwise: a rounding of each operand on top.
    operands = {"float64": 2.0**-50, "float32": 2.0**-20, "tf32": 2.0**-9, "bfloat16": 2.0**-7, "float16": 2.0**-9}[
        form
    ]
    for k in range(1, 4):
        da, h = t.da[k].astype(np.float64), t.h[k - 1].astype(np.float64)
        for part, exact, size in (
            (gradients.weights[k - 1], da.T @ h, abs(da).T @ abs(h)),
            (gradients.biases[k - 1], da.sum(axis=0), abs(da).sum(axis=0)),
        ):
            assert (abs(part - exact) <= tolerance(size, terms["terms"], dtype) + operands * size).all()
    np.testing.assert_allclose(gradients.inputs, t.dh[0], atol=20 * operands * abs(t.dh[0]).max())
    np.testing.assert_allclose(net.forward(x), t.output, atol=4 * operands)
    np.testing.assert_allclose(net.loss(x, y, sample_weight=weight), t.loss, rtol=4 * operands)

    once = gradients.theta.copy()
    net.value_and_grad(x, y, sample_weight=weight, out=gradients, accumulate=True)
    np.testing.assert_allclose(gradients.theta, 2 * once, rtol=1e-5, atol=1e-6 * abs(once).max())


def results(form: str, batch_size: int) -> Iterator[bytes]:
    """Return the bits of everything that threads share."""
    net = network(**FORMS[form])
    x, y = random_batch(net, batch_size)
    for optimizer in (gpuback.SGD(0.1, momentum=0.9), gpuback.AdamW(weight_decay=0.1, decay_biases=False)):
        step = gpuback.TrainStep(network(**FORMS[form]), optimizer)
        yield from (step(x, y).tobytes() for _ in range(3))
        yield step.net.theta.tobytes()
    loss, gradients = net.value_and_grad(x, y, need_input_grad=True)
    yield from (loss.tobytes(), gradients.theta.tobytes(), gradients.inputs.tobytes())
    yield from (net.forward(x).tobytes(), net.loss(x, y).tobytes(), net.gradient_norms(x, y).tobytes())
    yield net.value_and_clipped_grad(x, y, 0.1)[1].theta.tobytes()
    outputs, pullback = net.vjp(x)
    yield from (outputs.tobytes(), pullback(np.ones_like(outputs)).theta.tobytes())
    frozen = gpuback.TrainStep(network(**FORMS[form]), gpuback.SGD(0.1, trainable=[False, True, True]), clip_norm=0.1)
    yield from (frozen(x, y).tobytes(), frozen.net.theta.tobytes())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["phases", "blocks"])
def test_bits_do_not_depend_on_the_number_of_threads(form: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "blocks":
        monkeypatch.setattr(plans, "BLOCK_BYTES", 300 * 8 * sum(SIZES))
    batch_size = BATCH if way == "phases" else 1901
    assert isinstance(network()._acquire(batch_size), NumpyPhases) == (way == "phases")
    found = []
    for threads in (1, 2, 3, 5):
        monkeypatch.setattr(plans, "blas_threads", lambda threads=threads: threads)
        found.append(list(results(form, batch_size)))
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize(
    "optimizer", [gpuback.SGD(0.1), gpuback.SGD(0.1, momentum=0.9, nesterov=True), gpuback.AdamW()]
)
@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_a_step_is_the_gradient_and_the_update(
    threads: int, optimizer: gpuback.SGD | gpuback.Adam, clip_norm: float | None
) -> None:
    once, apart = network(), network()
    x, y = random_batch(once, BATCH)
    optimizer, twin = (eval(repr(optimizer), vars(gpuback).copy()) for _ in range(2))
    step = gpuback.TrainStep(once, optimizer, clip_norm=clip_norm)
    for _ in range(3):
        loss, gradients = apart.value_and_grad(x, y)
        twin.step(apart, gradients, clip_norm)
        assert step(x, y) == loss
        np.testing.assert_array_equal(once.theta, apart.theta)
    assert optimizer.step_count == 3


@pytest.mark.parametrize("where", ["x", "weight", "theta"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_what_is_not_finite_makes_no_update(threads: int, where: str, value: float) -> None:
    net = network()
    x, y = random_batch(net, BATCH)
    weight = np.ones(BATCH)
    step = gpuback.TrainStep(net, gpuback.Adam())
    step(x, y, weight)
    if where == "x":
        x = x.copy()
        x[150] = value
    elif where == "weight":
        weight[150] = value
    else:
        net.theta[:40] = value
    before = net.theta.copy()
    state = {name: array.copy() for name, array in step.optimizer.state.items()}
    gradient = net.value_and_grad(x, y, sample_weight=weight)[1].theta
    loss = step(x, y, weight)
    finite = np.isfinite(loss) and np.isfinite(gradient).all()
    assert step.optimizer.step_count == 1 + finite
    assert (step.diverged_at is None) == finite
    assert np.array_equal(net.theta, before, equal_nan=True) == (not finite)
    for name, array in step.optimizer.state.items():
        assert np.array_equal(array, state[name]) == (not finite)


def test_large_numbers_whose_gradient_is_finite_make_an_update(threads: int) -> None:
    """S overflows, the gradient does not: it is looked at, and the step is made."""
    net = gpuback.MLP(SIZES, loss="squared_error", output="identity", seed=0)
    x = np.full((BATCH, SIZES[0]), 1e25, np.float32)
    for W in net.weights:
        W *= np.float32(1e-9)
    optimizer = gpuback.SGD(1e-30)
    before = net.theta.copy()
    gpuback.TrainStep(net, optimizer)(x, np.zeros((BATCH, SIZES[-1])))
    assert optimizer.step_count == 1
    assert np.isfinite(net.theta).all() and (net.theta != before).any()


def test_an_update_that_overflows_leaves_canonical_nan(threads: int) -> None:
    """∞ − ∞ leaves the processor's own NaN, on whichever thread; it is replaced."""
    net = gpuback.MLP(SIZES, output="identity", loss="squared_error", seed=0)
    x, y = random_batch(net, BATCH)
    optimizer = gpuback.SGD(0.0, momentum=0.9)
    step = gpuback.TrainStep(net, optimizer)
    step(x, y)
    optimizer.learning_rate = 1e38
    optimizer.state["velocity"][...] = -3e38
    step(x, y)
    assert optimizer.step_count == 2 and np.isposinf(net.theta).all()
    optimizer.state["velocity"][...] = 3e38
    optimizer._update.begin()
    for worker, part in enumerate((slice(0, 1000), slice(1000, net.n_parameters))):
        optimizer._update.part(np.zeros_like(net.theta), part, worker)
    optimizer._update.end()
    nan = np.isnan(net.theta)
    assert nan.any()
    assert (net.theta.view(np.uint32)[nan] == np.float32(np.nan).view(np.uint32)).all()


def test_explain_says_how_a_batch_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "blas_threads", lambda: 2)
    assert "in two phases, on 2 threads: 4 pieces of up to 50 rows" in str(network().explain(BATCH))
    monkeypatch.setattr(plans, "BLOCK_BYTES", 300 * 8 * sum(SIZES))
    assert "4 blocks of up to 476 rows, each forward and backward in turn while it is in cache, on 2 threads" in str(
        network().explain(1901)
    )
    monkeypatch.setattr(plans, "WORTH_THREADS", np.inf)
    assert "the whole batch at once" in str(network().explain(9))
