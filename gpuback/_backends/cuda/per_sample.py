"""Per-sample gradients on CUDA: the operations of `NumpyPerSample` as launches of kernels/elementwise/per_sample.cu."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpuback._backends.cuda import row_plans
from gpuback._backends.cuda.arguments import ints, matrices
from gpuback._backends.cuda.arrays import CudaArrays, pitch_of
from gpuback._backends.cuda.workspace import CudaBuffers
from gpuback._core.typing import Array
from gpuback._cuda.launch import Slot


class CudaPerSample(CudaArrays):
    """The operations on the gradients of single samples."""

    def bind_add_norms(
        self, da: Array, norms: Array, workspace: CudaBuffers
    ) -> Callable[[Array, bool, Array | None], None]:
        """Bind norms_b = √(norms_b² + ‖da_b‖² (‖h_prev_b‖² + 1)); see `NumpyPerSample.bind_add_norms`."""
        rows, n_out = da.shape
        launch = self.launcher.bind(
            row_plans.per_sample_plan("add_norms", rows, workspace.precision),
            **matrices(da_bo=da),
            h_bi=Slot(),
            h_pitch=Slot(np.int32),
            norms_b=norms,
            out_b=Slot(),
            first=Slot(np.int32),
            n_in=Slot(np.int32),
            **ints(n_batch=rows, n_out=n_out),
        )

        def add_norms(h_prev: Array, first: bool, out: Array | None) -> None:
            launch(h_prev, pitch_of(h_prev), out, first, h_prev.shape[1])

        return add_norms

    def bind_clip(self, da: Array, norms: Array, factor: float, workspace: CudaBuffers) -> Callable[[float], None]:
        """Bind da_b *= factor min(1, max_norm / norms_b); see `NumpyPerSample.bind_clip`."""
        rows, n_out = da.shape
        return self.launcher.bind(
            row_plans.per_sample_plan("clip_rows", rows, workspace.precision),
            **matrices(da_bo=da),
            norms_b=norms,
            max_norm=Slot(np.float64),
            factor=np.float64(factor),
            **ints(n_batch=rows, n_out=n_out),
        )

    def bind_outer(self, da: Array, workspace: CudaBuffers) -> Callable[[Array, Array, Array], None]:
        """Bind dW_b = da_b h_prev_bᵀ, db_b = da_b; the samples' gradients lie one after the other in one matrix."""
        rows, n_out = da.shape
        launch = self.launcher.bind(
            row_plans.per_sample_plan("outer_rows", rows * n_out, workspace.precision),
            **matrices(da_bo=da),
            h_bi=Slot(),
            h_pitch=Slot(np.int32),
            dw_boi=Slot(),
            db_bo=Slot(),
            stride=Slot(np.int64),
            n_in=Slot(np.int32),
            **ints(n_batch=rows, n_out=n_out),
        )

        def outer(h_prev: Array, dW: Array, db: Array) -> None:
            launch(h_prev, pitch_of(h_prev), dW, db, db.strides[0] // db.itemsize, h_prev.shape[1])

        return outer
