"""Read .csv and .npz files of samples. Errors name the line and column, or the array."""

from __future__ import annotations

import csv
import itertools
import math
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from gpuback._text import did_you_mean, listed, quoted
from gpuback.datasets.unpacking import Readable, read_unpacked, unpacked_limit
from gpuback.errors import DataError, FileFormatError, GpubackError, OptionError

if TYPE_CHECKING:
    from _csv import Reader

# Rows converted in one go: enough to spread NumPy's overhead, few enough that their strings are freed early.
# On 100,000 rows of 20 columns, 256 and 1024 took the same time and 8192 took 15 % more.
_CHUNK_ROWS = 512


class Table(NamedTuple):
    """A .csv file's numbers."""

    x: np.ndarray  # (N, n_features) float64
    y: np.ndarray  # (N,) float64
    whole: bool  # every target is written as a whole number: "3", not "3.0"
    lines: np.ndarray  # (N,) the line that each row ends on
    feature_names: tuple[str, ...]
    target_name: str


def read_csv(path: str, target: str | None) -> Table:
    """Read a comma-separated file with a header row; `target` names the target's column, the last by default."""
    with open(path, "rb") as file:
        reader = csv.reader(_decoded_lines(path, file), strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            column = _target_column(path, header, target)
            blocks: list[np.ndarray] = []
            lines: list[int] = []
            whole = True
            rows = _numbered_rows(path, reader, len(header))
            while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
                numbers, cells = zip(*chunk, strict=True)
                blocks.append(_parsed(path, header, numbers, cells))
                lines.extend(numbers)
                whole = whole and set("".join(row[column] for row in cells)).isdisjoint(".eE")
        except csv.Error as error:
            raise FileFormatError(f"{path}, line {reader.line_num}: expected comma-separated cells: {error}") from error
    if not blocks:
        raise DataError(f"{path}: expected data rows below the header at line 1, found none")
    values = np.concatenate(blocks)
    return Table(
        x=np.delete(values, column, axis=1),
        y=values[:, column].copy(),
        whole=whole,
        lines=np.array(lines),
        feature_names=(*header[:column], *header[column + 1 :]),
        target_name=header[column],
    )


def read_npz(path: str, max_bytes: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Read the arrays `x` and `y` of an .npz file, as stored; other arrays in it are not read.

    Args:
        path: the file.
        max_bytes: see `unpacked_limit`; of both arrays together.
    """
    where = path
    arrays = []
    with open(path, "rb") as file:
        allowed = unpacked_limit(file, max_bytes)
        try:
            with zipfile.ZipFile(file) as archive:
                held = {name.removesuffix(".npy") for name in archive.namelist()}
                if {"x", "y"} <= held:
                    for name in ("x", "y"):
                        where = f"{path}, array {name!r}"
                        with archive.open(f"{name}.npy") as member:
                            arrays.append(_read_array(where, member, allowed))
                        allowed -= arrays[-1].nbytes
        except GpubackError:
            raise
        # On damaged bytes zipfile and NumPy raise many kinds of errors: beside BadZipFile and ValueError, fuzzing met
        # OSError, KeyError, RuntimeError, NotImplementedError, SyntaxError, TokenError and zlib.error.
        except Exception as error:
            raise FileFormatError(
                f"{where}: expected numbers in a whole .npz file, a zip of arrays: {error}"
            ) from error
    if not arrays:
        raise FileFormatError(f"{path}: expected arrays named x and y, found {listed(sorted(held)) or 'none'}")
    return arrays[0], arrays[1]


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


def _decoded_lines(path: str, file: BinaryIO) -> Iterator[str]:
    """Decode line by line, which costs little and finds the line that is not UTF-8."""
    encoding = "utf-8-sig"  # a byte order mark can only stand at the start of the first line
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode(encoding)
        except UnicodeDecodeError as error:
            raise FileFormatError(
                f"{path}, line {number}: expected UTF-8, found byte 0x{error.object[error.start]:02x}"
                "; save the file as UTF-8"
            ) from error
        encoding = "utf-8"


def _target_column(path: str, header: list[str], target: str | None) -> int:
    """Check the header and return the index of the target's column."""
    where = f"{path}, line 1"
    if not header:
        raise FileFormatError(f"{where}: expected a header row, found {_emptiness(path)}")
    if all(_is_number(name) for name in header):
        raise FileFormatError(
            f"{where}: expected a header row of column names, found numbers ({listed(header, 3)}): put a line of"
            " names on top"
        )
    if len(header) < 2:
        raise FileFormatError(
            f"{where}: expected at least two columns separated by commas, a feature and the target,"
            f" found {quoted(header[0])}"
        )
    if "" in header:
        raise FileFormatError(
            f"{where}: expected a name for every column, found none for column {header.index('') + 1} of {len(header)}"
            " (an index column would be learnt from: leave it out)"
        )
    name = header[-1] if target is None else target
    count = Counter(header)[name]
    if count == 0:
        hint = did_you_mean(name, header)
        raise OptionError(f"{where}: expected a column named {quoted(name)}, found {listed(header)}.{hint}")
    if count > 1:
        raise OptionError(f"{where}: expected one column named {quoted(name)} for the target, found {count}")
    return header.index(name)


def _emptiness(path: str) -> str:
    return "a blank line" if os.path.getsize(path) else "an empty file"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbered_rows(path: str, reader: Reader, width: int) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row; blank lines may only end the file."""
    blank = None
    for row in reader:
        if len(row) == width and blank is None:
            yield reader.line_num, row
        elif len(row) <= 1 and not "".join(row).strip():
            blank = blank or reader.line_num
        elif blank is not None:
            raise FileFormatError(
                f"{path}, line {blank}: expected {width} cells, found a blank line with rows below it"
            )
        else:
            raise FileFormatError(
                f"{path}, line {reader.line_num}: expected {width} cells, as in the header, found {len(row)}"
            )


def _parsed(path: str, header: list[str], lines: tuple[int, ...], rows: tuple[list[str], ...]) -> np.ndarray:
    """Parse the cells as float64; only if that fails, look for the cell at fault."""
    try:
        values = np.array(rows, dtype=np.float64)
    except ValueError:
        pass
    else:
        # Python reads "1_000" as 1000; in a table it is more likely a code than a number.
        if np.isfinite(values).all() and "_" not in "".join(itertools.chain.from_iterable(rows)):
            return values
    for line, row in zip(lines, rows, strict=True):
        for name, cell in zip(header, row, strict=True):
            where = f"{path}, line {line}, column {quoted(name)}"
            if "_" in cell or not _is_number(cell):
                raise FileFormatError(
                    f"{where}: expected a number, found {quoted(cell)}"
                    " (names of classes have to be numbered 0, 1, 2, …)"
                )
            if not np.isfinite(float(cell)):
                raise DataError(f"{where}: expected a finite number, found {quoted(cell)}")
    raise AssertionError("NumPy and Python disagree about which cells are numbers")
