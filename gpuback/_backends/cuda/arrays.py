"""Arrays on a CUDA device: how they are made, how they lie in memory, and how numbers get there and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback._backends.cuda.prefetch import CudaPrefetch
from gpuback._backends.inputs import DLPACK_CUDA, as_host_array, dlpack_device, from_dlpack, is_real
from gpuback._core.integers import round_up
from gpuback._core.typing import Array, ArrayLike
from gpuback._cuda.launch import Launcher
from gpuback.errors import DeviceError, DeviceMemoryError, OptionError

ROW_ALIGNMENT = 16
"""Bytes at whose multiples the rows of matrices inside a network begin, as asynchronous copies need it."""


class CudaArrays:
    """The operations of a backend that launch no kernel of gpuback's.

    Args:
        xp: CuPy, or what stands in for it.
        launcher: runs kernels.
        name: of the backend.
        device: a context in which `launcher`'s device is the current one.
    """

    def __init__(
        self,
        xp: Any,
        launcher: Launcher,
        *,
        name: str = "cupy",
        device: AbstractContextManager[object] | None = None,
    ) -> None:
        self.name = name
        self.xp = xp
        self.launcher = launcher
        self._device = nullcontext() if device is None else device

    def scope(self, on_invalid: Callable[..., object] | None = None) -> AbstractContextManager[object]:
        return self._device

    def bind_scope(self, on_invalid: Callable[..., object] | None = None) -> Callable[..., Any]:
        def run(work: Callable[..., Any], *arguments: Any) -> Any:
            with self._device:
                return work(*arguments)

        return run

    def empty(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Make an array that nothing is written to yet.

        Raises:
            DeviceMemoryError: the device has no room for it.
        """
        try:
            return self.xp.empty(shape, dtype)
        except MemoryError as error:
            needed = math.prod((shape,) if isinstance(shape, int) else shape) * np.dtype(dtype).itemsize
            raise DeviceMemoryError(
                f"{needed:,} bytes of the device's memory are needed for an array of shape {shape}, and there is no "
                f"room: {error}. Remedy: a smaller batch"
            ) from error

    def padded(self, rows: int, columns: int, dtype: np.dtype[Any]) -> Array:
        """Make a matrix whose rows start at multiples of 16 bytes."""
        return self.empty((rows, pitch_for(columns, dtype)), dtype)[:, :columns]

    def scalar(self, value: Array | float, dtype: np.dtype[Any]) -> Array:
        """Return the value itself: a 0-d array, which every step makes anew."""
        return value

    def copy_for_display(self, array: Array, dtype: np.dtype[Any], factor: float = 1.0) -> Array:
        """Return a fresh C-ordered copy in `dtype`, times a power of two; by way of the host."""
        copy = np.array(self.to_numpy(array), dtype, order="C")
        return self.xp.asarray(copy * copy.dtype.type(factor))

    def to_floats(self, values: Sequence[Array]) -> list[float]:
        return [float(value) for value in self.to_numpy(self.xp.stack(list(values)))] if values else []

    def indices(self, order: NDArray[np.intp]) -> Array:
        return self.xp.asarray(order)

    def take_rows(self, array: Array, indices: Array, out: Array) -> None:
        self.xp.take(array, indices, axis=0, out=out)

    def to_numpy(self, array: Array) -> NDArray[Any]:
        return array if isinstance(array, np.ndarray) else self.xp.asnumpy(array)

    def to_array(self, value: ArrayLike, what: str) -> Array:
        """Return real numbers of any kind as an array of any dtype, where they are: for checks before `asarray`."""
        array = self._on_device(value, what)
        return as_host_array(value, None, what) if array is None else array

    def _on_device(self, value: ArrayLike, what: str) -> Array | None:
        """Return an array in a GPU's memory; None for data on the host."""
        if isinstance(value, np.ndarray):
            return None
        if isinstance(value, self.xp.ndarray):
            return value
        if hasattr(value, "__dlpack__") and dlpack_device(value, what)[0] in DLPACK_CUDA:
            return from_dlpack(value, what, self.xp.from_dlpack)
        return None

    def asarray(self, value: ArrayLike, dtype: np.dtype[Any] | None, what: str) -> Array:
        """Return real numbers of any kind as a C-contiguous array of `dtype` on this device; copy data on the host.

        Raises:
            DeviceError: an array on another device.
            DtypeError: complex numbers, text, objects.
        """
        array = self._on_device(value, what)
        if array is None:
            return self.xp.asarray(as_host_array(value, dtype, what))
        self._require_aligned(array)
        device = getattr(self.launcher, "device_id", None)
        if device is not None and array.device.id != device:
            raise DeviceError(f"{what}: expected data on CUDA device {device}, got an array on {array.device.id}")
        if dtype is None or array.dtype == dtype:
            if not is_real(array.dtype):
                as_host_array(np.empty(0, array.dtype), dtype, what)  # raises, in the words that NumPy users see
            return self.xp.ascontiguousarray(array)
        return self._converted(array, dtype, what)

    def _converted(self, array: Array, dtype: np.dtype[Any], what: str) -> Array:
        """Convert floats on the host, since CuPy takes subnormal numbers for 0, and integers on the device."""
        if array.dtype.kind in "biu":
            return self.xp.ascontiguousarray(array.astype(dtype))
        return self.xp.asarray(as_host_array(self.to_numpy(array), dtype, what))

    def any_outside(self, array: Array, highest: float) -> bool:
        """Say whether an element of an array on the host lies outside 0 … highest.

        Data on the GPU are not read, since that would wait for it. There a label out of range makes NaN.
        """
        return isinstance(array, np.ndarray) and bool(array.min() < 0 or array.max() > highest)

    def _require_aligned(self, array: Array | None) -> None:
        """Refuse an array whose numbers do not lie at multiples of their size, where GPUs read them."""
        if array is not None and not isinstance(array, np.ndarray):
            address = self.launcher.address(array)
            if address % array.itemsize:
                raise OptionError(
                    f"expected arrays whose elements lie at multiples of their size, "
                    f"got one of {array.dtype} at address {address:#x}"
                )

    def _row_contiguous(self, array: Array | None) -> Array | None:
        """Return a matrix with contiguous rows that do not overlap: itself, or a copy."""
        if array is None or (
            array.strides[1] == array.itemsize
            and array.strides[0] >= array.shape[1] * array.itemsize
            and array.strides[0] % array.itemsize == 0
        ):
            return array
        return self.xp.ascontiguousarray(array)

    def _has_padded_rows(self, array: Array) -> bool:
        """Say whether the rows of a matrix, contiguous each, begin at multiples of 16 bytes."""
        pitch = array.strides[0] if len(array) > 1 else 0
        return self.launcher.address(array) % ROW_ALIGNMENT == 0 and pitch % ROW_ALIGNMENT == 0

    def prefetch(self, slots: int) -> CudaPrefetch:
        """Return what copies batches from the host on a stream of its own; data on the GPU stay where they are."""
        return CudaPrefetch(self.launcher.copy_stream(slots), self.empty, slots)

    def may_overlap(self, array: Array, other: Array) -> bool:
        """Say whether two arrays may share memory: whether their ranges of bytes overlap."""
        first, after = self._byte_range(array)
        other_first, other_after = self._byte_range(other)
        return first < other_after and other_first < after

    def _byte_range(self, array: Array) -> tuple[int, int]:
        first = after = self.launcher.address(array)
        for length, stride in zip(array.shape, array.strides, strict=True):
            if stride < 0:
                first += (length - 1) * stride
            else:
                after += (length - 1) * stride
        return first, after + array.itemsize


def pitch_of(matrix: Array) -> np.int32:
    """Count the elements from one row to the next."""
    return np.int32(matrix.strides[0] // matrix.itemsize if len(matrix) > 1 else matrix.shape[1])


def pitch_for(columns: int, dtype: np.dtype[Any]) -> int:
    """Round `columns` up to a whole number of 16 bytes."""
    return round_up(columns, ROW_ALIGNMENT // dtype.itemsize)
