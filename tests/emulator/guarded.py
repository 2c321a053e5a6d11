"""NumPy whose fresh arrays end at memory that may not be touched: a kernel that runs over an end is caught."""

from __future__ import annotations

import ctypes
import math
import mmap
import operator
from typing import Any

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_ALIGNMENT = 16


class GuardedNumpy:
    """Stands in for the module `numpy`. `empty` and `zeros` return guarded arrays; all else is NumPy's own.

    The end is rounded up to a multiple of 16 bytes, which keeps the start at one too.
    """

    def empty(self, shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
        """Full of NaN (integers: of −1), so that what nobody wrote shows."""
        array = self.zeros(shape, dtype, order)
        array.reshape(-1, order="A").view(np.uint8)[...] = 0xFF
        return array

    def zeros(self, shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
        dtype = np.dtype(dtype)
        shape = tuple(shape) if isinstance(shape, (tuple, list)) else (operator.index(shape),)
        size = math.prod(shape) * dtype.itemsize
        rounded = -(-size // _ALIGNMENT) * _ALIGNMENT
        accessible = max(-(-rounded // mmap.PAGESIZE), 1) * mmap.PAGESIZE
        # The array keeps the mapping alive, and the mapping goes with the last view of it.
        mapping = mmap.mmap(-1, accessible + mmap.PAGESIZE)
        memory = np.frombuffer(mapping, np.uint8)
        if _libc.mprotect(memory.ctypes.data + accessible, mmap.PAGESIZE, 0):  # 0: neither read nor write
            raise OSError(ctypes.get_errno(), "mprotect failed")
        start = accessible - rounded
        return memory[start : start + size].view(dtype).reshape(shape, order=order)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)
