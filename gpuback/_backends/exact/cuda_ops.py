"""The CUDA backend with `reproducible=True`: the bits of `gpuback._backends.exact.numpy_ops`.

Products are exact splits (`products.py`), multiplied by cuBLAS in float64; kernels/split.cu cuts the
operands and kernels/combine.cu makes of the sums what is stored. They follow NumPy's sequence of operations, none of
them contracted to fma. Tensor cores are not needed, and nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from gpuback._backends.cuda import plans
from gpuback._backends.cuda.ops import IDENTITY, CudaOps, output_id
from gpuback._backends.cuda.updates import AdamUpdate, SGDUpdate, bind_exact_norm, bind_exact_sum
from gpuback._backends.cuda.workspace import CudaBuffers, pitch_of
from gpuback._backends.exact.layers import ExactLayers, Multiply, loss_rule
from gpuback._backends.exact.products import BLOCK, Scales, SliceBuffers, Sums
from gpuback._core.activations import Activation
from gpuback._core.losses import Loss
from gpuback._core.precision import Precision
from gpuback._core.typing import Array
from gpuback._cuda.launch import Argument, Launch, Launcher, Slot

FEWEST_ROWS, SLICES_AT_ONCE = 1024, 1 << 24
"""Rows of a batch that are split at a time are at least so many, and as many as slices of so many elements hold: 256 MB
of them. More do not make cuBLAS faster."""


class ReproducibleCudaOps(ExactLayers, CudaOps):
    """Every operation on CuPy arrays of one device, with the bits of `ReproducibleNumpyOps`.

    Args:
        xp: CuPy, or what stands in for it.
        launcher: what runs kernels.
        multiply: (left, right, out) → None, out = left right of integers whose sums float64 holds exactly.
        name: of the backend.
        device: a context in which `launcher`'s device is the current one.
    """

    reproducible = True

    def __init__(
        self,
        xp: Any,
        launcher: Launcher,
        multiply: Multiply,
        *,
        name: str = "cupy",
        device: AbstractContextManager[object] | None = None,
    ) -> None:
        super().__init__(xp, launcher, name=name, device=device)
        self._multiply = multiply

    @property
    def recorder(self) -> None:
        """cuBLAS is not recorded."""

    def workspace(  # type: ignore[override]
        self, rows: int, sizes: tuple[int, ...], precision: Precision
    ) -> ReproducibleCudaBuffers:
        return ReproducibleCudaBuffers(self, rows, sizes, precision, self._multiply)

    def bind_loss(  # type: ignore[override]
        self, loss: Loss, output: str, a: Array, da: Array, divisor: float, workspace: ReproducibleCudaBuffers
    ) -> Callable[..., Array]:
        """See `CudaOps.bind_loss`: the rows' losses in float64, then their exact sum over B, rounded to float32."""
        loss_rule(loss, output)
        rows, width = a.shape
        losses = self.xp.empty(rows, np.float64)
        launch = self.launcher.bind(
            plans.exact_row_plan("exact_loss_rows", rows, workspace.precision),
            [
                *(a, pitch_of(a)),
                *(Slot(), Slot(), Slot()),  # labels, targets, weight
                *(da, pitch_of(da), losses),
                *map(np.int32, (rows, width, loss.kernel_id, output_id(output))),
                np.float64(divisor),
            ],
        )
        write_sum = bind_exact_sum(self.xp, self.launcher, rows)

        def loss_and_delta(y: Array, weight: Array | None, mean: Array | None = None) -> Array:
            if mean is None:
                mean = self.xp.empty((), np.float32)
            labels, targets = (y, None) if y.ndim == 1 else (None, y)
            launch(labels, targets, weight)
            write_sum(losses, mean, rows)
            return mean

        return loss_and_delta

    def bind_output(  # type: ignore[override]
        self, name: str, a: Array, workspace: ReproducibleCudaBuffers
    ) -> Callable[[Array], object]:
        """out = ŷ = O(a), as a function of out."""
        rows, width = a.shape
        return self.launcher.bind(
            plans.exact_row_plan("exact_output_rows", rows, workspace.precision),
            [a, pitch_of(a), Slot(), *map(np.int32, (width, rows, width, output_id(name)))],
        )

    def bind_sgd(self, theta: Array, velocity: Array | None, steps: int) -> SGDUpdate:
        return SGDUpdate(self.xp, self.launcher, theta, velocity, steps, exact_norm=True)

    def bind_adam(self, theta: Array, first_moment: Array, second_moment: Array, steps: int) -> AdamUpdate:
        return AdamUpdate(self.xp, self.launcher, theta, first_moment, second_moment, steps, exact_norm=True)

    def norm(self, array: Array) -> float:
        """√Σ x², exact but for its roundings; waits for it."""
        result = self.xp.empty((), np.float64)
        bind_exact_norm(self.xp, self.launcher, array.size, plans.real_of(array.dtype), result)(array)
        return float(result)

    def explain_forward(self, batch_size: int, n_out: int, n_in: int, precision: Precision) -> str:
        return "3 exact float64 cuBLAS GEMMs of slices"

    def explain_backward(
        self, batch_size: int, n_out: int, n_in: int, precision: Precision, *, need_da_prev: bool
    ) -> str:
        return f"{self.explain_forward(batch_size, n_out, n_in, precision)} for dW, exact sums for db" + (
            ", 3 for dh" if need_da_prev else ""
        )


class ReproducibleCudaBuffers(CudaBuffers):
    """The buffers of one network for one batch size."""

    def __init__(
        self, ops: CudaOps, rows: int, sizes: tuple[int, ...], precision: Precision, multiply: Multiply
    ) -> None:
        super().__init__(ops, rows, sizes, precision)
        self.slices = SliceBuffers(CudaExactBackend(ops, precision, multiply), rows, sizes)


_POINTER, _INT, _REAL = Slot(), Slot(np.int32), Slot(np.float64)
_MATRIX = (_POINTER, _INT)
_PRODUCT = (_POINTER, _POINTER, _INT, _POINTER, _POINTER, _INT)
_ARGUMENTS: dict[plans.ExactEntry, tuple[Argument, ...]] = {
    "largest_of_rows": (*_MATRIX, _POINTER),
    "largest_of_columns": (*_MATRIX, _POINTER),
    "split": (*_MATRIX, _POINTER, _INT, _INT, *_MATRIX, *_MATRIX),
    "accumulate": (_POINTER, _POINTER),
    "add_block": (_POINTER, _POINTER, _POINTER, _POINTER, _INT),
    "finish_forward": (*_PRODUCT, _POINTER, *_MATRIX, *_MATRIX, _INT, _INT),
    "finish_delta": (*_PRODUCT, *_MATRIX, _REAL, *_MATRIX, _INT, _INT),
    "finish_gradient": (*_PRODUCT, _REAL, *_MATRIX, _INT),
}
"""What each kernel takes, up to the rows and columns that it goes over."""


class CudaExactBackend:
    """`gpuback._backends.exact.products.ExactBackend` on CUDA. A launch is laid out once for each kernel and shape.

    Args:
        ops: whose arrays and kernels these are.
        precision: of the network.
        multiply: (left, right, out) → None.
    """

    def __init__(self, ops: CudaOps, precision: Precision, multiply: Multiply) -> None:
        self._ops, self._launcher, self._precision, self._multiply = ops, ops.launcher, precision, multiply
        self._launches: dict[tuple[plans.ExactEntry, int, int], Launch] = {}

    def rows_at_once(self, widest: int) -> int:
        return min(BLOCK, max(FEWEST_ROWS, SLICES_AT_ONCE // widest))

    def empty(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return self._ops.empty(shape, dtype)

    def largest_of_rows(self, x: Array, largest: Array) -> None:
        self._launch("largest_of_rows", x.shape)(*_matrix(x), largest)

    def largest_of_columns(self, x: Array, largest: Array) -> None:
        largest.fill(0)
        self._launch("largest_of_columns", x.shape)(*_matrix(x), largest)

    def split_rows(self, x: Array, largest: Array, bits: int, first: Array, second: Array) -> None:
        self._launch("split", x.shape)(*_matrix(x), largest, False, bits, *_matrix(first), *_matrix(second))

    def split_columns(self, x: Array, largest: Array, bits: int, first: Array, second: Array) -> None:
        self._launch("split", x.shape)(*_matrix(x), largest, True, bits, *_matrix(first), *_matrix(second))

    def multiply(self, left: Array, right: Array, out: Array) -> None:
        self._multiply(left, right, out)

    def accumulate(self, addend: Array, total: Array) -> None:
        self._launch("accumulate", total.shape)(addend, total)

    def add(self, sums: Sums, totals: Sums, *, first: bool) -> None:
        self._launch("add_block", sums.p.shape)(*sums, *totals, first)

    def finish_forward(
        self, sums: Sums, scales: Scales, b: Array, a: Array | None, h: Array, g: Activation | None
    ) -> None:
        launch = self._launch("finish_forward", sums.p.shape)
        launch(*_product(sums, scales), b, *_matrix(a), *_matrix(h), _as_sums(h), _kernel_id(g))

    def finish_delta(
        self, sums: Sums, scales: Scales, source: Array | None, g: Activation | None, factor: float, da_prev: Array
    ) -> None:
        launch = self._launch("finish_delta", sums.p.shape)
        out = *_matrix(da_prev), _as_sums(da_prev)
        launch(*_product(sums, scales), *_matrix(None if g is None else source), factor, *out, _kernel_id(g))

    def finish_gradient(self, sums: Sums, scales: Scales, factor: float, out: Array, accumulate: bool) -> None:
        launch = self._launch("finish_gradient", sums.p.shape)
        launch(*_product(sums, scales), factor, *_matrix(out), accumulate)

    def _launch(self, entry: plans.ExactEntry, shape: tuple[int, int]) -> Launch:
        key = (entry, *shape)
        launch = self._launches.get(key)
        if launch is None:
            plan = plans.exact_plan(*key, self._precision)
            launch = self._launches[key] = self._launcher.bind(plan, [*_ARGUMENTS[entry], *map(np.int32, shape)])
        return launch


def _matrix(matrix: Array | None) -> tuple[Array | None, int]:
    """Where it begins, and its pitch."""
    return (None, 0) if matrix is None else (matrix, int(pitch_of(matrix)))


def _product(sums: Sums, scales: Scales) -> tuple[Any, ...]:
    """P, Q, whether they are int64, and of what they are multiples."""
    return *sums, sums.p.dtype == np.int64, *scales


def _as_sums(out: Array) -> bool:
    """Whether a result is stored in the sums' dtype."""
    return bool(out.dtype == np.float32)


def _kernel_id(g: Activation | None) -> int:
    return IDENTITY if g is None else g.kernel_id
