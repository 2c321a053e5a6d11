"""Read .npz files of samples: arrays x and y, x alone, or Keras's x_train, y_train, x_test and y_test."""

from __future__ import annotations

import math
import zipfile

import numpy as np

from gpuback._text import listed
from gpuback.datasets.unpacking import Readable, read_unpacked, unpacked_limit
from gpuback.errors import FileFormatError, GpubackError

Pair = tuple[np.ndarray, np.ndarray | None]


def read_npz(path: str, max_bytes: int | None) -> tuple[Pair, Pair | None]:
    """Read (x, y), and (x_test, y_test) if they are there, as stored; y is None where there is none.

    Args:
        path: the file. Its other arrays are not read.
        max_bytes: see `unpacked_limit`; of all arrays together.

    Raises:
        FileFormatError: it has none of these arrays, or is damaged.
        DataError: it unpacks to too much.
    """
    where = path
    arrays: dict[str, np.ndarray] = {}
    with open(path, "rb") as file:
        allowed = unpacked_limit(file, max_bytes)
        try:
            with zipfile.ZipFile(file) as archive:
                held = {name.removesuffix(".npy") for name in archive.namelist()}
                for name in _wanted(path, held):
                    where = f"{path}, array {name!r}"
                    with archive.open(f"{name}.npy") as member:
                        arrays[name] = _read_array(where, member, allowed)
                    allowed -= arrays[name].nbytes
        except GpubackError:
            raise
        # On damaged bytes zipfile and NumPy raise many kinds of errors: beside BadZipFile and ValueError, fuzzing met
        # OSError, KeyError, RuntimeError, NotImplementedError, SyntaxError, TokenError and zlib.error.
        except Exception as error:
            raise FileFormatError(
                f"{where}: expected numbers in a whole .npz file, a zip of arrays: {error}"
            ) from error
    x = "x" if "x" in arrays else "x_train"
    test = (arrays["x_test"], arrays.get("y_test")) if "x_test" in arrays else None
    return (arrays[x], arrays.get(x.replace("x", "y"))), test


def _wanted(path: str, held: set[str]) -> list[str]:
    names = ("x", "y") if "x" in held else ("x_train", "y_train", "x_test", "y_test")
    if names[0] not in held:
        found = listed(sorted(held)) or "none"
        raise FileFormatError(
            f"{path}: expected an array named x, and one named y, or x_train and so on; found {found}"
        )
    return [name for name in names if name in held]


def _read_array(where: str, member: Readable, allowed: int) -> np.ndarray:
    """Read an .npy file to its end, where a zip's member is held against its CRC. Memory follows what there is."""
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise FileFormatError(f"{where}: expected version 1.0 or 2.0 of .npy, found {version[0]}.{version[1]}")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(member)
    if dtype.hasobject:
        raise FileFormatError(f"{where}: expected numbers, found Python objects (dtype {dtype})")
    if min(shape, default=0) < 0:
        raise FileFormatError(f"{where}: expected the shape of an array, found {shape}")
    expected = math.prod(shape) * dtype.itemsize
    data = read_unpacked(where, member, expected, allowed)
    if len(data) != expected:
        found = f"{len(data)} bytes" if len(data) < expected else "more"
        raise FileFormatError(f"{where}: expected {expected} bytes for shape {shape} of {dtype}, found {found}")
    array: np.ndarray = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if fortran_order else array.reshape(shape)
