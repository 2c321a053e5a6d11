"""Other libraries' arrays by DLPack: where they are, and views of their memory, without a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuback._core.typing import Array
from gpuback.errors import DtypeError

HOST = (1, 3)
"""DLPack's numbers for memory that the host reads: its own, and that which CUDA has pinned."""

CUDA = (2, 13)
"""Those for a CUDA device's memory, managed memory included."""

REFUSALS = (AttributeError, BufferError, RuntimeError, TypeError, ValueError)
"""What exporters and importers raise: libraries agree on no kind of error."""


def device_of(value: Any, what: str) -> tuple[int, int]:
    """DLPack's (kind, number) of the device that an array with `__dlpack__` lives on.

    Raises:
        DtypeError: it lives nowhere (PyTorch's meta device, JAX's tracers and deleted arrays).
    """
    try:
        kind, number = value.__dlpack_device__()
    except REFUSALS as error:
        raise DtypeError(f"{what}: expected an array in memory, got a {type(value).__name__}: {error}") from error
    return int(kind), int(number)


def taken(value: Any, what: str, from_dlpack: Callable[[Any], Array]) -> Array:
    """An array over the memory of one that has `__dlpack__`, read-only where that is.

    Args:
        value: of whatever library.
        what: the argument's name, for the message.
        from_dlpack: of the library that is to have it.

    Raises:
        DtypeError: one of the two libraries refuses: the numbers are of a kind that the other does not know, the tensor
            takes part in automatic differentiation, or is sparse.
    """
    try:
        if hasattr(value, "is_neg"):  # PyTorch exports a tensor that it is yet to negate without its sign
            value = value.resolve_neg()
        return from_dlpack(value)
    except REFUSALS as error:
        dtype = str(getattr(value, "dtype", "unknown dtype")).rpartition(".")[2]
        message = f"{what}: expected an array that can be shared by DLPack, got a {type(value).__name__} of {dtype}"
        if dtype.startswith(("bfloat16", "float8")):
            raise DtypeError(
                f"{message}, which NumPy does not have. Convert it first, which loses nothing: x.float() in PyTorch, "
                "x.astype('float32') in JAX and CuPy"
            ) from error
        raise DtypeError(f"{message}: {error}") from error
