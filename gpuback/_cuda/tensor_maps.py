"""Encode tensor maps by the CUDA driver, through ctypes: CuPy has no binding of these functions."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

from gpuback._cuda.arguments import ELEMENT_BYTES
from gpuback._cuda.launch import TensorMap
from gpuback.errors import BackendError

# Numbers of cuda.h: CUtensorMapDataType, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
# CUtensorMapFloatOOBfill.
_DATA_TYPES = {"float16": 6, "bfloat16": 9}
_INTERLEAVE_NONE = 0
_SWIZZLES = {64: 2, 128: 3}
_L2_PROMOTION_256_BYTES = 3
_ZEROS_OUTSIDE = 0


class _Driver(NamedTuple):
    encode_tiled: Callable[..., int]
    replace_address: Callable[..., int]


@functools.cache
def load_driver() -> _Driver:
    """Find the driver's functions.

    Raises:
        BackendError: there is no driver, or one without tensor maps.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    needed = "kernels for Hopper need the driver of CUDA 12.0 or later (525.60 on Linux)"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise BackendError(f"{needed}, whose library cannot be loaded: {error}") from error
    try:
        encode_tiled, replace_address = library.cuTensorMapEncodeTiled, library.cuTensorMapReplaceAddress
    except AttributeError as error:
        raise BackendError(f"{needed}; this one has no tensor maps ({error}): update the driver") from error
    pointer, number, choice = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int
    encode_tiled.argtypes = (*(pointer, choice, number, pointer, pointer, pointer, pointer, pointer), *(choice,) * 4)
    replace_address.argtypes = (pointer, pointer)
    return _Driver(encode_tiled, replace_address)


class DriverEncoder:
    """Writes tensor maps as the driver does. The driver is loaded for the first one."""

    def encode(self, tensor_map: TensorMap, address: int, place: int) -> None:
        """Write the map of a matrix at `address` to the 128 bytes at `place`.

        Raises:
            BackendError: the driver has no tensor maps, or refuses this one.
        """
        lengths = (ctypes.c_uint64 * 2)(tensor_map.columns, tensor_map.rows)
        pitches = (ctypes.c_uint64 * 1)(tensor_map.pitch * ELEMENT_BYTES[tensor_map.dtype])
        code = load_driver().encode_tiled(
            place,
            _DATA_TYPES[tensor_map.dtype],
            2,
            address,
            lengths,
            pitches,
            (ctypes.c_uint32 * 2)(*tensor_map.box),
            (ctypes.c_uint32 * 2)(1, 1),
            _INTERLEAVE_NONE,
            _SWIZZLES[tensor_map.swizzle],
            _L2_PROMOTION_256_BYTES,
            _ZEROS_OUTSIDE,
        )
        if code:
            raise BackendError(
                f"cuTensorMapEncodeTiled returned error {code} for a matrix at {address:#x}, map at {place:#x}: "
                f"{tensor_map._replace(array=...)}"
            )

    def replace_address(self, place: int, address: int) -> None:
        """Let the map at `place` be of a matrix at another address.

        Raises:
            BackendError: the driver refuses it.
        """
        code = load_driver().replace_address(place, address)
        if code:
            raise BackendError(
                f"cuTensorMapReplaceAddress returned error {code} for a matrix at {address:#x}, map at {place:#x}"
            )
