"""Standardize data, in float64, and fold the scaling into a network, so that it takes raw features.

Sums are exact, so the bits do not depend on the BLAS or on the order of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuback._core.exact_sums import exact_sum
from gpuback._core.typing import Array
from gpuback._network.mlp import MLP
from gpuback.errors import DataError, OptionError


@dataclass(frozen=True, eq=False)  # a comparison of arrays has no single truth value
class Standardization:
    """z = (v − μ)/σ, column by column.

    Attributes:
        mean: (n,) μ, float64.
        scale: (n,) σ > 0, float64.
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def of_features(cls, x: Array) -> Standardization:
        """Measure the mean and standard deviation of each column of x (N, n).

        A constant column gets σ = ∞: it is 0 in training and multiplied by 0 afterwards. With σ = 1 its weights, which
        training never changes, would act on any other value that comes later. A large value (a year, an identifier)
        would cancel against the bias and leave its rounding error.
        """
        return cls._of(x, np.inf)

    @classmethod
    def of_targets(cls, y: Array) -> Standardization:
        """Measure the mean and standard deviation of each column of y (N, n); σ = 1 where a column never varies."""
        return cls._of(y, 1.0)

    @classmethod
    @np.errstate(all="ignore")
    def _of(cls, values: Array, constant_scale: float) -> Standardization:
        lowest, highest = (extreme(values, axis=0).astype(np.float64) for extreme in (np.min, np.max))
        constant = lowest == highest
        # The mean of equal numbers may miss them by a rounding.
        mean = np.where(constant, lowest, _column_sums(values) / len(values))
        # Relative to the largest deviation, no square overflows or vanishes.
        largest = np.where(constant, 1.0, np.maximum(highest - mean, mean - lowest))
        deviations = cls(mean, largest).apply(values)
        spread = largest * np.sqrt(_column_sums(np.square(deviations, out=deviations)) / len(values))
        return cls(mean, np.where(constant, constant_scale, spread))

    @np.errstate(all="ignore")
    def apply(self, values: Array) -> NDArray[np.float64]:
        """Z = (values − μ)/σ, (N, n) float64."""
        z: NDArray[np.float64] = np.subtract(values, self.mean)
        z /= self.scale
        return z

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed."""
        return not self.mean.any() and bool((self.scale == 1).all())

    @np.errstate(all="ignore")
    def invert(self, z: Array) -> NDArray[np.float64]:
        """σ z + μ, (N, n) float64."""
        values: NDArray[np.float64] = np.multiply(z, self.scale)
        values += self.mean
        return values

    def part(self, columns: slice) -> Standardization:
        """Return the standardization of some of the columns."""
        return Standardization(self.mean[columns], self.scale[columns])


def _column_sums(values: Array) -> NDArray[np.float64]:
    """Σ_i v_ij, (n,), each rounded once."""
    return np.array([exact_sum(column.astype(np.float64)) for column in values.T])


def fold(net: MLP, features: Standardization, targets: Standardization | None = None) -> None:
    """Turn a network of standardized features (and targets) into the same function of raw ones, in place.

        first layer   W ← W/σ,     b ← b − W μ/σ
        last layer    W ← σ_y W,   b ← σ_y b + μ_y       if the targets were standardized

    Computed in float64. W is rounded to θ's dtype before b is computed, so that b makes up for what the rounding did
    to W μ.

    Raises:
        OptionError: targets with an output function other than identity, behind which nothing linear can be put.
        DataError: a result is beyond the range of θ's dtype; the network is as it was.
    """
    if targets is not None and net.architecture.output != "identity":
        raise OptionError(
            f"expected output 'identity' to fold standardized targets into, got {net.architecture.output!r}"
        )
    theta = net.ops.to_numpy(net.theta).copy()
    weights, biases = net.architecture.layout.split(theta)
    with np.errstate(all="ignore"):
        weights[0][...] = weights[0] / features.scale
        biases[0][...] -= _column_sums((weights[0] * features.mean).T)
        if targets is not None:
            weights[-1][...] = weights[-1] * targets.scale[:, None]
            biases[-1][...] = biases[-1] * targets.scale + targets.mean
    if not np.isfinite(theta).all():
        raise DataError(
            f"standard deviations from {features.scale.min():.3g} up cannot be folded into {theta.dtype} weights; use"
            " dtype float64"
        )
    net.theta = theta
