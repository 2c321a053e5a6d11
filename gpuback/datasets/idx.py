"""Read and write IDX, MNIST's file format.

A file is: two zero bytes, one byte for the element type, one byte for the number of dimensions, each dimension as a
big-endian uint32, then the elements, big-endian, in C order. http://yann.lecun.com/exdb/mnist/ defined it.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from typing import Any

import numpy as np

from gpuback._core.output_files import replacing
from gpuback._core.typing import PathLike
from gpuback.datasets.unpacking import Readable, read_unpacked, read_up_to, unpacked_limit
from gpuback.errors import DtypeError, FileFormatError, ShapeError

GZIP_MAGIC = b"\x1f\x8b"

_DTYPES: dict[int, np.dtype[Any]] = {
    0x08: np.dtype(">u1"),
    0x09: np.dtype(">i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_CODES = {dtype.newbyteorder("="): code for code, dtype in _DTYPES.items()}
_MAX_DIMENSIONS = 32  # what every NumPy can hold


def read_idx(path: PathLike, *, max_bytes: int | None = None) -> np.ndarray:
    """Read an IDX file, gzipped or not (its first bytes tell, not its name).

    Args:
        path: the file.
        max_bytes: how much a gzipped file may unpack to; None: 256 MiB or, if that is more, 20 times the file's size.

    Returns:
        An array of the file's shape and element type: uint8, int8, int16, int32, float32 or float64, in native order.

    Raises:
        FileFormatError: the file is not IDX, is cut short, goes on after its last element, or its gzip is corrupt.
        DataError: it unpacks to more than max_bytes.
        OptionError: max_bytes is no integer ≥ 1.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        zipped = file.peek(2)[:2] == GZIP_MAGIC
        allowed = unpacked_limit(file, max_bytes)
        try:
            if not zipped:
                return _read_stream(path, file, None)
            with gzip.GzipFile(fileobj=file) as unzipped:
                return _read_stream(f"{path} (unzipped)", unzipped, allowed)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FileFormatError(f"{path}: expected a whole gzip file: {error}") from error


def write_idx(path: PathLike, array: np.ndarray) -> None:
    """Write an array as an IDX file, gzipped where the path ends in ".gz". The file appears whole or not at all.

    Args:
        path: the file to make or replace.
        array: uint8, int8, int16, int32, float32 or float64, of any shape with at most 32 axes.

    Raises:
        DtypeError: IDX has no such element type.
        ShapeError: IDX cannot hold the shape.
        MissingFolderError: the folder does not exist.
    """
    path = os.fspath(path)
    native = array.dtype.newbyteorder("=")
    if native not in _CODES:
        raise DtypeError(f"{path}: IDX holds {', '.join(str(dtype) for dtype in _CODES)}, not {array.dtype}")
    if array.ndim > _MAX_DIMENSIONS or max(array.shape, default=0) >= 1 << 32:
        raise ShapeError(f"{path}: IDX holds {_MAX_DIMENSIONS} axes shorter than 2**32, not shape {array.shape}")
    code = _CODES[native]
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    content = header + array.astype(_DTYPES[code]).tobytes()
    if path.endswith(".gz"):
        content = gzip.compress(content, mtime=0)  # no time stamp: the same array makes the same file
    with replacing(path) as file:
        file.write(content)


def _read_stream(path: str, file: Readable, allowed: int | None) -> np.ndarray:
    magic = read_up_to(file, 4)
    if len(magic) < 4:
        raise FileFormatError(f"{path}: expected IDX, which starts with 4 bytes, found {len(magic)} bytes")
    if magic[:2] != b"\0\0":
        raise FileFormatError(
            f"{path}, byte 0: expected an IDX magic number, 0x0000 and two more bytes, found 0x{magic.hex()}"
        )
    if magic[2] not in _DTYPES:
        known = ", ".join(f"0x{code:02x} {dtype.name}" for code, dtype in _DTYPES.items())
        raise FileFormatError(f"{path}, byte 2: expected an element type ({known}), found 0x{magic[2]:02x}")
    if magic[3] > _MAX_DIMENSIONS:
        raise FileFormatError(f"{path}, byte 3: expected at most {_MAX_DIMENSIONS} dimensions, found {magic[3]}")
    header_bytes = 4 * magic[3]
    header = read_up_to(file, header_bytes)
    if len(header) < header_bytes:
        raise FileFormatError(
            f"{path}, byte 4: expected {magic[3]} dimensions in {header_bytes} bytes, found {len(header)} bytes"
        )
    shape = tuple(int(n) for n in np.frombuffer(header, dtype=">u4"))
    dtype = _DTYPES[magic[2]]
    expected = math.prod(shape) * dtype.itemsize
    data = read_unpacked(path, file, expected, allowed)
    if len(data) != expected:
        found = f"{len(data)} bytes" if len(data) < expected else "more"
        raise FileFormatError(
            f"{path}, byte {4 + header_bytes}: expected {expected} bytes for shape {shape} of {dtype.name},"
            f" found {found}"
        )
    try:
        return np.frombuffer(data, dtype=dtype).astype(dtype.newbyteorder("="), copy=False).reshape(shape)
    except ValueError as error:  # an axis of length 0 beside absurd ones
        raise FileFormatError(f"{path}, byte 4: expected dimensions of an array, found {shape}: {error}") from error
