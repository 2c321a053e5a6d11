"""The table of activation functions: for each name g, g', the array that g' is computed from, and the kernels' id.

Every function works on whole arrays that its caller owns and allocates nothing, so a training step can run it again and
again on the same buffers. `forward(a, h, scratch)` writes h = g(a); `backward(dh, source, scratch)` turns dh = ∂loss/∂h
into da = dh ⊙ g'(a) in place, where `source` is h, or a where h does not determine g' (gelu, silu, …). `scratch` has
the same shape. Where g' comes from h, `h` and `a` may be the same array.

At a kink g' is the derivative from the left where g bends at 0: relu'(0) = 0, leaky_relu'(0) = 0.01. Where g stops
growing it is 0, and hard_swish'(3) = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from gpuback._core import activations_from_a as from_a
from gpuback._core import activations_from_h as from_h
from gpuback._core import activations_piecewise as piecewise
from gpuback._core import multipliers
from gpuback._core.expressions import CudaForms
from gpuback._core.multipliers import Multipliers, curved, straight
from gpuback._core.scratch import Scratch
from gpuback._core.typing import Array


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
        kinks: every a where g' or g'' jumps: finite differences across it mean little.
        forms: g and g' as expressions, for an activation without a kernel_id.
        multipliers: what derivatives of derivatives need. Only rows that are yet to be completed have none.
    """

    name: str
    kernel_id: int | None
    derivative_from: Literal["h", "a"]
    initialisation: Literal["he", "glorot"] | Siren
    forward: Callable[[Array, Array, Scratch], None]
    backward: Callable[[Array, Array, Scratch], None]
    kinks: tuple[float, ...] = ()
    forms: CudaForms | None = None
    multipliers: Multipliers | None = None


_CURVES: dict[str, tuple[Callable[..., None], int]] = {
    "elu": (multipliers.elu, 2),
    "sigmoid": (multipliers.sigmoid, 3),
    "tanh": (multipliers.tanh, 3),
    "softplus": (multipliers.softplus, 3),
    "exponential": (multipliers.exponential, 2),
    "squareplus": (multipliers.squareplus, 3),
    "selu": (multipliers.elu, 2),
    "softsign": (multipliers.softsign, 3),
    "log_sigmoid": (multipliers.log_sigmoid, 3),
    "gelu_erf": (multipliers.gelu_erf, 3),
    "sine": (multipliers.sine, 3),
    "hard_swish": (multipliers.hard_swish, 2),
}
"""What computes m₂ and m₃ beside `backward`, and `Multipliers.not_zero`. Others are straight, or in `_WHOLE`."""

_WHOLE = {"gelu": multipliers.gelu, "silu": multipliers.silu, "mish": multipliers.mish}
"""What computes m₁ too, with the same exponential."""


def _with_multipliers(row: Activation) -> Activation:
    if row.name in _WHOLE:
        return replace(row, multipliers=Multipliers(_WHOLE[row.name], 3))
    made = curved(row.backward, *_CURVES[row.name]) if row.name in _CURVES else straight(row.backward)
    return replace(row, multipliers=made)


ACTIVATIONS: dict[str, Activation] = {
    row.name: _with_multipliers(row)
    for row in (
        Activation("identity", 0, "h", "glorot", piecewise.identity, piecewise.identity_backward),
        Activation("relu", 1, "h", "he", piecewise.relu, piecewise.relu_backward, kinks=(0,)),
        Activation("leaky_relu", 2, "h", "he", piecewise.leaky_relu, piecewise.leaky_relu_backward, kinks=(0,)),
        Activation("elu", 3, "h", "he", from_h.elu, from_h.elu_backward, kinks=(0,)),
        Activation("sigmoid", 4, "h", "glorot", from_h.sigmoid, from_h.sigmoid_backward),
        Activation("tanh", 5, "h", "glorot", from_h.tanh, from_h.tanh_backward),
        Activation("softplus", 6, "h", "he", from_h.softplus, from_h.softplus_backward),
        Activation("exponential", 7, "h", "glorot", from_h.exponential, from_h.exponential_backward),
        Activation("squareplus", 8, "h", "he", from_h.squareplus, from_h.squareplus_backward),
        Activation("selu", 9, "h", "he", from_h.selu, from_h.selu_backward, kinks=(0,)),
        Activation("softsign", 10, "h", "glorot", from_h.softsign, from_h.softsign_backward, kinks=(0,)),
        Activation("log_sigmoid", 11, "h", "glorot", from_h.log_sigmoid, from_h.log_sigmoid_backward),
        Activation("hard_tanh", 12, "h", "glorot", piecewise.hard_tanh, piecewise.hard_tanh_backward, kinks=(-1, 1)),
        Activation("relu6", 13, "h", "he", piecewise.relu6, piecewise.relu6_backward, kinks=(0, 6)),
        Activation(
            *("hard_sigmoid", 14, "h", "glorot", piecewise.hard_sigmoid, piecewise.hard_sigmoid_backward),
            kinks=(-3, 3),
        ),
        Activation("gelu", 32, "a", "he", from_a.gelu, from_a.gelu_backward),
        Activation("silu", 33, "a", "he", from_a.silu, from_a.silu_backward),
        Activation("gelu_erf", 34, "a", "he", from_a.gelu_erf, from_a.gelu_erf_backward),
        Activation("sine", 35, "a", "he", from_a.sine, from_a.sine_backward),
        Activation("mish", 36, "a", "he", from_a.mish, from_a.mish_backward),
        Activation("hard_swish", 37, "a", "he", piecewise.hard_swish, piecewise.hard_swish_backward, kinks=(-3, 3)),
    )
}
