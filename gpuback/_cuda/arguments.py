"""Lay out a kernel's arguments as a launch wants them, and refuse those that no device could take."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gpuback._core.typing import Array
from gpuback._cuda.launch import Argument, Slot, TensorMap, Variant
from gpuback.errors import BackendError

TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT = 128, 64
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2}
"""Of the formats that tensor maps have."""


def require_names(variant: Variant, parameters: Sequence[str], arguments: Mapping[str, Argument]) -> None:
    """Refuse arguments that are not one for each parameter.

    Raises:
        TypeError: names what was expected, what was given, and the difference.
    """
    missing = [name for name in parameters if name not in arguments]
    unknown = [name for name in arguments if name not in parameters]
    if missing or unknown:
        raise TypeError(
            f"{variant.source} {variant.entry}: expected the arguments {_listed(parameters)}; "
            f"got {_listed(arguments)}; missing: {_listed(missing)}; unknown: {_listed(unknown)}"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


class TensorMapEncoder(Protocol):
    """How a launcher's device writes tensor maps. It is given only those that `require_copyable` has passed."""

    def encode(self, tensor_map: TensorMap, address: int, place: int) -> None:
        """Write the map of a matrix at `address` to the 128 bytes at `place`."""
        ...

    def replace_address(self, place: int, address: int) -> None:
        """Let the map at `place` be of a matrix at another address."""
        ...


def require_copyable(name: str, tensor_map: TensorMap, address: int) -> None:
    """Refuse a map that breaks the rules of copies of boxes.

    Source: CUDA driver API, "Tensor Map Object Management", cuTensorMapEncodeTiled.

    Args:
        name: of the kernel's parameter, for the message.
        tensor_map: its dtype, sizes and box are checked.
        address: of the matrix.

    Raises:
        BackendError: names the field, its value and the rule.
    """

    def require(field: str, value: object, holds: bool, rule: str) -> None:
        if not holds:
            raise BackendError(f"tensor map {name!r}: expected {field} {rule}, got {value}")

    require("a dtype", repr(tensor_map.dtype), tensor_map.dtype in ELEMENT_BYTES, f"of {', '.join(ELEMENT_BYTES)}")
    require("a swizzle", tensor_map.swizzle, tensor_map.swizzle in (64, 128), "of 64 or 128 bytes")
    size = ELEMENT_BYTES[tensor_map.dtype]
    for field, length in (("columns", tensor_map.columns), ("rows", tensor_map.rows)):
        require(field, length, 1 <= length <= 1 << 32, "from 1 to 2^32")
    for field, length in zip(("columns", "rows"), tensor_map.box, strict=True):
        require(f"{field} of a box", length, 1 <= length <= 256, "from 1 to 256")
    row_bytes, pitch_bytes = tensor_map.box[0] * size, tensor_map.pitch * size
    fits = row_bytes % 16 == 0 and row_bytes <= tensor_map.swizzle
    require(
        "a box's row", f"{row_bytes} bytes", fits, f"of 16 bytes times n, at most the swizzle's {tensor_map.swizzle}"
    )
    require("a pitch", f"{pitch_bytes} bytes", pitch_bytes % 16 == 0, "of 16 bytes times n")
    require("a pitch", f"{pitch_bytes} bytes", pitch_bytes < 1 << 40, "below 2^40 bytes")
    long_enough = tensor_map.pitch >= tensor_map.columns
    require("a pitch", f"{tensor_map.pitch} elements", long_enough, f"of at least the {tensor_map.columns} columns")
    require("an address", f"{address:#x}", address % 16 == 0, "that is a multiple of 16")


class _WideCell:
    """128 zero bytes at a multiple of 64: a null map, or a null pointer.

    Attributes:
        place: their address.
    """

    def __init__(self) -> None:
        self._memory = (ctypes.c_ubyte * (TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT - 1))()
        start = ctypes.addressof(self._memory)
        self.place = start + -start % TENSOR_MAP_ALIGNMENT


class _MapCell(_WideCell):
    """A tensor map. It is encoded once, with the first matrix that it gets; then only the address changes."""

    def __init__(self, name: str, tensor_map: TensorMap, encoder: TensorMapEncoder) -> None:
        super().__init__()
        require_copyable(name, tensor_map, 0)
        self._name = name
        self._map = tensor_map
        self._encoder = encoder
        self._address: int | None = None

    def point_to(self, address: int | None) -> None:
        """Let the map be of the matrix at that address; null for None."""
        if address == self._address:
            return
        if address is None:
            ctypes.memset(self.place, 0, TENSOR_MAP_BYTES)
        else:
            require_copyable(self._name, self._map, address)
            if self._address is None:
                self._encoder.encode(self._map, address, self.place)
            else:
                self._encoder.replace_address(self.place, address)
        self._address = address


class ArgumentBlock:
    """Kernel arguments laid out in memory as a launch wants them: an array of pointers to values.

    Args:
        parameters: the names of the kernel's parameters, in order.
        arguments: one for each of them.
        address: of an array.
        encoder: of tensor maps.

    Attributes:
        pointer: the address of that array of pointers.
        arguments: what was given, arrays included, Slots still open.

    Raises:
        BackendError: a tensor map breaks the rules of copies.
        TypeError: a number that does not say of which type it is.
    """

    def __init__(
        self,
        parameters: Sequence[str],
        arguments: Mapping[str, Argument],
        address: Callable[[Array], int],
        encoder: TensorMapEncoder,
    ) -> None:
        self.arguments = arguments
        self._address = address
        self._encoder = encoder
        self._cells = {name: self._cell(name, value) for name, value in arguments.items()}
        self._slots = [self._cells[name] for name, value in arguments.items() if is_open(value)]
        self._table = (ctypes.c_void_p * len(parameters))(*(_place(self._cells[name]) for name in parameters))
        self.pointer = ctypes.addressof(self._table)

    def _cell(self, name: str, value: Argument) -> Any:
        if isinstance(value, Slot):
            return ctypes.c_void_p() if value.dtype is None else np.ctypeslib.as_ctypes_type(value.dtype)()
        if value is None:
            return _WideCell()
        if isinstance(value, TensorMap):
            cell = _MapCell(name, value, self._encoder)
            if not is_open(value):
                cell.point_to(None if value.array is None else self._address(value.array))
            return cell
        if isinstance(value, np.generic):
            dtype: Any = value.dtype
            return np.ctypeslib.as_ctypes_type(dtype)(value.item())
        if isinstance(value, (int, float, bool)):
            raise TypeError(f"argument {name!r}: expected an array or a NumPy scalar, got the Python number {value!r}")
        return ctypes.c_void_p(self._address(value))

    def fill(self, values: Sequence[Any]) -> None:
        """Put values into the slots, in the order in which the slots were given."""
        if len(values) != len(self._slots):
            raise TypeError(f"a launch with {len(self._slots)} open arguments: got {len(values)} values")
        for cell, value in zip(self._slots, values, strict=True):
            if isinstance(cell, ctypes.c_void_p):
                cell.value = None if value is None else self._address(value)
            elif isinstance(cell, _MapCell):
                cell.point_to(None if value is None else self._address(value))
            else:
                cell.value = value


def _place(cell: Any) -> int:
    return cell.place if isinstance(cell, _WideCell) else ctypes.addressof(cell)


def is_open(argument: Argument) -> bool:
    """Whether the argument gets a value at each launch."""
    return isinstance(array_of(argument), Slot)


def array_of(argument: Argument) -> Any:
    """Return what the argument refers to: a map's array; of others, the argument itself."""
    return argument.array if isinstance(argument, TensorMap) else argument
