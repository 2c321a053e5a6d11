"""The CUDA backend with `reproducible=True`: the bits of `gpuback._backends.exact.numpy_ops`.

Products are exact splits (`products.py`), multiplied by cuBLAS in float64. In kernels/exact, split_operands.cu cuts the
operands and combine_products.cu makes of the sums what is stored. They follow NumPy's sequence of operations, none of
them contracted to fma. Tensor cores are not needed, and nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from gpuback._backends.cuda import row_plans
from gpuback._backends.cuda.arguments import (
    Cases,
    cases_of,
    ints,
    labels_and_targets,
    loss_id,
    loss_parameters,
    matrices,
    output_cases,
    output_id,
)
from gpuback._backends.cuda.arrays import CudaArrays, pitch_of
from gpuback._backends.cuda.formats import accum_of
from gpuback._backends.cuda.ops import CudaOps
from gpuback._backends.cuda.updates import AdamUpdate, SGDUpdate, bind_exact_norm, bind_exact_sum
from gpuback._backends.cuda.workspace import CudaBuffers
from gpuback._backends.exact.layers import ExactLayers, Multiply, loss_rule, output_functions
from gpuback._backends.exact.products import BLOCK, Scales, SliceBuffers, Sums
from gpuback._core.activations import Activation
from gpuback._core.losses import Loss
from gpuback._core.parameters import ParameterRange
from gpuback._core.precision import Precision
from gpuback._core.typing import Array
from gpuback._cuda.launch import Launch, Launcher, Slot

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
    def graph_capture(self) -> None:
        """cuBLAS calls are not captured."""

    def workspace(  # type: ignore[override]
        self, rows: int, sizes: tuple[int, ...], precision: Precision
    ) -> ReproducibleCudaBuffers:
        return ReproducibleCudaBuffers(self, rows, sizes, precision, self._multiply)

    def bind_loss(  # type: ignore[override]
        self, loss: Loss, output: str, a: Array, da: Array, divisor: float, workspace: ReproducibleCudaBuffers
    ) -> Callable[..., Array]:
        """Bind the rows' losses in float64 and their exact sum over B, rounded to float32; see `CudaOps.bind_loss`."""
        loss_rule(loss, output)
        rows, width = a.shape
        losses = self.xp.empty(rows, np.float64)
        launch = self.launcher.bind(
            row_plans.exact_row_plan("exact_loss_rows", rows, workspace.precision),
            **matrices(a_bj=a, da_bj=da),
            labels_b=Slot(),
            targets_bj=Slot(),
            weight_b=Slot(),
            losses_b=losses,
            **ints(n_batch=rows, n=width, loss=loss_id(loss), output=output_id(output)),
            parameters=loss_parameters(self.xp, loss, width, np.dtype(np.float64)),
            divisor=np.float64(divisor),
        )
        write_sum = bind_exact_sum(self.xp, self.launcher, rows)

        def loss_and_delta(y: Array, weight: Array | None, mean: Array | None = None) -> Array:
            if mean is None:
                mean = self.xp.empty((), np.float32)
            launch(*labels_and_targets(y), weight)
            write_sum(losses, mean, rows)
            return mean

        return loss_and_delta

    def bind_output(  # type: ignore[override]
        self, name: str, a: Array, workspace: ReproducibleCudaBuffers
    ) -> Callable[[Array], object]:
        """Bind out = ŷ = O(a) as a function of out."""
        output_functions(name)
        (rows, width), cases = a.shape, output_cases(name)
        return self.launcher.bind(
            cases.added_to(row_plans.exact_row_plan("exact_output_rows", rows, workspace.precision)),
            **matrices(a_bj=a),
            out_bj=Slot(),
            **ints(out_pitch=width, n_batch=rows, n=width, output=cases.numbers[0]),
        )

    def bind_output_delta(  # type: ignore[override]
        self, output: str, source: Array | None, da: Array, divisor: float, workspace: ReproducibleCudaBuffers
    ) -> Callable[[Array, Array | None], object]:
        """Bind da = w_b J_bᵀ dy_b / divisor as a function of dy and w."""
        output_functions(output)
        (rows, width), cases = da.shape, output_cases(output)
        return self.launcher.bind(
            cases.added_to(row_plans.exact_row_plan("exact_output_delta_rows", rows, workspace.precision)),
            dy_bj=Slot(),
            weight_b=Slot(),
            **matrices(source_bj=source, da_bj=da),
            **ints(dy_pitch=width, n_batch=rows, n=width, output=cases.numbers[0]),
            divisor=np.float64(divisor),
        )

    def bind_sgd(
        self, theta: Array, velocity: Array | None, steps: int, ranges: Sequence[ParameterRange] | None = None
    ) -> SGDUpdate:
        return SGDUpdate(self.xp, self.launcher, theta, velocity, steps, ranges, exact_norm=True)

    def bind_adam(
        self,
        theta: Array,
        first_moment: Array,
        second_moment: Array,
        steps: int,
        ranges: Sequence[ParameterRange] | None = None,
    ) -> AdamUpdate:
        return AdamUpdate(self.xp, self.launcher, theta, first_moment, second_moment, steps, ranges, exact_norm=True)

    def norm(self, array: Array) -> float:
        """Compute √Σ x², exact but for its roundings, and wait for it."""
        result = self.xp.empty((), np.float64)
        bind_exact_norm(self.xp, self.launcher, array.size, accum_of(array.dtype), result)(array)
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
        self, arrays: CudaArrays, rows: int, sizes: tuple[int, ...], precision: Precision, multiply: Multiply
    ) -> None:
        super().__init__(arrays, rows, sizes, precision)
        self.slices = SliceBuffers(CudaExactBackend(arrays, precision, multiply), rows, sizes)


_PARAMETERS: dict[row_plans.ExactEntry, tuple[str, str]] = {
    "largest_of_rows": ("x_rc x_pitch largest_r", "rows columns"),
    "largest_of_columns": ("x_rc x_pitch largest_c", "rows columns"),
    "split_operands": (
        "x_rc x_pitch largest by_columns bits first_rc first_pitch second_rc second_pitch",
        "rows columns",
    ),
    "accumulate": ("addend total", "rows columns"),
    "add_block": ("p q p_total q_total first", "rows columns"),
    "finish_forward": (
        "p_bo q_bo are_int64 largest_b largest_o bits bias_o a_bo a_pitch h_bo h_pitch is_float32 activation",
        "n_batch n_out",
    ),
    "finish_delta": (
        "p_bi q_bi are_int64 largest_b largest_i bits source_bi source_pitch factor da_prev_bi da_prev_pitch "
        "is_float32 activation",
        "n_batch n_in",
    ),
    "finish_gradient": (
        "p_oi q_oi are_int64 largest_o largest_i bits factor out_oi out_pitch accumulate",
        "n_out n_in",
    ),
}
"""What each kernel is given at a launch, in this order; and what it calls the rows and columns that it goes over."""

_INTS = {"by_columns", "bits", "first", "are_int64", "is_float32", "activation", "accumulate"}

NO_CASES = cases_of([])
"""What kernels without activations are launched with."""


def _slots(names: str) -> dict[str, Slot]:
    return {name: Slot(_scalar_of(name)) for name in names.split()}


def _scalar_of(name: str) -> type[np.generic] | None:
    """Return the type of a scalar parameter; None for a pointer."""
    if name == "factor":
        return np.float64
    return np.int32 if name in _INTS or name.endswith("_pitch") else None


class CudaExactBackend:
    """`gpuback._backends.exact.products.ExactBackend` on CUDA. A launch is laid out once for each kernel and shape.

    Args:
        arrays: the device's, and what runs kernels.
        precision: of the network.
        multiply: (left, right, out) → None.
    """

    def __init__(self, arrays: CudaArrays, precision: Precision, multiply: Multiply) -> None:
        self._arrays, self._precision, self._multiply = arrays, precision, multiply
        self._launches: dict[tuple[row_plans.ExactEntry, int, int, tuple[str, ...]], Launch] = {}

    def rows_at_once(self, widest: int) -> int:
        return min(BLOCK, max(FEWEST_ROWS, SLICES_AT_ONCE // widest))

    def empty(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return self._arrays.empty(shape, dtype)

    def largest_of_rows(self, x: Array, largest: Array) -> None:
        self._launch("largest_of_rows", x.shape)(*_matrix(x), largest)

    def largest_of_columns(self, x: Array, largest: Array) -> None:
        largest.fill(0)
        self._launch("largest_of_columns", x.shape)(*_matrix(x), largest)

    def split_rows(self, x: Array, largest: Array, bits: int, first: Array, second: Array) -> None:
        self._launch("split_operands", x.shape)(*_matrix(x), largest, False, bits, *_matrix(first), *_matrix(second))

    def split_columns(self, x: Array, largest: Array, bits: int, first: Array, second: Array) -> None:
        self._launch("split_operands", x.shape)(*_matrix(x), largest, True, bits, *_matrix(first), *_matrix(second))

    def multiply(self, left: Array, right: Array, out: Array) -> None:
        self._multiply(left, right, out)

    def accumulate(self, addend: Array, total: Array) -> None:
        self._launch("accumulate", total.shape)(addend, total)

    def add(self, sums: Sums, totals: Sums, *, first: bool) -> None:
        self._launch("add_block", sums.p.shape)(*sums, *totals, first)

    def finish_forward(
        self, sums: Sums, scales: Scales, b: Array, a: Array | None, h: Array, g: Activation | None
    ) -> None:
        cases = cases_of([g])
        launch = self._launch("finish_forward", sums.p.shape, cases)
        launch(*_product(sums, scales), b, *_matrix(a), *_matrix(h), _is_float32(h), *cases.numbers)

    def finish_delta(
        self, sums: Sums, scales: Scales, source: Array | None, g: Activation | None, factor: float, da_prev: Array
    ) -> None:
        cases = cases_of([g])
        launch = self._launch("finish_delta", sums.p.shape, cases)
        out = *_matrix(da_prev), _is_float32(da_prev)
        launch(*_product(sums, scales), *_matrix(None if g is None else source), factor, *out, *cases.numbers)

    def finish_gradient(self, sums: Sums, scales: Scales, factor: float, out: Array, accumulate: bool) -> None:
        launch = self._launch("finish_gradient", sums.p.shape)
        launch(*_product(sums, scales), factor, *_matrix(out), accumulate)

    def _launch(self, entry: row_plans.ExactEntry, shape: tuple[int, int], cases: Cases = NO_CASES) -> Launch:
        key = (entry, *shape, cases.defines)
        launch = self._launches.get(key)
        if launch is None:
            plan = cases.added_to(row_plans.exact_plan(entry, *shape, self._precision))
            names, sizes = _PARAMETERS[entry]
            numbers = ints(**dict(zip(sizes.split(), shape, strict=True)))
            launch = self._launches[key] = self._arrays.launcher.bind(plan, **_slots(names), **numbers)
        return launch


def _matrix(matrix: Array | None) -> tuple[Array | None, int]:
    """Return where a matrix begins, and its pitch."""
    return (None, 0) if matrix is None else (matrix, int(pitch_of(matrix)))


def _product(sums: Sums, scales: Scales) -> tuple[Any, ...]:
    """Return P, Q, whether they are int64, and the scales that they are multiples of."""
    return *sums, sums.p.dtype == np.int64, *scales


def _is_float32(out: Array) -> bool:
    """Say whether a result is stored in the sums' dtype."""
    return bool(out.dtype == np.float32)
