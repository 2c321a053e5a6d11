"""Read what a compressed file unpacks to, up to a limit: a megabyte of zip may hold gigabytes of zeros."""

from __future__ import annotations

import io
import os
from typing import IO, Any, Protocol

from gpuback._core.validation import count_or_none
from gpuback.errors import DataError

ALWAYS_ALLOWED = 1 << 28
"""Every file may unpack to 256 MiB, five times MNIST's images, ..."""

ALLOWED_RATIO = 20
"""... or to 20 times its size, if that is more. Measured numbers shrink to a half or a tenth, zeros to a thousandth."""

_READ_BYTES = 1 << 20  # at most this is allocated ahead of what the file turns out to hold


def unpacked_limit(file: IO[bytes], max_bytes: int | None) -> int:
    """Return how many bytes an open file may unpack to.

    Args:
        file: the packed file.
        max_bytes: the user's limit; None for 256 MiB or, if that is more, 20 times the file's size.

    Raises:
        OptionError: max_bytes is no integer ≥ 1.
    """
    given = count_or_none("max_bytes", max_bytes)
    if given is not None:
        return given
    try:
        size = os.fstat(file.fileno()).st_size
    except (OSError, io.UnsupportedOperation):  # a stream without a size
        size = 0
    return max(ALWAYS_ALLOWED, ALLOWED_RATIO * size)


class Readable(Protocol):
    """An open file, packed or not."""

    def read(self, size: int = ..., /) -> bytes: ...


def read_unpacked(where: str, file: Readable, expected: int, allowed: int | None) -> bytearray:
    """Read the `expected` bytes that should be the rest of a file: fewer at the file's end, one more if it goes on.

    Args:
        where: the file, for the message.
        file: unpacks while it is read.
        expected: how many bytes there should be. They are read in pieces, so a wrong number costs no memory.
        allowed: how many bytes there may be; None for any.

    Raises:
        DataError: there are more than `allowed`.
    """
    data = read_up_to(file, (expected if allowed is None else min(expected, allowed)) + 1)
    if allowed is not None and len(data) > allowed:
        raise too_much(where, allowed)
    return data


class LimitedReader(io.RawIOBase):
    """What a file unpacks to, up to a limit.

    Args:
        where: the file, for the message.
        file: unpacks while it is read.
        allowed: how many bytes there may be; a read beyond raises DataError.
    """

    def __init__(self, where: str, file: Readable, allowed: int) -> None:
        self._where, self._file, self._allowed, self._left = where, file, allowed, allowed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._file.read(len(buffer))
        self._left -= len(chunk)
        if self._left < 0:
            raise too_much(self._where, self._allowed)
        buffer[: len(chunk)] = chunk
        return len(chunk)


def too_much(where: str, allowed: int) -> DataError:
    """Make the error for a file that unpacks to more than is allowed."""
    return DataError(
        f"{where}: expected to unpack to at most {allowed:,} bytes, found more; max_bytes=… raises the limit"
    )


def read_up_to(file: Readable, n_bytes: int) -> bytearray:
    """Read the next n bytes, or fewer at the file's end."""
    data = bytearray()
    while chunk := file.read(min(_READ_BYTES, n_bytes - len(data))):
        data += chunk
    return data
