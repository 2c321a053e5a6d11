"""`MLP.vjp`: from a gradient of the outputs to those by θ and x, within the numeric contract; who holds what when."""

import copy
import gc
import pickle
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
from support.network_bounds import FEW, Near, Oracle, hold, through_rows
from support.oracle import G, outputs

import gpuback
from gpuback import MLP, SGD, Adam, TrainStep
from gpuback._backends.numpy import plans
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.elementary_activations import FORWARD
from gpuback._core.threads import ThreadPool
from gpuback._network.pool import KEPT_BUFFERS
from gpuback.errors import DtypeError, OptionError, ShapeError

pytestmark = pytest.mark.on_each_backend

FORMATS = {
    "float64": {"dtype": "float64"},
    "float32": {"dtype": "float32"},
    "tf32": {"allow_tf32": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "reproducible": {"reproducible": True},
    "reproducible float16": {"reproducible": True, "dtype": "float16"},
}
OUTPUTS = ("identity", "sigmoid", "tanh", "softmax")


def network(sizes=(5, 8, 6, 3), **options):
    return MLP(sizes, **{"activation": ["gelu", "tanh"], "loss": "squared_error", "seed": 1, **options})


def numbers(net, rows, size=1.0, seed=0):
    """x and dy in θ's dtype."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((rows, net.sizes[0])), size * rng.standard_normal((rows, net.sizes[-1]))
    return x.astype(net.theta.dtype), dy.astype(net.theta.dtype)


def copied(net, gradients):
    """The gradients by θ and x as NumPy arrays of their own."""
    return [net.ops.to_numpy(part).copy() for part in (gradients.theta, gradients.inputs) if part is not None]


def same(left, right):
    return all(one.tobytes() == other.tobytes() for one, other in zip(left, right, strict=True))


# --- the numbers


class PullbackOracle(Oracle):
    """The passes from a given ∂loss/∂ŷ, which stands where targets stand.

    Attributes:
        predicted: ŷ, after `step`.
    """

    def __init__(self, net, dy):
        super().__init__(net.architecture, len(dy))
        largest = np.abs(dy).max()
        self.scale = 2.0 ** -np.frexp(largest)[1] if self.precision.name == "float16" else 1.0

    def _loss(self, a, dy, w):
        output = self.architecture.output

        def through_output(a):
            y = outputs(output, a)
            if output == "softmax":
                return y * (dy - (dy * y).sum(axis=1, keepdims=True))
            return dy * {"identity": np.ones_like(y), "sigmoid": y * (1 - y), "tanh": 1 - y * y}[output]

        self.predicted, da = through_rows(lambda a: outputs(output, a), a), through_rows(through_output, a)
        if output == "softmax":
            size = 1 + np.abs(a.value).max(axis=1, keepdims=True)
            self.predicted = self.predicted.plus(FEW * size * self.predicted.value)
            da = da.plus(FEW * size * (np.abs(dy) + np.abs(dy).sum(axis=1, keepdims=True)))
        elif output != "identity":
            self.predicted, da = self.predicted.plus(FEW), da.plus(FEW * np.abs(dy))
        return Near(np.zeros(()), np.zeros(())), self.stored(da, self.scale)


@pytest.mark.parametrize("size", [1.0, 1e-7])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "float64"])
def test_gradients_are_within_the_contract(form, output, size):
    net = network((17, 24, 20, 9), output=output, **FORMATS[form])
    x, dy = numbers(net, 37, size)
    y, pullback = net.vjp(x)
    gradients, oracle = copied(net, pullback(dy, need_input_grad=True)), PullbackOracle(net, dy)
    expected = oracle.step(net.ops.to_numpy(net.theta), x, dy)
    hold("ŷ", net.ops.to_numpy(y), oracle.predicted)
    hold("∂/∂θ", gradients[0], expected.gradient)
    hold("∂/∂x", gradients[1], expected.inputs)


@pytest.mark.thorough(first=4)
@pytest.mark.parametrize("number", range(300))
def test_so_are_those_of_random_networks(number):
    """Of depth 1 to 4, all activations and outputs in turn, but for hard_tanh, whose bounds across ±1 say little."""
    rng = np.random.default_rng(number)
    form = [form for form in FORMATS if form != "float64"][number % 6]
    names = [name for name in (FORWARD if "reproducible" in FORMATS[form] else G) if name != "hard_tanh"]
    depth, output = 1 + number // 6 % 4, OUTPUTS[number // 24 % 4]
    activation = [names[(number + 4 * k) % len(names)] for k in range(depth - 1)]
    sizes = [int(width) for width in rng.integers(2, 40, size=depth + 1)]
    net = network(sizes, activation=activation, output=output, seed=number, **FORMATS[form])
    x, dy = numbers(net, int(rng.integers(1, 60)), 10.0 ** rng.integers(-9, 3), seed=number)
    oracle = PullbackOracle(net, dy)
    expected = oracle.step(net.ops.to_numpy(net.theta), x, dy)
    by_theta, by_x = copied(net, net.vjp(x)[1](dy, need_input_grad=True))
    hold("∂/∂θ", by_theta, expected.gradient)
    hold("∂/∂x", by_x, expected.inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_they_are_the_finite_differences(activation, output):
    """Of s = Σ_b <dy_b, ŷ_b> in float64, along random directions, by the five-point formula."""
    net = network(activation=activation, output=output, dtype="float64", seed=3)
    net.theta[:] = 2 * net.ops.to_numpy(net.theta) + 0.05  # biases of 0 would put relu's kink on every sample of zeros
    x, dy = numbers(net, 4, seed=5)
    gradients = net.vjp(x)[1](dy, need_input_grad=True)
    rng, theta = np.random.default_rng(6), net.ops.to_numpy(net.theta).copy()
    along = rng.standard_normal(theta.shape), rng.standard_normal(x.shape)

    def moved(step):
        net.theta = theta + step * along[0]
        return float((net.ops.to_numpy(net.forward(x + step * along[1])) * dy).sum())

    h = 1e-5
    slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    mine = copied(net, gradients)
    expected = sum(float((part * direction).sum()) for part, direction in zip(mine, along, strict=True))
    assert slope == pytest.approx(expected, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reproducible_bits_are_those_of_value_and_grad(dtype):
    """For the loss's own dy, (ŷ − y)/B. B is a power of two, so that dividing rounds nothing."""
    net = network(dtype=dtype, reproducible=True)
    x, target = numbers(net, 8)
    y, pullback = net.vjp(x)
    assert same([net.ops.to_numpy(y)], [net.ops.to_numpy(net.forward(x))])
    found = pullback((net.ops.to_numpy(y) - target) / 8, need_input_grad=True)
    _, expected = net.value_and_grad(x, target, need_input_grad=True)
    assert same(copied(net, found), copied(net, expected))


@pytest.mark.parametrize("output", OUTPUTS)
def test_they_are_value_and_grads_for_the_losss_own_dy(output):
    net = network(dtype="float64", output=output)
    x, target = numbers(net, 9)
    y, pullback = net.vjp(x)
    found = pullback((net.ops.to_numpy(y) - target) / 9, need_input_grad=True)
    _, expected = net.value_and_grad(x, target, need_input_grad=True)
    for mine, right in zip(copied(net, found), copied(net, expected), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_reproducible_bits_are_those_of_numpy_whatever_the_order_of_rows(dtype):
    nets = [network(dtype=dtype, output="softmax", reproducible=True, backend=name) for name in ("auto", "numpy")]
    x, dy = numbers(nets[0], 23, 1e-6)
    order, found = np.random.default_rng(9).permutation(23), []
    for net in nets:
        y, pullback = net.vjp(x)
        gradients = pullback(dy, need_input_grad=True)
        pullback(dy, out=gradients, accumulate=True, need_input_grad=True)
        found.append([net.ops.to_numpy(y).copy(), *copied(net, gradients)])
    assert same(*found)
    shuffled = nets[0].vjp(x[order])[1](dy[order], need_input_grad=True)
    plain = nets[0].vjp(x)[1](dy, need_input_grad=True)
    assert same([nets[0].ops.to_numpy(shuffled.theta)], [nets[0].ops.to_numpy(plain.theta)])
    np.testing.assert_array_equal(nets[0].ops.to_numpy(shuffled.inputs), nets[0].ops.to_numpy(plain.inputs)[order])


@pytest.mark.parametrize("form", FORMATS)
def test_a_dy_times_a_power_of_two_gives_gradients_times_it(form):
    """So those of 10⁻⁷ are as exact as those of 1: nothing cancels, nothing underflows, not even in float16."""
    net = network(output="sigmoid", **FORMATS[form])
    x, dy = numbers(net, 30)
    pullback = net.vjp(x)[1]
    ones = copied(net, pullback(dy, need_input_grad=True))
    for exponent in (-27, -24, 20):
        others = copied(net, pullback(dy * 2.0**exponent, need_input_grad=True))
        assert same(others, [part * part.dtype.type(2.0**exponent) for part in ones])


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
@pytest.mark.parametrize("form", ["float32", "float16", "reproducible float16"])
def test_a_dy_of_zero_or_not_finite_comes_through(form, value):
    net = network(**FORMATS[form])
    x, dy = numbers(net, 6)
    dy[...] = 0
    dy[2, 1] = value
    by_theta, by_x = copied(net, net.vjp(x)[1](dy, need_input_grad=True))
    if value == 0.0:
        assert not by_theta.any()
        assert not by_x.any()
    else:
        assert not np.isfinite(by_x[2]).any()
        assert not np.isfinite(by_theta).all()


@pytest.mark.parametrize("form", ["float64", "float32", "bfloat16", "float16"])
def test_one_layer_is_a_product(form):
    """ŷ = x Wᵀ + b: ∂/∂W = dyᵀ x, ∂/∂b = Σ_b dy_b, ∂/∂x = dy W, exact for small integers."""
    net = MLP([3, 2], loss="squared_error", **FORMATS[form])
    net.theta[:] = [1, -2, 3, 0, 4, -1, 5, -6]
    x, dy = np.array([[1, 2, 3], [-1, 0, 2]]), np.array([[1, -1], [2, 3]])
    y, pullback = net.vjp(x)
    np.testing.assert_array_equal(net.ops.to_numpy(y), x @ [[1, 0], [-2, 4], [3, -1]] + [5, -6])
    gradients = pullback(dy, need_input_grad=True)
    np.testing.assert_array_equal(net.ops.to_numpy(gradients.weights[0]), dy.T @ x)
    np.testing.assert_array_equal(net.ops.to_numpy(gradients.biases[0]), dy.sum(axis=0))
    np.testing.assert_array_equal(net.ops.to_numpy(gradients.inputs), dy @ [[1, -2, 3], [0, 4, -1]])


@pytest.mark.numpy_only
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "float64"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_in_many_blocks_on_threads(monkeypatch, form, threads):
    def blocks(sizes, batch_size, precision, **_):
        return 7, ThreadPool(threads, blas_alone=threads > 1)

    monkeypatch.setattr(plans, "plan_blocks", blocks)
    net = network((17, 24, 20, 9), output="softmax", **FORMATS[form])
    batches = [numbers(net, 100, seed=seed) for seed in range(2)]
    expected = [PullbackOracle(net, dy).step(net.theta, x, dy) for x, dy in batches]
    pullbacks = [net.vjp(x)[1] for x, _ in batches]
    for turn in (0, 1, 1, 0):
        gradients = pullbacks[turn](batches[turn][1], need_input_grad=True)
        hold("∂/∂θ", gradients.theta, expected[turn].gradient)
        hold("∂/∂x", gradients.inputs, expected[turn].inputs)
    by_x = pullbacks[0](batches[0][1], need_theta_grad=False, need_input_grad=True).inputs
    assert same([by_x], [gradients.inputs])
    once = gradients.theta.copy()
    pullbacks[0](batches[0][1], out=gradients, accumulate=True)
    np.testing.assert_allclose(gradients.theta, 2 * once, rtol=1e-5, atol=1e-6 * abs(once).max())


# --- who holds what


@pytest.mark.parametrize("form", ["float32", "float16", "reproducible"])
def test_pullbacks_live_side_by_side_and_answer_again_and_again(form):
    net = network(output="softmax", **FORMATS[form])
    batches = [numbers(net, 6, seed=seed) for seed in range(3)]
    expected = [copied(net, net.vjp(x)[1](dy, need_input_grad=True)) for x, dy in batches]
    pullbacks = [net.vjp(x)[1] for x, _ in batches]
    for turn in (0, 1, 0, 2, 1, 1):
        found = pullbacks[turn](batches[turn][1], need_input_grad=True)
        assert same(copied(net, found), expected[turn])
        net.forward(batches[0][0])
        net.value_and_grad(*batches[1])
    del pullbacks[1]
    net.vjp(batches[0][0])  # in the buffers of the one that was dropped
    for turn in (0, 2):
        found = pullbacks[turn // 2](batches[turn][1], need_input_grad=True)
        assert same(copied(net, found), expected[turn])


def test_the_outputs_are_the_callers():
    """They may be overwritten, as by a loss that works in place; so may dy."""
    net = network(output="softmax")
    x, dy = numbers(net, 5)
    y, pullback = net.vjp(x)
    expected = copied(net, pullback(dy))
    y[...] = np.nan
    given = dy.copy()
    assert same(copied(net, pullback(given)), expected)
    np.testing.assert_array_equal(given, dy)
    assert net.vjp(x)[0] is not net.vjp(x)[0]


def test_each_kind_of_result_alone():
    net = network()
    x, dy = numbers(net, 7)
    pullback = net.vjp(x)[1]
    both = pullback(dy, need_input_grad=True)
    by_theta, by_x = pullback(dy), pullback(dy, need_theta_grad=False, need_input_grad=True)
    assert by_theta.inputs is None
    assert by_x.theta is None
    assert by_x.weights == by_x.biases == ()
    np.testing.assert_array_equal(net.ops.to_numpy(by_theta.theta), net.ops.to_numpy(both.theta))
    np.testing.assert_array_equal(net.ops.to_numpy(by_x.inputs), net.ops.to_numpy(both.inputs))


@pytest.mark.parametrize("form", ["float64", "float32", "float16", "reproducible float16"])
def test_out_is_overwritten_or_added_to(form):
    net = network(**FORMATS[form])
    x, dy = numbers(net, 7, 1e-7)
    pullback = net.vjp(x)[1]
    fresh = pullback(dy)
    once = net.ops.to_numpy(fresh.theta).copy()
    out = net.value_and_grad(x, dy)[1]
    assert pullback(dy, out=out) is out
    np.testing.assert_array_equal(net.ops.to_numpy(out.theta), once)
    pullback(dy, out=out, accumulate=True, need_input_grad=True)
    np.testing.assert_array_equal(net.ops.to_numpy(out.theta), 2 * once)
    np.testing.assert_array_equal(net.ops.to_numpy(out.weights[1]), 2 * net.ops.to_numpy(fresh.weights[1]))
    assert out.inputs.shape == x.shape
    pullback(dy, out=out)
    assert out.inputs is None


def test_buffers_go_back_when_a_pullback_is_dropped():
    net = network()
    x, _ = numbers(net, 5)
    first = net.vjp(x)[1]
    passes = first._lease.passes
    second = net.vjp(x)[1]
    assert second._lease.passes is not passes
    del first
    third = net.vjp(x)[1]
    assert third._lease.passes is passes
    del second, third
    assert len(net._held_pool._free) == 2
    many = [net.vjp(x)[1] for _ in range(3 * KEPT_BUFFERS)]
    many.clear()
    assert len(net._held_pool._free) == KEPT_BUFFERS


def test_x_is_kept_as_long_as_the_pullback_and_no_longer():
    net = network()
    x, _ = numbers(net, 5)
    x = net.ops.asarray(x, net.theta.dtype, "x").copy()
    here = weakref.ref(x)
    pullback = net.vjp(x)[1]
    del x
    assert here() is not None
    del pullback
    assert here() is None


def test_a_pullback_outlives_other_references_to_its_network():
    net = network()
    x, dy = numbers(net, 5)
    expected = copied(net, net.vjp(x)[1](dy))
    pullback = net.vjp(x)[1]
    ops = net.ops
    del net
    gc.collect()
    assert ops.to_numpy(pullback(dy).theta).tobytes() == expected[0].tobytes()


def test_copies_of_a_network_have_pullbacks_of_their_own():
    net = network()
    x, dy = numbers(net, 5)
    pullback = net.vjp(x)[1]
    twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    for twin in twins:
        twin.theta = 2 * net.ops.to_numpy(net.theta)
        twin.vjp(x)[1](dy)
    assert np.isfinite(net.ops.to_numpy(pullback(dy).theta)).all()


def test_passes_that_raise_are_not_used_again(monkeypatch):
    net = network()
    x, dy = numbers(net, 5)
    pullback = net.vjp(x)[1]
    expected = copied(net, pullback(dy))
    passes = pullback._lease.passes
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(passes, "backward", lambda *_: 1 / 0)
        pullback(dy)
    assert same(copied(net, pullback(dy)), expected)  # what it holds is as it was
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(passes, "backward", lambda *_: 1 / 0)
        pullback(dy)
    del pullback
    assert not net._held_pool._free
    net.vjp(x)
    (passes,) = net._held_pool._free
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(passes, "forward", lambda *_: 1 / 0)
        net.vjp(x)
    assert not net._held_pool._free


@pytest.mark.numpy_only
def test_threads_share_a_network_and_even_a_pullback():
    net = network((20, 30, 30, 4))
    batches = [numbers(net, 64, seed=seed) for seed in range(4)]
    expected = [copied(net, net.vjp(x)[1](dy)) for x, dy in batches]
    shared, wrong = net.vjp(batches[0][0])[1], []

    def work(index):
        x, dy = batches[index]
        for _ in range(30):
            pullback = net.vjp(x)[1]
            if not same(copied(net, pullback(dy)), expected[index]):
                wrong.append(index)
            if not same(copied(net, shared(batches[0][1])), expected[0]):
                wrong.append("shared")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.thorough
@pytest.mark.numpy_only
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_thousand_calls_take_no_more_memory_than_a_few(dtype):
    net = network((50, 64, 64, 10), dtype=dtype)
    x, dy = numbers(net, 200)
    gradients, peaks = net.vjp(x)[1](dy), []
    tracemalloc.start()
    for calls in (20, 1000):
        tracemalloc.reset_peak()
        for _ in range(calls):
            _, pullback = net.vjp(x)
            pullback(dy, out=gradients, accumulate=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000  # less than one output
    assert len(net._held_pool._free) <= 2


# --- θ changes

CHANGES = {
    "step": lambda net, batch: SGD(0.1).step(net, net.value_and_grad(*batch)[1]),
    "TrainStep": lambda net, batch: TrainStep(net, Adam())(*batch),
    "TrainStep, clipped": lambda net, batch: TrainStep(net, Adam(), clip_norm=0.1)(*batch),
    "TrainStep, micro-batches": lambda net, batch: TrainStep(net, Adam(), micro_batch_size=2)(*batch),
    "theta": lambda net, batch: setattr(net, "theta", net.ops.to_numpy(net.theta) + 1),
    "fit": lambda net, batch: gpuback.fit(net, *batch, epochs=1),
    "fit, its last θ restored": lambda net, batch: gpuback.fit(net, *batch, epochs=1, validation=batch, patience=1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_pullback_of_an_older_theta_is_refused(change):
    net = network()
    x, dy = numbers(net, 5)
    pullback = net.vjp(x)[1]
    pullback(dy)
    change(net, (x, dy))
    with pytest.raises(OptionError, match=r"^θ has changed since vjp; call vjp again$"):
        pullback(dy)
    net.vjp(x)[1](dy)


def test_every_way_of_making_a_step_counts():
    """As a graph, layer by layer, with a loss scale."""
    for net in (network(), network((5, 300, 3), activation="tanh"), network(dtype="float16")):
        scaling = gpuback.LossScaling() if net.dtype == np.float16 else None
        step = TrainStep(net, SGD(0.0), loss_scaling=scaling)
        x, dy = numbers(net, 5)
        for _ in range(4):
            pullback = net.vjp(x)[1]
            step(x, dy)
            with pytest.raises(OptionError, match="θ has changed"):
                pullback(dy)


@pytest.mark.numpy_only
def test_a_checkpoint_that_is_restored_counts(tmp_path):
    net = network()
    x, dy = numbers(net, 5)
    options = {"epochs": 1, "checkpoint": tmp_path / "run", "seed": 0}
    gpuback.fit(net, x, dy, **options)
    pullback = net.vjp(x)[1]
    gpuback.fit(net, x, dy, **options, resume=True)  # no step is left to make
    with pytest.raises(OptionError, match="θ has changed"):
        pullback(dy)


def test_reading_and_other_passes_leave_pullbacks_valid():
    net = network()
    x, dy = numbers(net, 5)
    pullback = net.vjp(x)[1]
    net.forward(x), net.loss(x, dy), net.value_and_grad(x, dy), net.trace(x, dy), net.to("numpy").vjp(x)
    assert np.isfinite(net.ops.to_numpy(pullback(dy).theta)).all()


# --- what goes in


@pytest.mark.parametrize(
    "change",
    [
        lambda array: array.tolist(),
        lambda array: np.asfortranarray(array),
        lambda array: np.repeat(array, 2, axis=0)[::2],
        lambda array: array.astype(np.float64),
        lambda array: array.astype(int),
    ],
    ids=["list", "Fortran", "strided", "float64", "integers"],
)
def test_numbers_of_any_kind(change):
    net = network()
    x, dy = (np.round(4 * array) for array in numbers(net, 6))
    expected = copied(net, net.vjp(x)[1](dy, need_input_grad=True))
    assert same(copied(net, net.vjp(change(x))[1](change(dy), need_input_grad=True)), expected)


@pytest.mark.parametrize("shape", [(4, 3), (5, 2), (3, 5), (5,), (1, 5, 3), (), (15,)])
def test_a_dy_of_another_shape_is_refused(shape):
    net = network()
    pullback = net.vjp(numbers(net, 5)[0])[1]
    with pytest.raises(ShapeError, match=r"^dy: expected shape \(5, 3\), as y has, got \("):
        pullback(np.zeros(shape))


@pytest.mark.parametrize("value", [1j, "1"])
def test_a_dy_that_is_not_real_is_refused(value):
    net = network()
    pullback = net.vjp(numbers(net, 5)[0])[1]
    with pytest.raises(DtypeError, match="^dy: expected real numbers"):
        pullback(np.full((5, 3), value))


def test_an_x_of_another_shape_is_refused_as_by_forward():
    with pytest.raises(ShapeError, match=r"^x: expected shape \(B, 5\)"):
        network().vjp(np.zeros((2, 4)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"accumulate": True}, "^accumulate=True adds to out: expected the Gradients of an earlier call, got None$"),
        ({"need_theta_grad": False}, "^expected need_theta_grad=True or need_input_grad=True"),
        ({"need_theta_grad": False, "need_input_grad": True, "accumulate": True}, "expected need_theta_grad=True"),
        ({"need_theta_grad": False, "need_input_grad": True, "out": "some"}, "expected need_theta_grad=True"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    net = network()
    x, dy = numbers(net, 5)
    pullback = net.vjp(x)[1]
    if "out" in options:
        options = {**options, "out": pullback(dy)}
    with pytest.raises(OptionError, match=message):
        pullback(dy, **options)


def test_gradients_of_another_network_are_refused():
    net = network()
    x, dy = numbers(net, 5)
    with pytest.raises(ShapeError, match="^out: expected Gradients with theta"):
        net.vjp(x)[1](dy, out=network((5, 3), activation=[]).value_and_grad(x, dy)[1])


def test_gradients_by_x_alone_are_no_out_and_make_no_step():
    net = network()
    x, dy = numbers(net, 5)
    pullback = net.vjp(x)[1]
    by_x = pullback(dy, need_theta_grad=False, need_input_grad=True)
    with pytest.raises(ShapeError, match=r"^out: expected Gradients with theta .* got Gradients without theta$"):
        pullback(dy, out=by_x)
    with pytest.raises(ShapeError, match=r"^gradients: expected shape .* got a theta of None$"):
        SGD(0.1).step(net, by_x)


# --- training with it


def test_training_with_a_loss_of_ones_own_is_trainstep_with_that_loss():
    nets = network(seed=4), network(seed=4)
    x, target = numbers(nets[0], 16)
    step, optimizer, gradients = TrainStep(nets[0], Adam(0.01), clip_norm=0.5), Adam(0.01), None
    for _ in range(20):
        step(x, target)
        y, pullback = nets[1].vjp(x)
        gradients = pullback((nets[1].ops.to_numpy(y) - target) / 16, out=gradients)
        optimizer.step(nets[1], gradients, clip_norm=0.5)
    theta = [net.ops.to_numpy(net.theta) for net in nets]
    np.testing.assert_allclose(*theta, rtol=1e-4, atol=1e-5)
