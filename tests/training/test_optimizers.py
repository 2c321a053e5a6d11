"""gpuback.SGD, Adam, AdamW against their textbook definitions, which stand below in plain float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpuback import MLP, SGD, Adam, AdamW
from gpuback._backends.numpy.updates import PARAMETERS_AT_ONCE, beta_powers
from gpuback.errors import GpubackError, OptionError, ShapeError

pytestmark = pytest.mark.on_each_backend

STEPS = 60
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}


def network(n_parameters: int, dtype: str = "float32") -> MLP:
    """A network with that many parameters, none near 0: one output, so n − 1 weights and a bias."""
    net = MLP([n_parameters - 1, 1], loss="squared_error", dtype=dtype)
    rng = np.random.default_rng(n_parameters)
    net.theta[:] = rng.uniform(0.5, 2, n_parameters) * rng.choice([-1, 1], n_parameters)
    return net


def step(optimizer: Any, net: MLP, gradient: Any) -> None:
    optimizer.step(net, SimpleNamespace(theta=np.asarray(gradient, net.theta.dtype)))


def random_gradients(n_parameters: int, dtype: str, steps: int = STEPS) -> np.ndarray:
    """(steps, n), of both signs; some parameters see gradients of 10⁻⁹, others of 10², the first of 1."""
    rng = np.random.default_rng(n_parameters)
    scale = 10.0 ** rng.uniform(-9, 2, n_parameters)
    scale[0] = 1
    return (rng.standard_normal((steps, n_parameters)) * scale).astype(dtype)


# --- the textbook, computed on numbers that know how far rounding may have carried them


class Rounded:
    """Float64 values, and a bound on the error that the same operations make when each is rounded to `unit`."""

    def __init__(self, value: Any, error: Any, unit: float) -> None:
        self.value, self.error, self.unit = np.asarray(value, np.float64), error, unit

    def _result(self, value: Any, inherited: Any, roundings: int) -> Rounded:
        return Rounded(value, inherited + roundings * self.unit * np.abs(value), self.unit)

    def __add__(self, other: Rounded | float) -> Rounded:
        if isinstance(other, Rounded):
            return self._result(self.value + other.value, self.error + other.error, 1)
        return self._result(self.value + other, self.error + self.unit * abs(other), 1)

    def __sub__(self, other: Rounded) -> Rounded:
        return self._result(self.value - other.value, self.error + other.error, 1)

    def __mul__(self, other: Rounded | float) -> Rounded:
        if isinstance(other, Rounded):
            inherited = self.error * np.abs(other.value) + other.error * np.abs(self.value) + self.error * other.error
            return self._result(self.value * other.value, inherited, 1)
        return self._result(self.value * other, self.error * abs(other), 2)  # the constant is rounded as well

    __rmul__ = __mul__

    def __truediv__(self, other: Rounded) -> Rounded:
        value = self.value / other.value
        smallest = np.abs(other.value) - other.error
        assert (smallest > 0).all()
        return self._result(value, (self.error + np.abs(value) * other.error) / smallest, 1)

    def sqrt(self) -> Rounded:
        lowest, highest = np.maximum(self.value - self.error, 0), self.value + self.error
        return self._result(np.sqrt(self.value), np.sqrt(highest) - np.sqrt(lowest), 1)


def textbook_sgd(
    theta: Rounded,
    gradients: list[Rounded],
    rates: list[float],
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Rounded:
    velocity = 0.0 * theta
    for g, rate in zip(gradients, rates, strict=True):
        g = g + weight_decay * theta
        velocity = momentum * velocity + g
        theta = theta - rate * (g + momentum * velocity if nesterov else velocity)
    return theta


def textbook_adam(
    theta: Rounded,
    gradients: list[Rounded],
    rates: list[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> Rounded:
    m, v = 0.0 * theta, 0.0 * theta
    power_1 = power_2 = 1.0
    for g, rate in zip(gradients, rates, strict=True):
        power_1, power_2 = power_1 * betas[0], power_2 * betas[1]
        if decoupled:
            theta = (1 - rate * weight_decay) * theta
        else:
            g = g + weight_decay * theta
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * (g * g)
        m_hat, v_hat = m * (1 / (1 - power_1)), v * (1 / (1 - power_2))
        theta = theta - rate * (m_hat / (v_hat.sqrt() + eps))
    return theta


def textbook_adamw(*arguments: Any, weight_decay: float = 0.01, **options: Any) -> Rounded:
    return textbook_adam(*arguments, weight_decay=weight_decay, decoupled=True, **options)


Textbook = Callable[..., Rounded]
ALGORITHMS = [
    (SGD, textbook_sgd, 0.03, {}),
    (SGD, textbook_sgd, 0.03, {"weight_decay": 0.2}),
    (SGD, textbook_sgd, 0.03, {"momentum": 0.9}),
    (SGD, textbook_sgd, 0.03, {"momentum": 0.9, "weight_decay": 0.2}),
    (SGD, textbook_sgd, 0.03, {"momentum": 0.7, "nesterov": True, "weight_decay": 0.05}),
    (Adam, textbook_adam, 1e-3, {}),
    (Adam, textbook_adam, 3e-3, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}),
    (Adam, textbook_adam, 0.01, {"betas": (0.0, 0.5)}),
    (AdamW, textbook_adamw, 1e-3, {}),
    (AdamW, textbook_adamw, 0.01, {"betas": (0.7, 0.99), "eps": 1e-6, "weight_decay": 0.5}),
]
each_algorithm = pytest.mark.parametrize(
    "kind, textbook, rate, options", ALGORITHMS, ids=lambda value: getattr(value, "__name__", str(value))
)


def assert_follows(kind: Any, textbook: Textbook, rates: list[float], options: Any, length: int, dtype: str) -> None:
    net, unit = network(length, dtype), UNIT[dtype]
    start = net.theta.astype(np.float64)
    gradients = random_gradients(length, dtype, len(rates))
    expected = textbook(Rounded(start, 0.0, unit), [Rounded(g, 0.0, unit) for g in gradients], rates, **options)

    optimizer = kind(rates[0], **options)
    for rate, gradient in zip(rates, gradients, strict=True):
        optimizer.learning_rate = rate
        step(optimizer, net, gradient)

    # Twice: the library may order its operations otherwise, and in float64 the textbook above is rounded as well.
    bound = 2 * expected.error
    assert np.linalg.norm(bound) < 1e-2 * np.linalg.norm(expected.value - start), "the bound hides nothing"
    assert (np.abs(net.theta - expected.value) <= bound).all()
    assert optimizer.step_count == len(rates)


@pytest.mark.parametrize("length", [2, 7, 1001])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@each_algorithm
def test_sixty_steps_follow_the_textbook(
    kind: Any, textbook: Textbook, rate: float, options: Any, dtype: str, length: int
) -> None:
    assert_follows(kind, textbook, [rate] * STEPS, options, length, dtype)


@pytest.mark.parametrize(
    "length", [PARAMETERS_AT_ONCE - 1, PARAMETERS_AT_ONCE, PARAMETERS_AT_ONCE + 1, 2 * PARAMETERS_AT_ONCE + 233]
)
@each_algorithm
def test_every_parameter_of_a_long_theta_is_treated_alike(
    kind: Any, textbook: Textbook, rate: float, options: Any, length: int
) -> None:
    """θ is worked through in pieces; one that repeats the same 31 numbers must go on repeating them."""
    period, net = network(31), network(length)
    net.theta[:] = np.resize(period.theta, length)
    short, long = kind(rate, **options), kind(rate, **options)
    for gradient in random_gradients(31, "float32", 3):
        step(short, period, gradient)
        step(long, net, np.resize(gradient, length))
    np.testing.assert_array_equal(net.theta, np.resize(period.theta, length))


@each_algorithm
def test_a_learning_rate_changed_between_steps_takes_effect_at_the_next(
    kind: Any, textbook: Textbook, rate: float, options: Any
) -> None:
    schedule = [rate * 0.9**t for t in range(20)] + [0.0, 5 * rate]
    assert_follows(kind, textbook, schedule, options, 11, "float64")


def test_in_float64_the_textbook_is_met_to_thirteen_digits() -> None:
    for kind, textbook, rate, options in ALGORITHMS:
        net, gradients = network(501, "float64"), random_gradients(501, "float64")
        expected = textbook(
            Rounded(net.theta.copy(), 0.0, 0.0), [Rounded(g, 0.0, 0.0) for g in gradients], [rate] * STEPS, **options
        ).value
        path = np.abs(net.theta) + (rate * np.abs(gradients).sum(axis=0) / (1 - options.get("momentum", 0.0)))
        optimizer = kind(rate, **options)
        for gradient in gradients:
            step(optimizer, net, gradient)
        assert (np.abs(net.theta - expected) <= 1e-13 * (path + STEPS * rate)).all()


# --- worked examples


def test_sgd_by_hand() -> None:
    net = network(2)
    net.theta[:] = [1.0, -2.0]
    step(SGD(0.5), net, [4.0, 1.0])
    assert net.theta.tolist() == [1.0 - 0.5 * 4.0, -2.0 - 0.5 * 1.0]


def test_momentum_by_hand() -> None:
    net = network(2)
    net.theta[:] = 0.0
    optimizer = SGD(1.0, momentum=0.5)
    for expected in (-8.0, -8.0 - 12.0, -8.0 - 12.0 - 14.0):  # v = 8, 8/2 + 8, 12/2 + 8
        step(optimizer, net, [8.0, 8.0])
        assert net.theta.tolist() == [expected, expected]
    assert optimizer.state["velocity"].tolist() == [14.0, 14.0]


def test_nesterov_by_hand() -> None:
    net = network(2)
    net.theta[:] = 0.0
    optimizer = SGD(1.0, momentum=0.5, nesterov=True)
    for expected in (-12.0, -12.0 - 14.0):  # g + v/2 with v = 8, 12
        step(optimizer, net, [8.0, 8.0])
        assert net.theta.tolist() == [expected, expected]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}])
@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
def test_small_integers_and_powers_of_two_are_exact(options: Any, weight_decay: float) -> None:
    net = network(PARAMETERS_AT_ONCE + 1)
    gradients = np.random.default_rng(0).integers(-3, 4, (4, PARAMETERS_AT_ONCE + 1))
    net.theta[:] = np.arange(PARAMETERS_AT_ONCE + 1) % 7 - 3
    start = Rounded(net.theta, 0.0, 0.0)
    rounded = [Rounded(g, 0.0, 0.0) for g in gradients]
    expected = textbook_sgd(start, rounded, [0.5] * 4, weight_decay=weight_decay, **options)
    optimizer = SGD(0.5, weight_decay=weight_decay, **options)
    for gradient in gradients:
        step(optimizer, net, gradient)
    np.testing.assert_array_equal(net.theta, expected.value)


def test_adams_first_step_is_the_learning_rate_whatever_the_gradients_size() -> None:
    net = network(4, "float64")
    net.theta[:] = 0.0
    step(Adam(0.01), net, [1e-3, -1.0, 1e4, 0.0])
    np.testing.assert_allclose(net.theta, [-0.01, 0.01, -0.01, 0.0], rtol=1.1e-5)  # ε is 10⁻⁵ of the smallest


def test_adamw_shrinks_theta_where_adam_bends_the_gradient() -> None:
    for kind, expected in ((Adam, -0.5), (AdamW, -0.5 * 0.5)):  # λθ alone moves Adam by η; AdamW by ηλ of θ
        net = network(2, "float64")
        net.theta[:] = -1.0 if kind is Adam else -0.5
        step(kind(0.5, weight_decay=1.0), net, [0.0, 0.0])
        np.testing.assert_allclose(net.theta, expected, rtol=1e-7)


def test_a_learning_rate_of_zero_leaves_theta() -> None:
    for optimizer in (SGD(0.0, momentum=0.9, weight_decay=0.1), Adam(0.0), AdamW(0.0)):
        net = network(300)
        before = net.theta.tobytes()
        step(optimizer, net, np.ones(300))
        assert net.theta.tobytes() == before


def test_a_learning_rate_from_numpy_acts_like_the_same_python_float() -> None:
    def trained(rate: float) -> bytes:
        net, optimizer = network(500), Adam(rate)
        for gradient in random_gradients(500, "float32", 5):
            optimizer.learning_rate = rate  # schedules made by np.geomspace or np.cos yield np.float64
            step(optimizer, net, gradient)
        return net.theta.tobytes()

    assert trained(np.float64(0.1)) == trained(0.1)


# --- whose arrays


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_steps_are_made_in_place(kind: Any) -> None:
    net = MLP([3, 4, 2], seed=0)
    theta, weights, biases = net.theta, list(net.weights), list(net.biases)
    optimizer = kind(0.1, momentum=0.9) if kind is SGD else kind(0.1)
    assert (optimizer.state, optimizer.step_count) == ({}, 0)
    before = [W.copy() for W in weights]
    step(optimizer, net, np.ones(net.n_parameters))
    arrays = dict(optimizer.state)
    step(optimizer, net, np.ones(net.n_parameters))

    assert net.theta is theta
    for part, same in zip([*net.weights, *net.biases], [*weights, *biases], strict=True):
        assert part is same and np.shares_memory(part, theta)
    for W, old in zip(weights, before, strict=True):
        assert (old != W).all()
    assert optimizer.step_count == 2
    for name, array in optimizer.state.items():
        assert array is arrays[name] and (array.shape, array.dtype) == (theta.shape, theta.dtype)


@pytest.mark.parametrize("optimizer", [SGD(0.1, 0.9, True, 0.1), SGD(0.1), Adam(weight_decay=0.1), AdamW()], ids=repr)
def test_the_gradient_is_only_read(optimizer: Any) -> None:
    net = MLP([3, 4, 2], seed=0)
    _, gradients = net.value_and_grad(np.ones((2, 3)), [0, 1])
    before = gradients.theta.tobytes()
    gradients.theta.flags.writeable = False
    copy.deepcopy(optimizer).step(net, gradients)
    assert gradients.theta.tobytes() == before


def test_sgd_without_momentum_keeps_no_state() -> None:
    net, optimizer = network(5), SGD(0.1, weight_decay=0.1)
    step(optimizer, net, np.ones(5))
    assert optimizer.state == {}


@pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.1, momentum=0.5), Adam(), AdamW()], ids=repr)
def test_an_optimizer_refuses_a_second_network(optimizer: Any) -> None:
    first, twin, optimizer = network(5), network(5), copy.deepcopy(optimizer)
    step(optimizer, first, np.ones(5))
    before, state = twin.theta.tobytes(), {name: array.copy() for name, array in optimizer.state.items()}
    with pytest.raises(OptionError, match=rf"{type(optimizer).__name__} belongs to another network"):
        step(optimizer, twin, np.ones(5))
    assert twin.theta.tobytes() == before
    assert optimizer.step_count == 1
    for name, array in optimizer.state.items():
        np.testing.assert_array_equal(array, state[name])
    step(optimizer, first, np.ones(5))  # and still serves its own


# --- clipping


@pytest.mark.parametrize("clip_norm", [0.5, 1e-30, 5.001])
def test_a_step_scales_a_longer_gradient_down(clip_norm: float) -> None:
    """(3, −4) has a norm of 5. As torch.nn.utils.clip_grad_norm_ does."""
    net, optimizer = network(2), SGD(1.0)
    net.theta[:] = 0
    optimizer.step(net, SimpleNamespace(theta=np.array([3, -4], np.float32)), clip_norm=clip_norm)
    factor = min(1.0, clip_norm / (5 + 1e-6))
    np.testing.assert_allclose(net.theta, [-3 * factor, 4 * factor], rtol=3 * 2**-24)


# --- what is refused


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf, "1"], ids=repr)
def test_a_clip_norm_out_of_range(clip_norm: Any) -> None:
    net = network(2)
    before = net.theta.copy()
    with pytest.raises(OptionError, match="^clip_norm: expected a finite number > 0, got"):
        SGD(1.0).step(net, SimpleNamespace(theta=np.ones(2, np.float32)), clip_norm=clip_norm)
    np.testing.assert_array_equal(net.theta, before)


@pytest.mark.parametrize("gradient", [np.ones(4, np.float32), np.ones((5, 1), np.float32), np.ones(5)])
def test_gradients_of_another_shape_or_dtype_are_refused(gradient: np.ndarray) -> None:
    net, optimizer = network(5), SGD(0.1, momentum=0.9)
    before = net.theta.tobytes()
    with pytest.raises(ShapeError, match=r"gradients: expected shape \(5,\) of float32, got .* of float"):
        optimizer.step(net, SimpleNamespace(theta=gradient))
    assert (net.theta.tobytes(), optimizer.step_count) == (before, 0)


def test_gradients_of_another_network_are_refused() -> None:
    other = MLP([3, 5, 2], seed=0)
    _, gradients = other.value_and_grad(np.ones((2, 3)), [0, 1])
    with pytest.raises(ShapeError, match="gradients"):
        Adam().step(MLP([3, 4, 2], seed=0), gradients)


NOT_RATES = [-1e-9, math.nan, math.inf, -math.inf, "fast", None, 1j, [0.1, 0.2]]
NOT_FRACTIONS = [*NOT_RATES, 1.0, 1.5]


@pytest.mark.parametrize("value", NOT_RATES, ids=repr)
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_learning_rate_and_weight_decay_out_of_range(kind: Any, value: Any) -> None:
    with pytest.raises(OptionError, match=r"^learning_rate: expected .* got"):
        kind(value)
    with pytest.raises(OptionError, match=r"^weight_decay: expected .* got"):
        kind(0.1, weight_decay=value)


@pytest.mark.parametrize("value", NOT_FRACTIONS, ids=repr)
def test_momentum_out_of_range(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^momentum: expected .* got"):
        SGD(0.1, momentum=value)


@pytest.mark.parametrize("value", NOT_FRACTIONS, ids=repr)
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_betas_out_of_range(kind: Any, value: Any) -> None:
    with pytest.raises(OptionError, match=r"^betas\[0\]: expected .* got"):
        kind(betas=(value, 0.999))
    with pytest.raises(OptionError, match=r"^betas\[1\]: expected .* got"):
        kind(betas=(0.9, value))


@pytest.mark.parametrize("betas", [(), (0.9,), (0.9, 0.99, 0.999), 0.9, None, "beta"], ids=repr)
def test_betas_are_two(betas: Any) -> None:
    with pytest.raises(OptionError, match=r"^betas"):
        Adam(betas=betas)


@pytest.mark.parametrize("value", NOT_RATES, ids=repr)
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_eps_out_of_range(kind: Any, value: Any) -> None:
    with pytest.raises(OptionError, match=r"^eps: expected .* got"):
        kind(eps=value)


def test_eps_of_zero_is_out_of_range() -> None:
    """A gradient that stays 0 (a dead relu, an unused input) would divide 0 by 0."""
    with pytest.raises(OptionError, match="^eps"):
        Adam(eps=0.0)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_a_number_in_quotes_is_no_number(kind: Any) -> None:
    with pytest.raises(OptionError, match="^learning_rate"):
        kind("0.1")


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(OptionError, match="nesterov=True needs momentum > 0"):
        SGD(0.1, nesterov=True)


def test_errors_are_value_errors_too() -> None:
    with pytest.raises(ValueError) as caught:
        SGD(-1.0)
    assert isinstance(caught.value, GpubackError)


@pytest.mark.parametrize(
    "optimizer",
    [SGD(0.1, 0.9, True, 0.01), Adam(0.2, (0.8, 0.9), 1e-7, 0.1), AdamW()],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_repr_makes_the_same_optimizer(optimizer: Any) -> None:
    again = eval(repr(optimizer), {"SGD": SGD, "Adam": Adam, "AdamW": AdamW})
    assert type(again) is type(optimizer)
    assert again._options() == optimizer._options()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 1 - 2.0**-20])
def test_powers_of_betas_are_those_of_steps_one_by_one(beta: float) -> None:
    chain = 1.0
    for steps in range(70_000):
        if steps % 4999 == 0 or steps < 50:
            first, second = beta_powers((beta, beta), steps)
            assert first == second
            assert first == chain or 1.0 - first == 1.0 - chain == 1.0
        chain *= beta


@pytest.mark.parametrize("steps", [10**9, 2**53])
def test_powers_of_any_number_of_steps_are_there_at_once(steps: int) -> None:
    first, second = beta_powers((0.9, 1 - 2.0**-40), steps)
    assert 1.0 - first == 1.0
    assert second == pytest.approx(math.exp(-steps * 2.0**-40), rel=1e-9)
