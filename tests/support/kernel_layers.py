"""One layer's passes as kernels run them in the emulator, and what the float64 oracle says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from emulator import EmulatorLauncher, GuardedNumpy
from numpy.typing import NDArray

from gpuback._backends.cuda.ops import CudaOps
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.precision import Precision
from gpuback._cuda.launch import DeviceLimits
from gpuback.testing import LayerCase, random_layer, tolerance
from support.oracle import FROM_A, SLOPE

H200 = DeviceLimits((9, 0), 232448, 132)
HOPPER = replace(H200, wgmma=True)
A100 = DeviceLimits((8, 0), 166912, 108)
A10 = DeviceLimits((8, 6), 101376, 72)

EXACT_SOURCES = ("exact/split_operands.cu", "exact/combine_products.cu", "exact/exact_losses.cu", "exact/exact_sums.cu")
"""Only reproducible networks ask for their kernels."""

PRECISIONS = {
    name: Precision.of(name.replace("tf32", "float32"), allow_tf32=name == "tf32")
    for name in ("float64", "float32", "tf32", "bfloat16", "float16")
}


class Gradients(NamedTuple):
    """What `backward` computes."""

    dW: NDArray
    db: NDArray
    da_prev: NDArray | None

    def bits(self) -> tuple[bytes, ...]:
        return tuple(array.tobytes() for array in self if array is not None)


def laid_out(array: NDArray, layout: str) -> NDArray:
    """A copy that ends at memory nobody may touch.

    Its rows are "padded" to 16 bytes, as a network keeps them; lie "tight" behind each other; or are "odd": they begin
    at an odd element and are an odd number of elements apart.
    """
    xp = GuardedNumpy()
    rows, columns = array.shape
    width = 16 // array.itemsize
    pitch = {"padded": -(-columns // width) * width, "tight": columns, "odd": (columns + 1) // 2 * 2 + 1}[layout]
    first = 1 if layout == "odd" else 0
    flat = xp.empty(first + rows * pitch, array.dtype)
    view = flat[first:].reshape(rows, pitch)[:, :columns]
    view[...] = array
    return view


@dataclass(frozen=True)
class Layer:
    """A layer of n_in → n_out with random operands, by the name of its precision."""

    batch_size: int
    n_out: int
    n_in: int
    precision: str = "bfloat16"
    activation: str = "tanh"
    kind: str = "mixed"

    @property
    def operands(self) -> LayerCase:
        return random_layer(
            np.random.default_rng([self.batch_size, self.n_out, self.n_in]),
            *(self.batch_size, self.n_out, self.n_in),
            activation_prev=self.activation,
            kind=self.kind,
            dtype=PRECISIONS[self.precision].operand,
        )

    def backward(
        self, launcher: EmulatorLauncher, *, layout: str = "padded", need_da_prev: bool = True, before: float = 0.0
    ) -> Gradients:
        """By one launch; with `before`, added to a dW and a db that are full of that."""
        precision, case = PRECISIONS[self.precision], self.operands
        activation = ACTIVATIONS[self.activation]
        da, h_prev, W, a_prev = (laid_out(x, layout) for x in (case.da, case.h_prev, case.W, case.a_prev))
        xp = GuardedNumpy()
        dW, db = xp.empty((self.n_out, self.n_in), precision.accumulator), xp.empty(self.n_out, precision.accumulator)
        if before:
            dW[...], db[...] = before, before
        da_prev = laid_out(np.full_like(case.a_prev, np.nan), layout) if need_da_prev else None
        source = (a_prev if activation.derivative_from == "a" else h_prev) if need_da_prev else None
        run = CudaOps(xp, launcher).bind_layer_backward(da, self.n_in, activation, precision)
        run(da, h_prev, W, source, dW, db, da_prev, bool(before))
        return Gradients(dW, db, da_prev)

    def check(self, gradients: Gradients, *, before: float = 0.0) -> None:
        """Holds gradients to the contract's tolerance."""
        precision, case = PRECISIONS[self.precision], self.operands
        options = {"dtype": precision.operand}
        tf32 = options | {"allow_tf32": precision.tf32}
        u = 2.0**-53 if precision.name == "float64" else 2.0**-24
        wide = np.longdouble if precision.name == "float64" else np.float64
        da, h_prev, W, a_prev = (x.astype(wide) for x in (case.da, case.h_prev, case.W, case.a_prev))

        exact = da.T @ h_prev + before
        limit = tolerance(np.abs(da).T @ np.abs(h_prev), self.batch_size, **tf32)
        _assert_close("dW", gradients.dW, exact, limit + (u * np.abs(exact) if before else 0))
        exact = da.sum(axis=0) + before
        limit = tolerance(np.abs(da).sum(axis=0), self.batch_size, **options)
        _assert_close("db", gradients.db, exact, limit + (u * np.abs(exact) if before else 0))
        if gradients.da_prev is None:
            return
        slope = SLOPE[self.activation](a_prev if self.activation in FROM_A else h_prev)
        exact, magnitude = (da @ W) * slope, np.abs(da) @ np.abs(W)
        limit = tolerance(magnitude * np.abs(slope), self.n_out, **tf32, exact=exact, stored=True)
        roundings = {"identity": 0, "relu": 0, "tanh": 4, "gelu": 92}[self.activation]  # of g' and by it
        _assert_close("da_prev", gradients.da_prev, exact, limit + roundings * u * magnitude)

    def forward(self, launcher: EmulatorLauncher, *, layout: str = "padded") -> NDArray:
        """h = g(h_prev Wᵀ + b) of a hidden layer, b being 0.25, 0.5, …"""
        precision, case = PRECISIONS[self.precision], self.operands
        activation, xp = ACTIVATIONS[self.activation], GuardedNumpy()
        h_prev, W = laid_out(case.h_prev, layout), laid_out(case.W, layout)
        out = laid_out(np.full((self.batch_size, self.n_out), np.nan, precision.operand), layout)
        a = laid_out(out, layout) if activation.derivative_from == "a" else None
        bias = xp.empty(self.n_out, precision.accumulator)
        bias[...] = self._bias
        ops = CudaOps(xp, launcher)
        workspace = ops.workspace(self.batch_size, (self.n_in, self.n_out), precision)
        ops.bind_forward(W, bias, out, a, activation, workspace)(h_prev)
        return out

    @property
    def _bias(self) -> NDArray:
        return 0.25 * (1 + np.arange(self.n_out) % 8)

    def check_forward(self, out: NDArray) -> None:
        """Holds an output to the contract's tolerance; for identity, relu and tanh, which are nowhere steep."""
        precision, case = PRECISIONS[self.precision], self.operands
        wide = np.longdouble if precision.name == "float64" else np.float64
        h_prev, W, bias = case.h_prev.astype(wide), case.W.astype(wide), self._bias
        a, magnitude = h_prev @ W.T + bias, np.abs(h_prev) @ np.abs(W).T + bias
        exact = {"identity": lambda: a, "relu": lambda: np.maximum(a, 0), "tanh": lambda: np.tanh(a)}[self.activation]()
        options = {"dtype": precision.operand, "allow_tf32": precision.tf32, "exact": exact, "stored": True}
        u = 2.0**-53 if precision.name == "float64" else 2.0**-24
        few = 8 * u * np.abs(exact) if self.activation == "tanh" else 0.0
        _assert_close("h", out, exact, tolerance(magnitude, self.n_in + 1, **options) + few)


def _assert_close(name: str, result: NDArray, exact: NDArray, limit: NDArray) -> None:
    assert result.shape == exact.shape, name
    error = np.abs(result.astype(exact.dtype) - exact)
    assert np.all(error <= limit), f"{name} is off by {np.nanmax(error / limit):.3g} times its limit"
