"""gpuback.datasets.standardization: folded into a network, standardization changes nothing but what it is fed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuback import MLP
from gpuback.datasets.standardization import Standardization, fold
from gpuback.errors import DataError, OptionError

OFFSETS = np.array([0.0, 30.0, -2000.0, 1e-3, 7.0])
SPREADS = np.array([1.0, 0.02, 250.0, 1e-5, 0.0])
"""The last feature never varies."""


def raw_data(rows: int = 41, seed: int = 0) -> Any:
    return OFFSETS + SPREADS * np.random.Generator(np.random.PCG64(seed)).standard_normal((rows, len(OFFSETS)))


def test_columns_come_to_mean_0_and_standard_deviation_1() -> None:
    x = raw_data()
    z = Standardization.of_features(x).apply(x)
    np.testing.assert_allclose(z.mean(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(z.std(axis=0), [1, 1, 1, 1, 0], atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e300, 1e-300])
def test_a_column_that_never_varies(value: float) -> None:
    constant = np.full((7, 1), value)
    features, targets = Standardization.of_features(constant), Standardization.of_targets(constant)
    # Whatever else turns up later, nothing is known about it.
    assert (features.apply([[value], [value + 5.0]]) == 0.0).all()
    assert (targets.apply(constant) == 0.0).all()
    assert targets.scale == 1.0


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_squares_out_of_float64s_range_do_not_matter(scale: float) -> None:
    x = np.array([[-1.0], [1.0], [3.0]])
    np.testing.assert_allclose(
        Standardization.of_features(x * scale).apply(x * scale), Standardization.of_features(x).apply(x)
    )


@pytest.mark.parametrize("dtype, unit_roundoff", [("float32", 2.0**-24), ("float64", 2.0**-53)])
@pytest.mark.parametrize("sizes", [(5, 2), (5, 9, 2), (5, 8, 7, 2)])
@pytest.mark.parametrize("with_targets", [False, True])
def test_folded_and_unfolded_agree(
    dtype: str, unit_roundoff: float, sizes: tuple[int, ...], with_targets: bool
) -> None:
    x, y = raw_data(), 50.0 + 9.0 * raw_data(seed=1)[:, :2]
    features, targets = Standardization.of_features(x), Standardization.of_targets(y)
    net = MLP(sizes, loss="squared_error", dtype=dtype, seed=3)
    net.biases[0][...] = 0.5

    expected = net.forward(features.apply(x)).astype(np.float64)
    if with_targets:
        expected = expected * targets.scale + targets.mean
    fold(net, features, targets if with_targets else None)

    # The raw features' own rounding counts in standard deviations: |x|/σ is up to 2000 here.
    worst = (np.abs(x).max(axis=0) / features.scale).max()
    scale = targets.scale.max() if with_targets else 1.0
    bound = 40 * unit_roundoff * (worst * scale + np.abs(expected).max())
    assert np.abs(net.forward(x) - expected).max() < bound
    # A network that was not folded, or half, is far from it.
    assert bound < 1e-2 * np.abs(expected).max()


def test_small_integers_fold_exactly() -> None:
    net = MLP((2, 1), loss="squared_error", seed=0)
    net.weights[0][...], net.biases[0][...] = [[3.0, -8.0]], [5.0]
    fold(
        net,
        Standardization(np.array([4.0, 1.0]), np.array([0.5, 2.0])),
        Standardization(np.array([-7.0]), np.array([2.0])),
    )
    # ŷ = 2 (3 (x₀ − 4)/0.5 − 8 (x₁ − 1)/2 + 5) − 7 = 12 x₀ − 8 x₁ − 37
    assert net.weights[0].tolist() == [[12.0, -8.0]]
    assert net.biases[0].tolist() == [-37.0]


def test_a_large_constant_feature_costs_no_accuracy() -> None:
    x = raw_data()
    x[:, 4] = 1e9
    features = Standardization.of_features(x)
    net = MLP((5, 6, 1), loss="squared_error", seed=0)
    expected = net.forward(features.apply(x))
    fold(net, features)
    np.testing.assert_allclose(net.forward(x), expected, atol=5e-3)


def test_a_part_and_the_inverse() -> None:
    x = raw_data()
    features = Standardization.of_features(x)
    np.testing.assert_array_equal(features.part(slice(1, 3)).apply(x[:, 1:3]), features.apply(x)[:, 1:3])
    np.testing.assert_allclose(features.part(slice(0, 4)).invert(features.apply(x)[:, :4]), x[:, :4], rtol=1e-12)


def test_targets_fold_into_identity_only() -> None:
    net = MLP((5, 2), loss="squared_error", output="tanh", seed=0)
    x = raw_data()
    with pytest.raises(OptionError, match="tanh"):
        fold(net, Standardization.of_features(x), Standardization.of_targets(x[:, :2]))


def test_what_float32_cannot_hold_leaves_the_network_alone() -> None:
    net = MLP((1, 2), seed=0)
    before = net.theta.copy()
    with pytest.raises(DataError, match="1e-42.*float64"):
        fold(net, Standardization(np.array([1.0]), np.array([1e-42])))
    assert (net.theta == before).all()
