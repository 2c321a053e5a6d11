"""`Ops.bind_gradient_scale`: the power of two that float16 gradients carry, chosen by the largest |dy|."""

import math

import numpy as np
import pytest

from gpuback import MLP

pytestmark = pytest.mark.on_each_backend

NET = {"sizes": [2, 2], "dtype": "float16", "seed": 0}


def scaled(dy, values, out=None, **options):
    """σ as weights, and values / σ, or out + values / σ."""
    net = MLP(**NET, **options)
    ops, dtype = net.ops, net.theta.dtype
    scale = ops.bind_gradient_scale(*dy.shape, net.architecture.precision)
    arrays = [None if array is None else ops.asarray(array.astype(dtype), dtype, "") for array in (dy, values, out)]
    with ops.scope():
        weights = ops.to_numpy(scale.fit(arrays[0])).copy()
        scale.unscale(arrays[1], arrays[1] if out is None else arrays[2], out is not None)
    return weights, ops.to_numpy(arrays[1] if out is None else arrays[2])


@pytest.mark.parametrize("exponent", [-149, -148, -127, -126, -125, -24, -1, 0, 1, 16, 125, 126, 127])
def test_it_brings_the_largest_to_between_a_half_and_one(exponent):
    dy = np.array([[2.0**-149, -(2.0**exponent)]], np.float32)
    (weight,), unscaled = scaled(dy, np.array([1.5]))
    assert math.frexp(weight)[0] == 0.5
    assert unscaled == 1.5 / weight  # both are normal numbers of float32
    if -126 <= exponent <= 125:
        assert weight * abs(dy).max() == 0.5
    assert 2.0**-24 < weight * abs(dy).max() < 4  # nothing that float16 does not hold


@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan])
def test_without_a_largest_finite_number_it_is_1(value):
    weights, unscaled = scaled(np.array([[0.25, value], [0.0, 0.0]]) if value else np.zeros((2, 2)), np.ones(3))
    np.testing.assert_array_equal(weights, [1, 1])
    np.testing.assert_array_equal(unscaled, [1, 1, 1])


@pytest.mark.parametrize("rows", [1, 7, pytest.param(3001, marks=pytest.mark.thorough)])
def test_every_row_has_it_and_results_lose_it(rows):
    rng = np.random.default_rng(rows)
    dy, values, out = 1e-9 * rng.standard_normal((rows, 3)), rng.standard_normal(rows), rng.standard_normal(rows)
    weights, added = scaled(dy, values, 1e8 * out)
    expected = np.float32(2.0 ** -math.frexp(float(abs(dy.astype(np.float32)).max()))[1])
    np.testing.assert_array_equal(weights, np.full(rows, expected))
    sums = (1e8 * out).astype(np.float32) + values.astype(np.float32) / expected
    np.testing.assert_array_equal(added, sums)


def test_reproducible_bits_are_those_of_numpy():
    dy, out = np.array([[1e-7, 3e-7]]), np.array([np.inf, np.nan, 1.0, -np.inf, 0.0])
    values = np.array([-np.inf, 1.0, np.nan, -np.inf, -0.0])
    here, there = (scaled(dy, values, out, reproducible=True, backend=name)[1] for name in ("auto", "numpy"))
    assert here.tobytes() == there.tobytes()
