"""θ and ∇θ as flat buffers, and where each layer lies in them: θ = (W_1, b_1, …, W_L, b_L), each W_k row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback._core.activation_names import activation_named
from gpuback._core.activations import Siren
from gpuback._core.typing import Array
from gpuback.errors import OptionError


@dataclass(frozen=True)
class Layout:
    """The positions of each layer's weights and biases in θ, for layers of widths n_0, …, n_L."""

    sizes: tuple[int, ...]

    @cached_property
    def n_parameters(self) -> int:
        """Σ_k n_k (n_{k−1} + 1)."""
        return sum(n_out * (n_in + 1) for n_in, n_out in self.shapes)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(nI, nO) of each layer."""
        return list(zip(self.sizes[:-1], self.sizes[1:], strict=True))

    @cached_property
    def weight_starts(self) -> list[int]:
        """The index in θ of each layer's first weight."""
        starts = [0]
        for n_in, n_out in self.shapes[:-1]:
            starts.append(starts[-1] + n_out * (n_in + 1))
        return starts

    def split(self, flat: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Return views of a flat (n_parameters,) array: the weights, each (nO, nI), and the biases, each (nO,).

        An array (B, n_parameters) gives views (B, nO, nI) and (B, nO).
        """
        weights, biases = [], []
        for start, (n_in, n_out) in zip(self.weight_starts, self.shapes, strict=True):
            end = start + n_out * n_in
            weights.append(flat[..., start:end].reshape(*flat.shape[:-1], n_out, n_in))
            biases.append(flat[..., end : end + n_out])
        return tuple(weights), tuple(biases)


@dataclass
class Gradients:
    """∂loss/∂θ: for each part of a network, an array of that part's shape.

    Attributes:
        theta: (n_parameters,) the whole gradient, in θ's order and dtype.
        weights, biases: ∇W_k (nO, nI) and ∇b_k (nO,), views into `theta`. They count from 0 as tuples do: weights[0]
            is ∇W_1. `MLP.per_sample_grad` puts an axis of B samples in front of `theta`, `weights` and `biases`.
        inputs: (B, n_0) ∂loss/∂x in θ's dtype, if it was asked for.
    """

    theta: Array
    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    inputs: Array | None = None


def initial_parameters(layout: Layout, activations: Sequence[str], seed: int | None) -> NDArray[np.float64]:
    """Draw θ before training: weights uniform on ±limit, biases 0.

    limit = √(6/nI) for rectifiers (He et al., 2015), √(6/(nI + nO)) for the rest (Glorot and Bengio, 2010), by the
    activation that follows the layer; `Siren` says what it is in networks of sine(w0=…). The numbers are PCG64's raw
    64-bit output, whose top 53 bits are a multiple of 2⁻⁵³ in [0, 1). NumPy keeps that stream stable, but not
    `Generator`'s use of it. So a seed means the same θ on every backend and NumPy version.

    Args:
        layout: the shapes.
        activations: the name of the function after each layer, the output function's last ("softmax" counts as
            identity).
        seed: an integer ≥ 0, or None for one from the operating system.

    Returns:
        (n_parameters,) float64.

    Raises:
        OptionError: any other seed.
    """
    if seed is not None and (not isinstance(seed, (int, np.integer)) or seed < 0):
        raise OptionError(f"seed: expected an integer ≥ 0 or None, got {seed!r}")
    bits = np.random.PCG64(seed)
    theta = np.zeros(layout.n_parameters)
    weights, _ = layout.split(theta)
    initialisations = ["glorot" if name == "softmax" else activation_named(name).initialisation for name in activations]
    if len(initialisations) > 1 and isinstance(initialisations[-2], Siren):
        initialisations[-1] = initialisations[-2]
    for k, ((n_in, n_out), weight) in enumerate(zip(layout.shapes, weights, strict=True)):
        initialisation = initialisations[k]
        if isinstance(initialisation, Siren):
            limit = 1.0 / n_in if k == 0 else math.sqrt(6.0 / n_in) / initialisation.frequency
        else:
            limit = math.sqrt(6.0 / n_in) if initialisation == "he" else math.sqrt(6.0 / (n_in + n_out))
        weight[...] = limit * (2.0 * uniform(bits, n_in * n_out) - 1.0).reshape(n_out, n_in)
    return theta


def uniform(bits: np.random.PCG64, count: int) -> NDArray[np.float64]:
    """Draw `count` numbers on [0, 1), from the top 53 bits of PCG64's raw output."""
    raw: NDArray[np.uint64] = bits.random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(length: int, *key: int) -> NDArray[np.intp]:
    """Shuffle 0, …, length − 1 by the key alone: into the order of PCG64's raw numbers, ties by position."""
    raw: Any = np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(raw, kind="stable")
