"""`MLP.jvp`, `jacobian`, `taylor`, `laplacian`, `hvp`, `gnvp` and `Pullback.vjp`, held against each other and against
differences of first derivatives, without another library."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gpuback
from gpuback import MLP
from gpuback._core.activations import ACTIVATIONS
from gpuback.errors import DtypeError, OptionError, ShapeError

KINKED = [name for name, row in ACTIVATIONS.items() if row.kinks]
SMOOTH = [name for name in ACTIVATIONS if name not in KINKED]
FORMATS = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 6e-2}
"""The error of an identity, relative to the larger side, that each format's rounding explains on the networks below."""

PAIRS: list[tuple[Any, str]] = [
    ("cross_entropy", "softmax"),
    (gpuback.losses.CrossEntropy(label_smoothing=0.1, class_weight=[1, 2, 0.5]), "softmax"),
    ("binary_cross_entropy", "sigmoid"),
    ("poisson", "exponential"),
    ("squared_error", "identity"),
    ("squared_error", "softmax"),
    ("squared_error", "tanh"),
    ("huber", "sigmoid"),
    ("quantile", "identity"),
    ("absolute_error", "tanh"),
]
each_activation = pytest.mark.parametrize("activation", SMOOTH)
each_format = pytest.mark.parametrize("dtype", FORMATS)


def network(sizes: tuple[int, ...] = (3, 6, 5, 3), **options: Any) -> MLP:
    defaults = {"activation": "tanh", "output": "identity", "loss": "squared_error", "dtype": "float64", "seed": 1}
    return MLP(sizes, **defaults | options)


def normal(seed: int, *shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


def targets(net: MLP, rows: int) -> NDArray[Any]:
    rng, shape = np.random.default_rng(9), (rows, net.sizes[-1])
    kinds = {"cross_entropy": rng.integers(0, shape[1], rows), "binary_cross_entropy": rng.random(shape)}
    return kinds.get(net.architecture.loss, rng.integers(0, 4, shape).astype(float))


def inner(*pairs: tuple[Any, Any]) -> float:
    return float(sum((np.asarray(a, np.float64) * np.asarray(b, np.float64)).sum() for a, b in pairs))


def assert_equal(left: float, right: float, dtype: str = "float64") -> None:
    assert abs(left - right) <= FORMATS[dtype] * max(abs(left), abs(right), 1e-3), (left, right)


def difference(f: Any, step: float = 1e-5) -> NDArray[np.float64]:
    """The derivative at 0 of an array-valued function, by five points: an error of about 10⁻¹⁰."""
    return (8 * (f(step) - f(-step)) - (f(2 * step) - f(-2 * step))) / (12 * step)


# --- against differences


@each_activation
@pytest.mark.parametrize("output", ["identity", "sigmoid"])
def test_first_and_second_derivatives_along_directions(activation: str, output: str) -> None:
    net = network(activation=activation, output=output)
    x, v = normal(0, 4, 3) / 2, normal(1, 2, 4, 3)
    t = net.taylor(x, v)
    assert t.second is not None
    np.testing.assert_array_equal(t.y, net.forward(x))
    for d in range(2):
        along = lambda s, d=d: net.forward(x + s * v[d])  # noqa: E731
        of_first = lambda s, d=d: net.jvp(x + s * v[d], dx=v[d])[1]  # noqa: E731
        np.testing.assert_allclose(t.first[d], difference(along), rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(t.second[d], difference(of_first), rtol=1e-7, atol=1e-7)


@each_activation
@pytest.mark.parametrize("output", ["identity", "sigmoid"])
def test_the_way_back_from_second_derivatives(activation: str, output: str) -> None:
    """Along a direction of θ, of x and of v, by differences of the sum that is differentiated."""
    net = network((2, 5, 4, 2), activation=activation, output=output)
    x, v, C = normal(0, 3, 2) / 2, normal(1, 2, 3, 2), [[1.0, 0.5], [0.0, -2.0], [0.0, 0.0]]
    c = [normal(2, 3, 2), normal(3, 2, 3, 2), normal(4, 3, 3, 2)]
    theta, theta_dot, x_dot, v_dot = net.theta.copy(), normal(5, net.n_parameters), normal(6, 3, 2), normal(7, 2, 3, 2)
    t = net.taylor(x, v, second=C)
    gradients = t.pullback(*c, need_input_grad=True)
    assert gradients.inputs is not None and gradients.directions is not None

    def at(s: float) -> NDArray[np.float64]:
        net.theta = theta + s * theta_dot
        moved = net.taylor(x + s * x_dot, v + s * v_dot, second=C)
        return np.array(inner((c[0], moved.y), (c[1], moved.first), (c[2], moved.second)))

    found = inner((gradients.theta, theta_dot), (gradients.inputs, x_dot), (gradients.directions, v_dot))
    np.testing.assert_allclose(found, difference(at), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("loss", "output"), PAIRS, ids=str)
def test_hessian_products_are_differences_of_gradients(loss: Any, output: str) -> None:
    net = network(loss=loss, output=output, activation=["silu", "tanh"])
    x, weight = normal(0, 5, 3), np.random.default_rng(1).uniform(0.5, 2, 5)
    y, theta, theta_dot, x_dot = targets(net, 5), net.theta.copy(), normal(2, net.n_parameters), normal(3, 5, 3)
    product = net.hvp(x, y, theta_dot, x_dot, sample_weight=weight)

    def gradients(s: float) -> NDArray[np.float64]:
        net.theta = theta + s * theta_dot
        found = net.value_and_grad(x + s * x_dot, y, sample_weight=weight, need_input_grad=True)[1]
        return np.concatenate([found.theta, np.ravel(found.inputs)])

    expected = difference(gradients)
    np.testing.assert_allclose(product.theta, expected[: net.n_parameters], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(product.inputs, expected[net.n_parameters :].reshape(5, 3), rtol=1e-6, atol=1e-8)


# --- identities


@each_format
@pytest.mark.parametrize("output", ["identity", "sigmoid", "softmax"])
@pytest.mark.parametrize("activation", ["tanh", "gelu", "relu", "softplus"])
def test_forward_and_backward_differentiation_are_dual(activation: str, output: str, dtype: str) -> None:
    """<c, J u> = <Jᵀ c, u>, for u in (θ, x)."""
    net = network((7, 9, 8, 4), activation=activation, output=output, dtype=dtype)
    x, c, u, theta_dot = normal(0, 30, 7), normal(1, 30, 4), normal(2, 30, 7), normal(3, net.n_parameters)
    y, pullback = net.vjp(x)
    forward, moved = net.jvp(x, u, theta_dot)
    gradients = pullback(c, need_input_grad=True)
    np.testing.assert_allclose(np.asarray(forward, float), np.asarray(y, float), rtol=1e-6, atol=1e-6)
    assert_equal(inner((c, moved)), inner((gradients.theta, theta_dot), (gradients.inputs, u)), dtype)


@each_format
@pytest.mark.parametrize(("loss", "output"), PAIRS, ids=str)
def test_hessians_and_gauss_newton_matrices_are_symmetric(loss: Any, output: str, dtype: str) -> None:
    """<u, H v> = <v, H u>, for u and v in (θ, x)."""
    net = network((4, 8, 6, 3), loss=loss, output=output, activation=["softplus", "silu"], dtype=dtype)
    x, y = normal(0, 20, 4), targets(net, 20)
    (u, v), (p, q) = normal(1, 2, net.n_parameters), normal(2, 2, 20, 4)
    Hu, Hv = net.hvp(x, y, u, p), net.hvp(x, y, v, q)
    assert_equal(inner((v, Hu.theta), (q, Hu.inputs)), inner((u, Hv.theta), (p, Hv.inputs)), dtype)
    Gu, Gv = net.gnvp(x, y, u), net.gnvp(x, y, v)
    assert_equal(inner((v, Gu.theta)), inner((u, Gv.theta)), dtype)
    assert inner((u, Gu.theta)) >= 0


@pytest.mark.parametrize("sizes", [(3, 8, 5, 2), (2, 8, 5, 3), (20, 6, 33), (1, 4, 1)])
def test_the_jacobian_has_the_derivatives_by_each_direction(sizes: tuple[int, ...]) -> None:
    net = network(sizes)
    x = normal(0, 6, sizes[0])
    jacobian = net.jacobian(x)
    assert jacobian.shape == (6, sizes[-1], sizes[0])
    first = net.taylor(x, order=1).first
    np.testing.assert_allclose(jacobian, np.moveaxis(first, 0, 2), rtol=1e-12, atol=1e-13)


def test_the_laplacian_is_the_sum_of_second_derivatives_by_each_input() -> None:
    net = network((4, 9, 7, 2), activation="silu")
    x, c = normal(0, 11, 4), normal(1, 11, 2)
    one, each = net.laplacian(x), net.taylor(x)
    assert one.second is not None and each.second is not None and len(one.second) == 1
    np.testing.assert_allclose(one.second[0], each.second.sum(axis=0), rtol=1e-12, atol=1e-13)
    by_one, by_each = one.pullback(second=c[None]), each.pullback(second=np.repeat(c[None], 4, axis=0))
    np.testing.assert_allclose(by_one.theta, by_each.theta, rtol=1e-11, atol=1e-13)


def test_mixed_derivatives_by_polarisation() -> None:
    """∂²/∂v∂w = ¼ (∂²_{v+w} − ∂²_{v−w}), against differences of ∂/∂w along v."""
    net = network()
    x, (v, w) = normal(0, 4, 3), normal(1, 2, 4, 3)
    mixed = net.taylor(x, np.stack([v + w, v - w]), second=[[0.25, -0.25]]).second
    assert mixed is not None
    np.testing.assert_allclose(mixed[0], difference(lambda s: net.jvp(x + s * v, dx=w)[1]), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("output", ["identity", "sigmoid", "softmax"])
def test_the_way_back_through_a_pullback(output: str) -> None:
    """s = <u, dx> + <U, dθ> + <c, ŷ>: by θ, x and dy, against the derivatives of forward differentiation."""
    net = network((3, 7, 6, 2), activation=["silu", "tanh"], output=output)
    x, dy, u, c, U = normal(0, 5, 3), normal(1, 5, 2), normal(2, 5, 3), normal(3, 5, 2), normal(4, net.n_parameters)
    _, pullback = net.vjp(x)
    first, second = pullback.vjp(dy, need_theta_grad=True)
    plain = pullback(dy, need_input_grad=True)
    np.testing.assert_array_equal(first.theta, plain.theta)
    np.testing.assert_array_equal(first.inputs, plain.inputs)
    result = second(inputs=u, theta=U, outputs=c, need_input_grad=True)
    np.testing.assert_allclose(result.outputs, net.jvp(x, u, U)[1], rtol=1e-12, atol=1e-14)

    theta, theta_dot, x_dot = net.theta.copy(), normal(5, net.n_parameters), normal(6, 5, 3)

    def s(step: float) -> NDArray[np.float64]:
        net.theta = theta + step * theta_dot
        y, again = net.vjp(x + step * x_dot)
        moved = again(dy, need_input_grad=True)
        return np.array(inner((u, moved.inputs), (U, moved.theta), (c, y)))

    found = inner((result.theta, theta_dot), (result.inputs, x_dot))
    np.testing.assert_allclose(found, difference(s), rtol=1e-6, atol=1e-8)


def test_a_network_of_straight_lines_has_no_second_derivatives() -> None:
    net = network(activation=["relu", "leaky_relu(slope=0.2)"])
    t = net.taylor(normal(0, 9, 3), normal(1, 2, 9, 3))
    assert t.second is not None and not t.second.any() and t.first.any()


def test_a_users_loss_with_a_hessian() -> None:
    class LogCosh:
        """Σ log cosh(ŷ − y)."""

        __name__ = "log_cosh"

        def __call__(self, y_hat: Any, y: Any) -> Any:
            return np.log(np.cosh(y_hat - y)).sum(axis=1), np.tanh(y_hat - y)

        def hessian_vector(self, y_hat: Any, y: Any, t: Any) -> Any:
            return t / np.cosh(y_hat - y) ** 2

    net = network(loss=LogCosh())
    x, y, theta_dot, theta = normal(0, 6, 3), normal(1, 6, 3), normal(2, net.n_parameters), net.theta.copy()
    product = net.hvp(x, y, theta_dot)

    def gradient(s: float) -> NDArray[np.float64]:
        net.theta = theta + s * theta_dot
        return net.value_and_grad(x, y)[1].theta

    np.testing.assert_allclose(product.theta, difference(gradient), rtol=1e-6, atol=1e-9)
    with pytest.raises(OptionError, match="hessian_vector"):
        network(loss=lambda y_hat, y: ((y_hat - y) ** 2).sum(axis=1)).hvp(x, y, theta_dot)


@pytest.mark.parametrize(
    ("returned", "kind"),
    [
        (lambda t: t[:, :1], ShapeError),
        (lambda t: t.tolist(), DtypeError),
        (lambda t: t + 0j, DtypeError),
        (lambda t: t > 0, DtypeError),
    ],
    ids=["another shape", "a list", "complex numbers", "booleans"],
)
def test_what_a_users_hessian_returns_is_checked(returned: Any, kind: type[Exception]) -> None:
    class Half:
        __name__ = "half"

        def __call__(self, y_hat: Any, y: Any) -> Any:
            return ((y_hat - y) ** 2).sum(axis=1) / 2, y_hat - y

        def hessian_vector(self, y_hat: Any, y: Any, t: Any) -> Any:
            for array in (y_hat, y, t):
                assert not array.flags.writeable
            return returned(t)

    net = network(loss=Half(), output="sigmoid")
    with pytest.raises(kind, match="hessian_vector"):
        net.hvp(normal(0, 4, 3), normal(1, 4, 3), normal(2, net.n_parameters))


def test_results_of_other_calls_do_not_stay_in_gradients_that_are_used_again() -> None:
    net = network()
    x, c = normal(0, 4, 3), normal(1, 4, 3)
    gradients = net.taylor(x).pullback(y=c, need_input_grad=True)
    assert gradients.directions is not None
    net.value_and_grad(x, c, out=gradients)
    assert gradients.inputs is None and gradients.directions is None
    _, pullback = net.vjp(x)
    assert pullback.vjp(c)[1](outputs=c, out=gradients).outputs is not None
    assert pullback(c, out=gradients).outputs is None


# --- batches, buffers, errors


@pytest.mark.parametrize("rows", [1, 1000, 20_000])
def test_rows_of_a_large_batch_stand_for_themselves(rows: int) -> None:
    """Blocks and threads change nothing but the order of sums over samples."""
    net = network((3, 16, 16, 2), activation="silu", dtype="float32")
    x = normal(0, rows, 3).astype(np.float32)
    t, few = net.laplacian(x), slice(rows // 2, rows // 2 + 3)
    alone = net.laplacian(x[few])
    for whole, part in ((t.y, alone.y), (t.first, alone.first), (t.second, alone.second)):
        np.testing.assert_allclose(whole[..., few, :], part, rtol=2e-4, atol=2e-5)
    c = normal(1, 1, rows, 2).astype(np.float32) / rows
    whole = t.pullback(second=c).theta.astype(np.float64)
    halves = [net.laplacian(x[half]) for half in (slice(0, rows, 2), slice(1, rows, 2)) if len(x[half])]
    parts = [t.pullback(second=c[:, i::2]).theta.astype(np.float64) for i, t in enumerate(halves)]
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-3, atol=1e-5)


def test_several_ways_back_may_be_alive_and_each_be_used_again() -> None:
    net = network()
    x, other = normal(0, 2, 8, 3)
    first, second = net.taylor(x), net.taylor(other)
    c = normal(1, 8, 3)
    expected = [net.taylor(of).pullback(y=c).theta for of in (x, other)]
    for t, theta in ((second, expected[1]), (first, expected[0]), (second, expected[1])):
        np.testing.assert_array_equal(t.pullback(y=c).theta, theta)
    gradients = first.pullback(y=c)
    assert first.pullback(y=c, out=gradients, accumulate=True) is gradients
    np.testing.assert_allclose(gradients.theta, 2 * expected[0], rtol=1e-13)
    del first, second
    gc.collect()


def test_theta_must_stay_as_it_is() -> None:
    net = network()
    t, (_, pullback) = net.taylor(normal(0, 4, 3)), net.vjp(normal(0, 4, 3))
    _, second = pullback.vjp(normal(1, 4, 3))
    net.theta = net.theta * 2
    with pytest.raises(OptionError, match="call taylor again"):
        t.pullback(y=normal(1, 4, 3))
    with pytest.raises(OptionError, match="call vjp again"):
        second(outputs=normal(1, 4, 3))


X = normal(0, 4, 3)
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing moves": (lambda net: net.jvp(X), OptionError, "dx or dtheta"),
    "dx of another shape": (lambda net: net.jvp(X, dx=X[:3]), ShapeError, r"dx: expected shape \(4, 3\)"),
    "θ̇ of another shape": (lambda net: net.jvp(X, dtheta=np.ones(3)), ShapeError, "dtheta: expected shape"),
    "v of another width": (lambda net: net.taylor(X, np.ones((2, 4))), ShapeError, r"v: expected shape \(D, 3\)"),
    "no directions": (lambda net: net.taylor(X, np.ones((0, 3))), ShapeError, "v: expected"),
    "third order": (lambda net: net.taylor(X, order=3), OptionError, "order: expected 1 or 2, got 3"),
    "weights without a column": (lambda net: net.taylor(X, second=[[1, 2]]), ShapeError, r"second: .*\(S, 3\)"),
    "weights that are no numbers": (lambda net: net.taylor(X, second="abc"), DtypeError, "second"),
    "weights that are not finite": (lambda net: net.taylor(X, second=[[np.nan, 0, 0]]), OptionError, "second: .*NaN"),
    "no way for θ": (lambda net: net.gnvp(X, X, None), OptionError, "dtheta"),
    "weights of order 1": (lambda net: net.taylor(X, order=1, second=[[1, 2, 3]]), OptionError, "order=2"),
    "nothing to differentiate": (lambda net: net.taylor(X).pullback(), OptionError, "y, first or second"),
    "a second of order 1": (lambda net: net.taylor(X, order=1).pullback(second=X), OptionError, "order=1"),
    "first of another shape": (lambda net: net.taylor(X).pullback(first=X), ShapeError, "first: expected shape"),
    "nothing of second": (lambda net: net.vjp(X)[1].vjp(X)[1](), OptionError, "inputs, theta or outputs"),
}


@pytest.mark.parametrize(("call", "kind", "said"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_was_expected(call: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        call(network())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float32", "reproducible": True}, "reproducible=True"),
        ({"dtype": "float16"}, "got float16"),
        ({"output": "softmax"}, "second derivatives of softmax"),
    ],
)
def test_networks_that_cannot_say_so(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        network(**options).laplacian(X)
