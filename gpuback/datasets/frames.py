"""Read tables with pandas: delimited text (.csv, .tsv, gzipped or not, from a pipe too) and Parquet.

The delimiter and the decimal mark are found in the first lines. pandas is imported when a table is read.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from gpuback._text import listed, quoted, shown
from gpuback.datasets.idx import GZIP_MAGIC
from gpuback.datasets.unpacking import LimitedReader, too_much, unpacked_limit
from gpuback.errors import DataError, FileFormatError, GpubackError, OptionError, missing_extra

if TYPE_CHECKING:
    import pandas as pd

STDIN = "-"
"""As a source: what is piped into the process."""

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}

UNNAMED = "Unnamed: "
"""A column without a name is called by its position behind this, as pandas does."""

_HEAD_BYTES = 1 << 16
"""The separator and the decimal mark are found in so much of a file, or in more if the first two lines take more."""

_MOST_HEAD_BYTES = 1 << 26

DECIMAL_COMMA = re.compile(r"[+-]?\d+(?:\.\d{3})*,\d+(?:[eE][+-]?\d+)?")
_DECIMAL_POINT = re.compile(r"[+-]?\d*\.\d+(?:[eE][+-]?\d+)?")
_TOO_MANY_CELLS = re.compile(r"Expected (\d+) fields in line (\d+), saw (\d+)")


class Layout(NamedTuple):
    """How a text file is laid out."""

    separator: str
    decimal: str
    thousands: str | None
    spaced: bool
    header: list[str]

    def describe(self) -> str:
        """Say what was found, where it is not commas and decimal points; else nothing."""
        words = [SEPARATORS.get(self.separator, repr(self.separator))] if self.separator != "," else []
        words += ["decimal commas"] if self.decimal == "," else []
        words += ["points between thousands"] if self.thousands else []
        return ", ".join(words)


def require_pandas() -> Any:
    """Import pandas.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise missing_extra("pandas", "reading tables", "cli") from None
    return pandas


def read_text(
    path: str,
    *,
    separator: str | None = None,
    decimal: str | None = None,
    texts: Collection[str] = (),
    max_bytes: int | None = None,
) -> tuple[pd.DataFrame, Layout]:
    """Read delimited text with a header row.

    Args:
        path: the file, gzipped or not; "-" for stdin.
        separator, decimal: None finds them in the first lines.
        texts: columns to read as they are written, whatever they look like.
        max_bytes: how much a gzipped file may unpack to.
    """
    pandas = require_pandas()
    if separator is not None and len(separator) != 1:
        raise OptionError(f"separator: expected one character, got {separator!r}")
    if decimal not in (None, ".", ","):
        raise OptionError(f"decimal: expected '.' or ',', got {decimal!r}")
    with _named_errors(path, pandas), _opened(path, max_bytes) as (file, head):
        layout = _layout(path, head, separator, decimal)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            frame = pandas.read_csv(
                path if file is None else file,
                sep=layout.separator,
                decimal=layout.decimal,
                thousands=layout.thousands,
                dtype={place: str for place, name in enumerate(layout.header) if name in texts},
                encoding="utf-8",
                engine="c",
                index_col=False,
                skipinitialspace=layout.spaced,
                low_memory=False,  # in parts, one column may have numbers in one of them and texts in another
            )
    if frame.shape[1] != len(layout.header):  # a name longer than the csv module takes, or beyond _MOST_HEAD_BYTES
        raise FileFormatError(
            f"{path}, line 1: expected a header row of {frame.shape[1]:,} names, found {len(layout.header):,} that can"
            " be read"
        )
    frame.columns = layout.header
    # Each line ends in a separator: a column without a name and without cells.
    unused = [name for name in layout.header if name.startswith(UNNAMED) and frame[name].isna().all()]
    frame = frame.drop(columns=unused) if unused else frame
    if not len(frame):
        raise DataError(f"{path}: expected rows below the header, found none")
    return frame, layout


def read_parquet(path: str, max_bytes: int | None = None) -> pd.DataFrame:
    """Read a Parquet file.

    Raises:
        MissingExtraError: pandas or pyarrow is not installed.
        DataError: it says that it unpacks to more than max_bytes.
    """
    pandas = require_pandas()
    try:
        from pyarrow import parquet
    except ImportError:
        raise missing_extra("pyarrow", "reading Parquet files", "parquet") from None
    with open(path, "rb") as file:
        allowed = unpacked_limit(file, max_bytes)
    try:
        groups = parquet.read_metadata(path)
        if sum(groups.row_group(place).total_byte_size for place in range(groups.num_row_groups)) > allowed:
            raise too_much(path, allowed)
        frame: pd.DataFrame = pandas.read_parquet(path, engine="pyarrow")
    except GpubackError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # pyarrow raises ArrowInvalid, OSError, NotImplementedError and more on damaged bytes
        raise FileFormatError(f"{path}: expected a whole Parquet file: {shown(str(error), 300)}") from error
    frame.columns = [str(name) for name in frame.columns]
    if not len(frame):
        raise DataError(f"{path}: expected rows, found none")
    return frame


@contextmanager
def _opened(path: str, max_bytes: int | None) -> Iterator[tuple[IO[bytes] | None, bytes]]:
    """Yield (the unpacked file, its first bytes, which the file still holds).

    The file is None where pandas can read the path: it does so with several threads.
    """
    if os.path.isfile(path):
        with open(path, "rb") as plain:
            head = _head(plain)
        if head[:2] != GZIP_MAGIC:
            yield None, head
            return
    source = _standard_input() if path == STDIN else open(path, "rb")  # noqa: SIM115
    try:
        start = _up_to(source, 2)
        raw: IO[bytes] = io.BufferedReader(_Replayed(start, source), 1 << 18)
        if start == GZIP_MAGIC:
            limited = LimitedReader(path, gzip.GzipFile(fileobj=raw), unpacked_limit(source, max_bytes))
            raw = io.BufferedReader(limited, 1 << 18)
        head = _head(raw)
        yield io.BufferedReader(_Replayed(head, raw), 1 << 18), head
    finally:
        if path != STDIN:
            source.close()


def _standard_input() -> IO[bytes]:
    try:
        if not sys.stdin.closed:
            return sys.stdin.buffer
    except AttributeError:  # None, as under pythonw, or an object of the caller's
        pass
    raise DataError(f"{STDIN}: expected data on standard input, which is closed")


def _head(file: IO[bytes]) -> bytes:
    head = _up_to(file, _HEAD_BYTES)
    while len(head) < _MOST_HEAD_BYTES and len(head.splitlines()) < 3 and (more := _up_to(file, len(head))):
        head += more
    return head


def _up_to(file: IO[bytes], count: int) -> bytes:
    found = b""
    while len(found) < count and (more := file.read(count - len(found))):
        found += more
    return found


class _Replayed(io.RawIOBase):
    """A file whose beginning has been read: that again, then the rest."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = memoryview(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._head[: len(buffer)] if self._head else self._rest.read(len(buffer))
        self._head = self._head[len(chunk) :]
        buffer[: len(chunk)] = chunk
        return len(chunk)


@contextmanager
def _named_errors(path: str, pandas: Any) -> Iterator[None]:
    """Turn what pandas raises on text that is no table into FileFormatError."""
    try:
        yield
    except GpubackError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FileFormatError(f"{path}: expected a whole gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise FileFormatError(_not_utf8(path, error)) from error
    except pandas.errors.ParserWarning as error:
        raise FileFormatError(f"{path}: expected as many cells in each row as in the header, found more") from error
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, ValueError, OverflowError) as error:
        found = _TOO_MANY_CELLS.search(str(error))
        if found is None:
            raise FileFormatError(f"{path}: expected rows of cells: {shown(str(error), 300)}") from error
        wanted, line, count = found.groups()
        raise FileFormatError(
            f"{path}, line {line}: expected {wanted} cells, as in the header, found {count}"
        ) from error


def _not_utf8(path: str, error: UnicodeDecodeError) -> str:
    found = f"found byte 0x{error.object[error.start]:02x}; save the file as UTF-8"
    if path != STDIN and os.path.isfile(path):
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as first:
                    byte = first.object[first.start]
                    return f"{path}, line {number}: expected UTF-8, found byte 0x{byte:02x}; save the file as UTF-8"
    return f"{path}: expected UTF-8, {found}"


def _layout(path: str, head: bytes, separator: str | None, decimal: str | None) -> Layout:
    """Find separator and decimal mark, and check the header."""
    text = head.decode("utf-8-sig", errors="replace" if len(head) < _HEAD_BYTES else "ignore")
    lines = text.splitlines(keepends=True)
    if len(head) >= _HEAD_BYTES and len(lines) > 1:
        lines.pop()  # cut short
    if not lines or not lines[0].strip():
        raise FileFormatError(f"{path}, line 1: expected a header row, found {'a blank line' if lines else 'no bytes'}")
    separator = _separator(path, lines) if separator is None else separator
    rows = _rows(lines, separator)
    header = [name.strip() or f"{UNNAMED}{column}" for column, name in enumerate(rows[0])]
    _check_header(path, header)
    cells = [cell.strip() for row in rows[1:] for cell in row]
    with_comma = [cell for cell in cells if DECIMAL_COMMA.fullmatch(cell)]
    if decimal is None:
        decimal = "," if with_comma and not any(map(_DECIMAL_POINT.fullmatch, cells)) else "."
    thousands = "." if decimal == "," and any("." in cell for cell in with_comma) else None
    spaced = any(separator + " " in line for line in lines)  # pandas is faster where it need not look for them
    return Layout(separator, decimal, thousands, spaced, header)


def _rows(lines: list[str], separator: str) -> list[list[str]]:
    rows: list[list[str]] = []
    with suppress(csv.Error):  # pandas says more of it
        rows.extend(filter(None, csv.reader(lines, delimiter=separator, skipinitialspace=True)))
    return rows or [[""]]


def _separator(path: str, lines: list[str]) -> str:
    """Return the one that divides each line into as many cells as the header; if several do, into the most."""
    widths = {mark: [len(row) for row in _rows(lines, mark)] for mark in SEPARATORS}
    if path.lower().removesuffix(".gz").endswith((".tsv", ".tab")) and widths["\t"][0] > 1:
        return "\t"
    even = {mark: found[0] for mark, found in widths.items() if found[0] > 1 and set(found) == {found[0]}}
    some = {mark: found[0] for mark, found in widths.items() if found[0] > 1}
    choice = even or some or {",": 1}
    return max(choice, key=lambda mark: choice[mark])


def _check_header(path: str, header: list[str]) -> None:
    where = f"{path}, line 1"
    if all(_is_number(name) for name in header):
        raise FileFormatError(
            f"{where}: expected a header row of column names, found numbers ({listed(header, 3)}): put a line of"
            " names on top"
        )
    name, count = Counter(header).most_common(1)[0]
    if count > 1:
        raise FileFormatError(
            f"{where}: expected a name of its own for every column, found {count} named {quoted(name)}"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
