"""For tests, gpuback's own and its users': how exact a result must be, gradient checks, data to try things on."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpuback._core.activation_names import activation_named
from gpuback._core.precision import DTYPES, TF32_ROUNDOFF, UNIT_ROUNDOFF, Precision, dtype_name
from gpuback._core.scratch import Scratch
from gpuback._core.typing import Array, ArrayLike
from gpuback._network.gradient_check import BlockCheck as BlockCheck
from gpuback._network.gradient_check import GradientReport as GradientReport
from gpuback._network.gradient_check import check_gradients as check_gradients
from gpuback._network.mlp import MLP, Gradients
from gpuback.errors import DtypeError, OptionError, unknown_name


@np.errstate(all="ignore")
def tolerance(
    magnitude: ArrayLike,
    terms: int,
    dtype: object,
    *,
    exact: ArrayLike = 0.0,
    stored: bool = False,
    allow_tf32: bool = False,
    any_data: bool = False,
) -> NDArray[Any]:
    """Return how far a sum of products may lie from its exact value C.

        |C − exact| ≤ 4 u √K · (|A||B|) + u_out |exact|

    u is 2⁻²⁴, for float64 2⁻⁵³; where the result is stored in 16 bits, u_out is 2⁻⁸ (bfloat16) or 2⁻¹¹ (float16, and
    2⁻²⁵ absolute, its smallest step), else 0. The root holds for terms of mixed signs and for random positive ones,
    whose roundings cancel; for any data whatever the bound is 2 K u (|A||B|). With TF32 each operand may be off by 2⁻¹¹
    of itself.

    Args:
        magnitude: |A||B|, the sum of the terms' absolute values (with |b| if a bias is added), computed in float64 or
            better.
        terms: K, how many terms each sum has.
        dtype: of the operands, exactly as the operation received them.
        exact: the exact result; needed if `stored`.
        stored: the result is stored in the operands' dtype (da_prev and h are; dW and db are float32 or better).
        allow_tf32: the product was allowed to round its operands to TF32.
        any_data: the data are neither random nor of mixed signs.

    Returns:
        The bound, of magnitude's shape and dtype. For random data it is below 2⁻¹¹ of the magnitude up to K = 10⁶, so
        that zeros never pass; but one term of many thousands is smaller than the roundings of the others, and only
        integers, whose sums are exact, show that it was left out. `any_data` is for constant data: beyond K = 10⁵ it
        says little.
    """
    name = dtype_name(dtype)
    magnitude = np.asarray(magnitude)
    u = UNIT_ROUNDOFF["float64" if name == "float64" else "float32"]
    bound = magnitude * ((2 * terms if any_data else 4 * math.sqrt(terms)) * u)
    if allow_tf32:
        bound = bound + magnitude * (2 * TF32_ROUNDOFF + TF32_ROUNDOFF**2)
    if stored and name in ("bfloat16", "float16"):
        bound = bound + np.abs(exact) * UNIT_ROUNDOFF[name] + (2.0**-25 if name == "float16" else 0.0)
    return np.asarray(bound)


def fingerprint(what: MLP | Gradients | Array) -> str:
    """Hash an array's bits, or those of the θ of a network or of gradients; equal fingerprints mean equal bits.

    With `MLP(..., reproducible=True)` a fingerprint that a GPU has produced can be asserted where there is none.

    Args:
        what: a network, gradients, or an array of numbers of any backend. Dtype and shape count too, strides and device
            do not.

    Returns:
        16 hexadecimal digits.

    Raises:
        DtypeError: something else.

    Example:
        >>> fingerprint(MLP([2, 3, 2], seed=0, reproducible=True))
        '89d9ae4245055856'
    """
    array = what.theta if isinstance(what, (MLP, Gradients)) else what
    host = array.get() if type(array).__module__.partition(".")[0] == "cupy" else np.asarray(array)
    if host.dtype.kind not in "biuf" and host.dtype not in DTYPES.values():
        raise DtypeError(f"expected a network, gradients or an array of numbers, got {type(what).__name__}")
    host = host.astype(host.dtype.newbyteorder("<"), order="C", copy=False)
    digest = hashlib.sha256(f"{host.dtype.name} {host.shape} ".encode())
    digest.update(host.tobytes())
    return digest.hexdigest()[:16]


Kind = Literal["mixed", "positive", "constant", "integers"]


@np.errstate(all="ignore")
def random_array(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    kind: Kind = "mixed",
    *,
    scale: float = 1.0,
    dtype: object = "float64",
) -> NDArray[Any]:
    """Make test data; each kind finds different bugs.

    Args:
        rng: NumPy's generator.
        shape: of the result.
        kind: "mixed": normal, of both signs. "positive": uniform on (0, 1]. "constant": all one number. "integers": −3
            … 3, whose products and sums are exact in every dtype as long as they stay below 2²⁴; `scale` does not
            apply.
        scale: a factor.
        dtype: of the result; the values are rounded to it.
    """
    if kind == "mixed":
        values = rng.standard_normal(shape) * scale
    elif kind == "positive":
        values = (1.0 - rng.random(shape)) * scale
    elif kind == "constant":
        values = np.full(shape, rng.uniform(0.5, 1.0) * scale)
    elif kind == "integers":
        values = rng.integers(-3, 4, shape).astype(np.float64)
    else:
        raise unknown_name("kind of data", kind, ("mixed", "positive", "constant", "integers"))
    return values.astype(Precision.of(dtype).operand)


@dataclass(frozen=True)
class LayerCase:
    """Operands of one layer's backward pass that belong together: h_prev = g(a_prev)."""

    da: NDArray[Any]
    h_prev: NDArray[Any]
    a_prev: NDArray[Any]
    W: NDArray[Any]


@np.errstate(all="ignore")
def random_layer(
    rng: np.random.Generator,
    batch_size: int,
    n_out: int,
    n_in: int,
    *,
    activation_prev: str = "identity",
    kind: Kind = "mixed",
    scale: float = 1.0,
    dtype: object = "float32",
) -> LayerCase:
    """Operands for `fused_backward`: da (B, nO) and W (nO, nI) times `scale`, a_prev (B, nI) of order 1."""
    da = random_array(rng, (batch_size, n_out), kind, scale=scale, dtype=dtype)
    W = random_array(rng, (n_out, n_in), kind, scale=scale, dtype=dtype)
    a_prev = random_array(rng, (batch_size, n_in), kind, dtype=dtype)
    a, h = a_prev.astype(np.float64), np.empty((batch_size, n_in))
    activation_named(activation_prev).forward(a, h, Scratch(h))
    return LayerCase(da, h.astype(da.dtype), a_prev, W)


@np.errstate(all="ignore")
def random_batch(net: MLP, batch_size: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """x (B, n_0) and targets y that fit the network's loss.

    Raises:
        OptionError: the loss is a function, and what targets it reads only its author knows.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    x = rng.standard_normal((batch_size, net.sizes[0]))
    kind = net.architecture.loss_row.targets
    if kind == "own":
        raise OptionError(
            f"random targets: expected one of gpuback's losses, got the function {net.architecture.loss!r}; make a "
            "batch that it can read"
        )
    if kind == "classes":
        return x, rng.integers(net.sizes[-1], size=batch_size)
    shape = (batch_size, net.sizes[-1])
    if kind == "counts":
        return x, rng.integers(4, size=shape).astype(np.float64)
    return x, rng.random(shape) if kind == "probabilities" else rng.standard_normal(shape)
