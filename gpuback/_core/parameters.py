"""θ and ∇θ as flat buffers, and where each layer lies in them: θ = (W_1, b_1, …, W_L, b_L), each W_k row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

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

    def layer(self, k: int) -> slice:
        """Return the place of layer k's weights and biases in θ, counting from 0."""
        n_in, n_out = self.shapes[k]
        return slice(self.weight_starts[k], self.weight_starts[k] + n_out * (n_in + 1))

    @cached_property
    def _places(self) -> list[tuple[int, int, int, tuple[int, int]]]:
        """Where each layer's weights start, where they end and its biases start, where those end; its W's shape."""
        places = []
        for start, (n_in, n_out) in zip(self.weight_starts, self.shapes, strict=True):
            end = start + n_out * n_in
            places.append((start, end, end + n_out, (n_out, n_in)))
        return places

    def split(self, flat: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Return views of a flat (n_parameters,) array: the weights, each (nO, nI), and the biases, each (nO,).

        An array (B, n_parameters) gives views (B, nO, nI) and (B, nO).
        """
        rows = flat.shape[:-1]
        weights = [flat[..., start:end].reshape(rows + shape) for start, end, _, shape in self._places]
        return tuple(weights), tuple([flat[..., end:after] for _, end, after, _ in self._places])


class ParameterRange(NamedTuple):
    """Neighbouring parameters that an optimizer treats alike; between two ranges, parameters are frozen.

    Attributes:
        start, end: the first one's index in θ, and the index after the last one.
        multiplier: of the learning rate.
        decays: whether the weight decay applies.
    """

    start: int
    end: int
    multiplier: float
    decays: bool


def spans(ranges: Sequence[ParameterRange]) -> list[slice]:
    """Return the parts of θ that the ranges cover; ranges that touch make one part."""
    parts: list[slice] = []
    for part in ranges:
        if parts and parts[-1].stop == part.start:
            parts[-1] = slice(parts[-1].start, part.end)
        else:
            parts.append(slice(part.start, part.end))
    return parts


@dataclass
class Gradients:
    """∂loss/∂θ: for each part of a network, an array of that part's shape.

    Attributes:
        theta: (n_parameters,) the whole gradient, in θ's order and dtype. None, and `weights` and `biases` empty, where
            a call of `MLP.vjp`'s pullback did not ask for it.
        weights, biases: ∇W_k (nO, nI) and ∇b_k (nO,), views into `theta`. They count from 0 as tuples do: weights[0]
            is ∇W_1. `MLP.per_sample_grad` puts an axis of B samples in front of `theta`, `weights` and `biases`.
        inputs: (B, n_0) ∂loss/∂x in θ's dtype, if it was asked for.
        outputs: (B, n_L), the derivative by dy of what `Pullback.vjp` returned, if it was asked for.
        directions: (D, B, n_0), the derivatives by `MLP.taylor`'s directions, if they were asked for.
    """

    theta: Array
    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    inputs: Array | None = None
    outputs: Array | None = None
    directions: Array | None = None

    def _split_by(self, layout: Layout) -> None:
        """Make `weights` and `biases` views into `theta` by this layout, if that has not been done."""
        known = self.__dict__.get("_split")
        if known is not None:
            theta, weights, biases, by = known
            if theta is self.theta and weights is self.weights and biases is self.biases and by is layout:
                return
        self.weights, self.biases = layout.split(self.theta)
        self.__dict__["_split"] = self.theta, self.weights, self.biases, layout

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields for copy and pickle; of parts that are views into `theta`, the layout alone."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        layout = self._layout()
        if layout is not None:
            del state["weights"], state["biases"]
            state["layout"] = layout.sizes
        return state

    def _layout(self) -> Layout | None:
        """Return the layout by which the parts are views into `theta`; None if they are not."""
        if self.theta is None or not self.weights or len(self.weights) != len(self.biases):
            return None
        if min(W.ndim for W in self.weights) < 2:
            return None
        layout = Layout((self.weights[0].shape[-1], *(W.shape[-2] for W in self.weights)))
        if self.theta.shape[-1:] != (layout.n_parameters,):
            return None
        weights, biases = layout.split(self.theta)
        pairs = [*zip(self.weights, weights, strict=True), *zip(self.biases, biases, strict=True)]
        return layout if all(_memory(part) == _memory(view) for part, view in pairs) else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the parts views into `theta` again, of which copies would be arrays of their own."""
        attributes = dict(state)
        sizes = attributes.pop("layout", None)
        self.__dict__.update(attributes)
        if sizes is not None:
            self.weights, self.biases = Layout(sizes).split(self.theta)


def _memory(array: Array) -> tuple[Any, ...]:
    """Say which numbers in memory an array is."""
    interface = getattr(array, "__cuda_array_interface__", None) or array.__array_interface__
    return interface["data"], array.shape, array.strides, array.dtype


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
