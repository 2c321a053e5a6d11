"""What a narrow network's step must give, and how far off it may be: for a launch whose inside is never seen.

The network is computed in float64, without a rounding but those of x and W. Beside each number goes a spread, the
standard deviation of what roundings make of it: what each operation adds by the contract (docs/numerics.md), and what
it passes on from its operands. Roundings are independent, so spreads add as squares; bounds that add up instead grow
tenfold with each layer of 64, and let everything pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuback._core.architecture import Architecture
from gpuback._core.precision import TF32_ROUNDOFF, UNIT_ROUNDOFF
from gpuback.testing import tolerance
from support.oracle import (
    FROM_A,
    SLOPE,
    G,
    exponent_roundings,
    loss_gradient,
    outputs,
    rows_of,
    sample_losses,
    to_tf32,
)

SURE = 12.0
"""Spreads that no number is off by: an early error may meet weights that carry all of it on. The spread of one
operation is its bound in the contract over this."""

TOGETHER = 2.0
"""Spreads that many numbers together are not off by: samples that are much alike share their roundings."""

U = UNIT_ROUNDOFF["float32"]
FEW = 16 * U / SURE
"""Spread of an elementary function and what little surrounds it, in parts of the largest number on the way."""

Numbers = NDArray[np.float64]


class Near(NamedTuple):
    """A number, and the spread of what comes in its place."""

    value: Numbers
    spread: Numbers

    def plus(self, *spreads: Numbers | float) -> Near:
        """The same number, off by more."""
        return Near(self.value, np.sqrt(sum((np.square(s) for s in spreads), np.square(self.spread))))

    def times(self, exact: Numbers | float) -> Near:
        return Near(self.value * exact, self.spread * np.abs(exact))

    @property
    def T(self) -> Near:
        return Near(self.value.T, self.spread.T)


def exactly(value: Numbers) -> Near:
    return Near(value, np.zeros_like(value))


def through(function: Callable[[Numbers], Numbers], x: Near) -> Near:
    """function(x): off by what it makes of numbers two spreads away, or as far away as x may be. Across a kink of a
    derivative that is the whole jump."""
    value, spread = function(x.value), np.zeros_like(x.value)
    for steps, share in ((2.0, 2.0), (SURE, SURE)):
        for sign in (1, -1):
            off = np.abs(function(x.value + sign * steps * x.spread) - value)
            spread = np.maximum(spread, off / share)
    return Near(value, spread)


def through_rows(function: Callable[[Numbers], Numbers], x: Near) -> Near:
    """The same where a number of a row depends on all of the row."""
    value, signs, tries = function(x.value), np.random.default_rng(0), 16
    off = [function(x.value + x.spread * signs.choice([-1.0, 1.0], x.value.shape)) - value for _ in range(tries)]
    return Near(value, np.sqrt(np.mean(np.square(off), axis=0)))


def product(a: Near, b: Near, *, plus: Numbers | float = 0.0) -> Near:
    """a b + an exact number."""
    magnitude = np.abs(a.value) @ np.abs(b.value) + np.abs(plus)
    squares = [np.square(part) for part in (a.value, a.spread, b.value, b.spread)]
    passed_on = np.sqrt(squares[0] @ squares[3] + squares[1] @ squares[2] + squares[1] @ squares[3])
    return Near(a.value @ b.value + plus, passed_on).plus(tolerance(magnitude, a.value.shape[1] + 1, "float32") / SURE)


class Expected(NamedTuple):
    """What a step must give. `rows`: of each layer da_k and h_{k-1}, exact."""

    outputs: Numbers
    loss: Near
    gradient: Near
    inputs: Near
    rows: list[tuple[Numbers, Numbers]]


class Oracle:
    """The passes of an architecture, with its precision's roundings."""

    def __init__(self, architecture: Architecture, batch_size: int) -> None:
        self.architecture, self.batch_size, self.precision = architecture, batch_size, architecture.precision
        self.scale = self.precision.gradient_scale(batch_size)

    def operand(self, x: NDArray) -> Near:
        """Given numbers as a product reads them."""
        stored = x.astype(np.float32).astype(self.precision.operand).astype(np.float64)
        return exactly(to_tf32(stored) if self.precision.tf32 else stored)

    def stored(self, x: Near, scale: float = 1.0) -> Near:
        """Computed numbers as an operand."""
        if not self.precision.sixteen_bit:
            return x
        smallest = 2.0**-25 / scale if self.precision.name == "float16" else 0.0
        smallest = np.minimum(smallest, np.abs(x.value) + x.spread)  # what is 0 stays it
        return x.plus(np.abs(x.value) * UNIT_ROUNDOFF[self.precision.name] / math.sqrt(3), smallest / math.sqrt(3))

    def read(self, x: Near) -> Near:
        """A computed operand as a product reads it."""
        return x.plus(np.abs(x.value) * TF32_ROUNDOFF / math.sqrt(3)) if self.precision.tf32 else x

    def activated(self, name: str, a: Near) -> tuple[Near, Near]:
        """h, and what g' is computed from."""
        a = self.stored(a) if name in FROM_A else a
        h = through(G[name], a)
        few = FEW * (1 + exponent_roundings(name, a.value))
        h = self.stored(h if name in ("identity", "relu") else h.plus(few * np.abs(h.value)))
        return h, a if name in FROM_A else h

    def sloped(self, name: str, dh: Near, source: Near) -> Near:
        """dh g'."""
        slope = through(SLOPE[name], source)
        few = 0.0 if name in ("identity", "relu") else (8 * FEW if name in FROM_A else FEW)
        passed_on = np.hypot(dh.spread * slope.value, dh.value * slope.spread)
        return Near(dh.value * slope.value, passed_on).plus(few * np.abs(dh.value) * np.maximum(np.abs(slope.value), 1))

    def step(self, theta: NDArray, x: NDArray, y: NDArray, sample_weight: NDArray | None = None) -> Expected:
        architecture, B = self.architecture, self.batch_size
        weights, biases = architecture.layout.split(theta.astype(np.float64))
        W = [self.operand(weight) for weight in weights]
        stored = x.astype(np.float32).astype(self.precision.operand).astype(np.float64)
        h, sources = [exactly(stored)], [exactly(stored)]
        for k, b in enumerate(biases):
            inputs = self.operand(x) if k == 0 else self.read(h[k])
            a = product(inputs, W[k].T, plus=b)
            if k < len(architecture.activations):
                after, source = self.activated(architecture.activations[k], a)
                h.append(after)
                sources.append(source)

        w = (np.ones(B) if sample_weight is None else sample_weight.astype(np.float32).astype(np.float64))[:, None]
        loss, da = self._loss(a, rows_of(y.astype(np.float32) if y.dtype.kind == "f" else y, a.value), w)
        gradient, rows = [], []
        for k in range(len(W) - 1, -1, -1):
            rows.insert(0, (da.value, h[k].value))
            read_da, read_h = self.read(da), self.operand(x) if k == 0 else self.read(h[k])
            db = product(exactly(np.ones((1, B))), da)
            dW = product(read_da.T, read_h)
            gradient[:0] = [Near(part.value.ravel(), part.spread.ravel()) for part in (dW, db)]
            dh = product(read_da, W[k])
            if k:
                da = self.stored(self.sloped(architecture.activations[k - 1], dh, sources[k]), self.scale)
        joined = Near(*(np.concatenate(parts) for parts in zip(*gradient, strict=True)))
        return Expected(outputs(architecture.output, a.value), loss, joined, dh, rows)

    def _loss(self, a: Near, y: Numbers, w: Numbers) -> tuple[Near, Near]:
        """The mean loss, and da_L."""
        names = self.architecture.loss, self.architecture.output
        losses = through_rows(lambda a: sample_losses(*names, a, y)[:, None], a).times(w)
        size = 1 + np.abs(a.value).max(axis=1, keepdims=True) + np.abs(y)
        mass = np.ones_like(y) if names[0] != "cross_entropy" else y
        own = np.abs(w) * (size * (1 + mass)).sum(axis=1, keepdims=True)
        losses = losses.plus(FEW * (own if names[0] != "squared_error" else 4 * np.abs(losses.value) + U))
        mean = product(exactly(np.full((1, self.batch_size), 1 / self.batch_size)), losses)
        predicted = outputs(names[1], a.value)
        da = through_rows(lambda a: loss_gradient(*names, a, y), a)
        few = FEW * (np.abs(predicted) * (1 + np.abs(y).sum(axis=1, keepdims=True)) + np.abs(y))
        if names[1] == "softmax":
            few = few * size.max(axis=1, keepdims=True)
        da = da.plus(few).times(w / self.batch_size)
        mean = Near(mean.value.reshape(()), mean.spread.reshape(())).plus(U * np.abs(mean.value.reshape(())))
        return mean, self.stored(da, self.scale)


def hold(name: str, result: NDArray, expected: Near) -> None:
    """Each number within what it may be off by, and all together off by no more than their spreads say: a row that was
    left out moves each a little. Bounds that zeros would pass are refused."""
    assert result.shape == expected.value.shape, name
    off = np.abs(result.astype(np.float64) - expected.value)
    ratio = off / np.maximum(expected.spread, 1e-300)
    assert np.all(ratio <= SURE), f"{name} is off by {ratio.max() / SURE:.3g} times its limit"
    limit = root_mean_square(expected.spread) * (TOGETHER + (SURE - TOGETHER) / math.sqrt(off.size))
    together = root_mean_square(off)
    assert together <= limit, f"{name}: all numbers together are off by {together / limit:.3g} times their limit"
    if off.size >= 8 and expected.value.any():
        assert root_mean_square(expected.value) > limit, f"{name}: zeros would pass"


def root_mean_square(x: Numbers) -> float:
    return math.sqrt(np.mean(np.square(x)))
