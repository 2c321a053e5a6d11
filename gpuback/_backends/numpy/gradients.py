"""The sums over the rows of a batch, dW and db, on NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpuback._backends.numpy.workspace import NumpyWorkspace
from gpuback._core.chained_sums import bind_sum_columns
from gpuback._core.typing import Array


def bind_weight_gradient(
    da: Array, width: int, scale: float, workspace: NumpyWorkspace
) -> Callable[[Array, Array, bool], None]:
    """Return a function (h_prev, dW, accumulate): dW (+)= daᵀ h_prev / scale.

    Args:
        da: (rows, nO), or some columns of an array, for as many rows of dW.
        width: nI.
        scale: a power of two.
        workspace: of this many rows.
    """
    da_operand = workspace.bind_product_operand(0, da.shape)
    h_operand = workspace.bind_product_operand(1, (len(da), width))
    multiply, unscale = da.T.dot, 1.0 / scale

    def weight_gradient(h_prev: Array, dW: Array, accumulate: bool) -> None:
        dW_sum = workspace.gradient[: dW.size].reshape(dW.shape) if accumulate else dW
        if da_operand is None or h_operand is None:
            multiply(h_prev, dW_sum)
        else:
            da_operand(da).T.dot(h_operand(h_prev), dW_sum)
        if unscale != 1.0:
            np.multiply(dW_sum, unscale, out=dW_sum)
        if accumulate:
            np.add(dW, dW_sum, out=dW)

    return weight_gradient


def bind_bias_gradient(da: Array, scale: float) -> Callable[[Array, bool], None]:
    """Return a function (db, accumulate): db (+)= Σ_b da_b / scale."""
    sum_da, unscale = bind_sum_columns(da), 1.0 / scale

    def bias_gradient(db: Array, accumulate: bool) -> None:
        db_sum = np.empty_like(db) if accumulate else db
        sum_da(db_sum)
        if unscale != 1.0:
            np.multiply(db_sum, unscale, out=db_sum)
        if accumulate:
            np.add(db, db_sum, out=db)

    return bias_gradient
