"""Multiply float64 matrices by cuBLAS, for sums of integers that must be exact.

cuBLAS since CUDA 13.0 update 2 can emulate float64 by products of 8-bit integers, which keeps a chosen number of bits.
It is switched on by an environment variable, which is refused here, or by the math mode of a handle, which
CUBLAS_COMPUTE_64F_PEDANTIC does not follow. Source: cuBLAS documentation, "Floating Point Emulation".
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import addressof
from typing import NamedTuple

from gpuback._core.typing import Array
from gpuback.errors import BackendError

EMULATION = "CUBLAS_EMULATE_DOUBLE_PRECISION"
"""The environment variable that makes cuBLAS emulate float64. Other variables, e.g. CUBLAS_EMULATION_STRATEGY, only
tune the emulation."""


class MatrixLayout(NamedTuple):
    """A matrix's order in memory, by rows or by columns, and the elements from one row (or column) to the next."""

    by_rows: bool
    pitch: int


def matrix_layout(matrix: Array) -> MatrixLayout:
    """Find how a matrix (rows, columns) lies, one of whose axes is contiguous."""
    (rows, columns), (row_step, column_step), size = matrix.shape, matrix.strides, matrix.itemsize
    if column_step == size or columns == 1:
        return MatrixLayout(True, row_step // size if rows > 1 else columns)
    return MatrixLayout(False, column_step // size)


def bind_multiply() -> Callable[[Array, Array, Array], None]:
    """Bind out = left right, (M, K) times (K, N), a function (left, right, out) of CuPy's float64 arrays.

    It runs on the current device and stream. `out` is by rows. Rows may be parts of longer ones, and operands may be
    transposed.

    Raises:
        BackendError: cuBLAS is missing, or is told to emulate float64.
    """
    setting = os.environ.get(EMULATION, "")
    if setting not in ("", "0"):
        raise BackendError(
            f"reproducible=True needs native float64 products; {EMULATION}={setting} replaces them by an emulation "
            f"with other bits. Remedy: unset {EMULATION} before the program starts, or backend='numpy'"
        )
    try:
        from cupy.cuda import cublas, device, runtime
    except ImportError as error:
        raise BackendError(
            f"reproducible=True on a GPU needs cuBLAS, which CuPy cannot load ({error}); "
            "pip install '.[cuda12]' or '.[cuda13]' in gpuback's source tree"
        ) from error
    gemm, handle_of_thread = cublas.gemmEx, device.get_cublas_handle
    double, compute, algorithm = runtime.CUDA_R_64F, cublas.CUBLAS_COMPUTE_64F_PEDANTIC, cublas.CUBLAS_GEMM_DEFAULT
    operations = {True: cublas.CUBLAS_OP_N, False: cublas.CUBLAS_OP_T}
    one, zero = ctypes.c_double(1.0), ctypes.c_double(0.0)

    def multiply(left: Array, right: Array, out: Array) -> None:
        # cuBLAS reads memory by columns: what lies by rows is its transpose to it, and outᵀ = rightᵀ leftᵀ.
        left_by_rows, left_pitch = matrix_layout(left)
        right_by_rows, right_pitch = matrix_layout(right)
        try:
            gemm(
                handle_of_thread(),
                *(operations[right_by_rows], operations[left_by_rows]),
                *(out.shape[1], out.shape[0], left.shape[1]),
                *(addressof(one), right.data.ptr, double, right_pitch, left.data.ptr, double, left_pitch),
                *(addressof(zero), out.data.ptr, double, matrix_layout(out).pitch, compute, algorithm),
            )
        except RuntimeError as error:
            raise BackendError(f"cuBLAS did not multiply {left.shape} by {right.shape}: {error}") from error

    return multiply
