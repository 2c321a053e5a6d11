"""Tensor maps as the emulator's copies of tiles read them."""

from __future__ import annotations

import ctypes

from gpuback._cuda.arguments import ELEMENT_BYTES, TENSOR_MAP_BYTES
from gpuback._cuda.launch import TensorMap

_WORD_BYTES = 8


class EmulatedEncoder:
    """Writes the 16 words of `struct TensorMap`: the matrix's address, columns, rows, bytes of its pitch, then a box's
    columns and rows, and the bytes of an element and of the swizzle, each pair in one word, the first in its lower
    half. The rest is zero.
    """

    def encode(self, tensor_map: TensorMap, address: int, place: int) -> None:
        size = ELEMENT_BYTES[tensor_map.dtype]
        words = (ctypes.c_uint64 * (TENSOR_MAP_BYTES // _WORD_BYTES)).from_address(place)
        box_columns, box_rows = tensor_map.box
        words[:6] = (
            *(address, tensor_map.columns, tensor_map.rows, tensor_map.pitch * size),
            *(box_columns | box_rows << 32, size | tensor_map.swizzle << 32),
        )

    def replace_address(self, place: int, address: int) -> None:
        ctypes.c_uint64.from_address(place).value = address
