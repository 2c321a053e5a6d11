"""The table of activation functions: for each name g, g', the array that g' is computed from, and the kernels' id.

Every function works on whole arrays that its caller owns and allocates nothing, so a training step can run it again and
again on the same buffers. `forward(a, h, scratch)` writes h = g(a); `backward(dh, source, scratch)` turns dh = ∂loss/∂h
into da = dh ⊙ g'(a) in place, where `source` is h, or a where h does not determine g' (gelu, silu). `scratch` has the
same shape. Where g' comes from h, `h` and `a` may be the same array.

At a kink g' is the derivative from the left: relu'(0) = 0, leaky_relu'(0) = 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gpuback._core.expressions import CudaForms
from gpuback._core.scratch import Scratch
from gpuback._core.typing import Array

LEAKY_SLOPE = 0.01
GELU_SCALE = 2.0 * math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715

ZERO = np.zeros((), np.float32)
"""0 as a 0-d array: ufuncs start faster on it than on a Python number."""

SATURATED = 1e4
"""Beyond this |a| the sigmoid in gelu and silu is 0 or 1 in every dtype. a is clipped before the product, as it
may be infinite, and ∞ · 0 is NaN."""


@dataclass(frozen=True, slots=True)
class Siren:
    """Initial weights of sine networks: uniform on ±1/nI in the first layer, ±√(6/nI)/frequency in all others.

    They also hold for an output layer behind such an activation.

    Attributes:
        frequency: w0 of sin(w0 a).

    Source: Sitzmann et al., Implicit neural representations with periodic activation functions, 2020.
    """

    frequency: float


@dataclass(frozen=True, slots=True)
class Activation:
    """One row of the table.

    Attributes:
        name: what users write.
        kernel_id: the number by which CUDA kernels know it: below 32 with g' from h, from 32 to 63 with g' from a. None
            without a case in the kernels: then they are compiled with its forms, or refuse it by name.
        derivative_from: the array that g' is computed from: "h" = g(a), or "a".
        initialisation: the uniform initialisation that suits it: "he" for rectifiers, "glorot" for the rest, or a
            `Siren`.
        forward: (a, h, scratch) → None, h = g(a).
        backward: (dh, source, scratch) → None, dh ← dh ⊙ g'(a).
        kinks: where g' or g'' jumps, in ascending order: finite differences across such an a mean little.
        forms: g and g' as expressions, for an activation without a kernel_id.
    """

    name: str
    kernel_id: int | None
    derivative_from: Literal["h", "a"]
    initialisation: Literal["he", "glorot"] | Siren
    forward: Callable[[Array, Array, Scratch], None]
    backward: Callable[[Array, Array, Scratch], None]
    kinks: tuple[float, ...] = ()
    forms: CudaForms | None = None


def identity(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a."""
    if h is not a:
        np.copyto(h, a)


def identity_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = 1."""


def relu(a: Array, h: Array, scratch: Scratch) -> None:
    """h = max(a, 0)."""
    np.maximum(a, scratch.zeros, out=h)


def relu_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = 1 where h > 0, else 0."""
    np.greater(h, ZERO, out=scratch.mask)
    np.multiply(dh, scratch.mask, out=dh)


def leaky_relu(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a where a > 0, else 0.01 a."""
    np.multiply(a, LEAKY_SLOPE, out=scratch.a)
    np.maximum(a, scratch.a, out=h)


def leaky_relu_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = 1 where h > 0, else 0.01."""
    slope = scratch.a
    np.greater(h, 0, out=slope)
    np.maximum(slope, LEAKY_SLOPE, out=slope)
    np.multiply(dh, slope, out=dh)


def elu(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a where a > 0, else e^a − 1."""
    below = scratch.a
    np.minimum(a, scratch.zeros, out=below)
    np.expm1(below, out=below)
    np.maximum(a, scratch.zeros, out=h)
    np.add(h, below, out=h)


def elu_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = 1 where h > 0, else h + 1 = e^a."""
    slope = scratch.a
    np.minimum(h, scratch.zeros, out=slope)
    np.add(slope, 1, out=slope)
    np.multiply(dh, slope, out=dh)


def sigmoid(a: Array, h: Array, scratch: Scratch) -> None:
    """h = 1/(1 + e^−a), as e^min(a,0) / (1 + e^−|a|), which neither overflows nor cancels."""
    denominator = scratch.a
    np.abs(a, out=denominator)
    np.negative(denominator, out=denominator)
    np.exp(denominator, out=denominator)
    np.add(denominator, 1, out=denominator)
    np.minimum(a, scratch.zeros, out=h)
    np.exp(h, out=h)
    np.divide(h, denominator, out=h)


def sigmoid_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = h (1 − h)."""
    slope = scratch.a
    np.subtract(1, h, out=slope)
    np.multiply(slope, h, out=slope)
    np.multiply(dh, slope, out=dh)


def tanh(a: Array, h: Array, scratch: Scratch) -> None:
    """h = tanh(a)."""
    np.tanh(a, out=h)


def tanh_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = 1 − h²."""
    slope = scratch.a
    np.multiply(h, h, out=slope)
    np.subtract(1, slope, out=slope)
    np.multiply(dh, slope, out=dh)


def softplus(a: Array, h: Array, scratch: Scratch) -> None:
    """h = log(1 + e^a), as max(a, 0) + log1p(e^−|a|), which neither overflows nor cancels."""
    tail = scratch.a
    np.abs(a, out=tail)
    np.negative(tail, out=tail)
    np.exp(tail, out=tail)
    np.log1p(tail, out=tail)
    np.maximum(a, scratch.zeros, out=h)
    np.add(h, tail, out=h)


def softplus_backward(dh: Array, h: Array, scratch: Scratch) -> None:
    """g' = sigmoid(a) = 1 − e^−h = −expm1(−h)."""
    slope = scratch.a
    np.negative(h, out=slope)
    np.expm1(slope, out=slope)
    np.negative(slope, out=slope)
    np.multiply(dh, slope, out=dh)


def gelu(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a·sigmoid(2√(2/π)(a + 0.044715 a³)): the tanh form of gelu, written so that it does not cancel for a ≪ 0."""
    _gelu_argument(a, h)
    sigmoid(h, h, scratch)
    _times_a(a, h, scratch)


def gelu_backward(dh: Array, a: Array, scratch: Scratch) -> None:
    """g' = s (1 + a u' (1 − s)), with s = sigmoid(u), u = 2√(2/π)(a + 0.044715 a³), u' = 2√(2/π)(1 + 3·0.044715 a²).

    1 − s is sigmoid(−u), whose rounding error stays small beside it when a u' multiplies it.
    """
    slope, s = scratch.a, scratch.b
    _gelu_argument(a, s)
    sigmoid(s, s, scratch)
    np.multiply(dh, s, out=dh)
    _gelu_argument(a, s)
    np.negative(s, out=s)
    sigmoid(s, s, scratch)
    np.clip(a, -SATURATED, SATURATED, out=slope)
    np.multiply(s, slope, out=s)
    np.multiply(slope, slope, out=slope)
    np.multiply(slope, 3 * GELU_CUBIC * GELU_SCALE, out=slope)
    np.add(slope, GELU_SCALE, out=slope)
    np.multiply(slope, s, out=slope)
    np.add(slope, 1, out=slope)
    np.multiply(dh, slope, out=dh)


def _gelu_argument(a: Array, out: Array) -> None:
    """out = 2√(2/π)(a + 0.044715 a³) = 2√(2/π) a (1 + 0.044715 a²)."""
    np.multiply(a, a, out=out)
    np.multiply(out, GELU_CUBIC, out=out)
    np.add(out, 1, out=out)
    np.multiply(out, a, out=out)
    np.multiply(out, GELU_SCALE, out=out)


def silu(a: Array, h: Array, scratch: Scratch) -> None:
    """h = a·sigmoid(a)."""
    sigmoid(a, h, scratch)
    _times_a(a, h, scratch)


def silu_backward(dh: Array, a: Array, scratch: Scratch) -> None:
    """g' = s (1 + a (1 − s)), with s = sigmoid(a) and 1 − s = sigmoid(−a)."""
    slope, s = scratch.a, scratch.b
    sigmoid(a, s, scratch)
    np.multiply(dh, s, out=dh)
    np.negative(a, out=s)
    sigmoid(s, s, scratch)
    np.clip(a, -SATURATED, SATURATED, out=slope)
    np.multiply(slope, s, out=slope)
    np.add(slope, 1, out=slope)
    np.multiply(dh, slope, out=dh)


def _times_a(a: Array, h: Array, scratch: Scratch) -> None:
    """h ← h·a where h is the sigmoid that goes to 0 faster than a to −∞."""
    np.maximum(a, -SATURATED, out=scratch.a)
    np.multiply(h, scratch.a, out=h)


ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("identity", 0, "h", "glorot", identity, identity_backward),
        Activation("relu", 1, "h", "he", relu, relu_backward, kinks=(0.0,)),
        Activation("leaky_relu", 2, "h", "he", leaky_relu, leaky_relu_backward, kinks=(0.0,)),
        Activation("elu", 3, "h", "he", elu, elu_backward, kinks=(0.0,)),
        Activation("sigmoid", 4, "h", "glorot", sigmoid, sigmoid_backward),
        Activation("tanh", 5, "h", "glorot", tanh, tanh_backward),
        Activation("softplus", 6, "h", "he", softplus, softplus_backward),
        Activation("gelu", 32, "a", "he", gelu, gelu_backward),
        Activation("silu", 33, "a", "he", silu, silu_backward),
    )
}
