"""Find out what a source is, and read it: scikit-learn's bundled sets by name, files by name and content."""

from __future__ import annotations

import gzip
import importlib
import itertools
import os
import stat
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from gpuback._core.typing import PathLike
from gpuback.datasets import frames
from gpuback.datasets.idx import GZIP_MAGIC, read_idx
from gpuback.datasets.npz import Pair, read_npz
from gpuback.datasets.tables import Table
from gpuback.errors import DataError, FileFormatError, OptionError, UnknownSourceError, missing_extra, unknown_name

BUILT_IN = ("breast_cancer", "diabetes", "digits", "iris", "wine")

_DIGITS_MAX_PIXEL = 16.0
_ZIP_MAGIC, _PARQUET_MAGIC = b"PK", b"PAR1"
_EXTENSIONS = {
    **dict.fromkeys((".csv", ".tsv", ".tab", ".txt"), "text"),
    **{".npz": "npz", ".parquet": "parquet", ".pq": "parquet"},
}
_OPTIONS = {"text": ("separator", "decimal"), "npz": (), "idx": ("labels",), "parquet": ()}


def read(
    source: PathLike,
    *,
    labels: PathLike | None = None,
    separator: str | None = None,
    decimal: str | None = None,
    max_bytes: int | None = None,
    texts: Collection[str] = (),
) -> Table:
    """Read a source; its targets may be absent. Arguments and errors as `datasets.load`'s.

    Args:
        texts: columns of delimited text to read as they are written, whatever they look like.
    """
    given = {"labels": labels, "separator": separator, "decimal": decimal}
    if isinstance(source, str) and source in BUILT_IN:
        _refuse(source, "a built-in data set", given)
        return _built_in(source)
    path = os.fspath(source)
    kind = "text" if path == frames.STDIN else _kind_of_file(path)
    _refuse(
        path,
        {"text": "a table", "npz": "an .npz file", "idx": "an IDX file", "parquet": "a Parquet file"}[kind],
        {name: value for name, value in given.items() if name not in _OPTIONS[kind]},
    )
    try:
        if kind == "text":
            frame, layout = frames.read_text(
                path, separator=separator, decimal=decimal, texts=texts, max_bytes=max_bytes
            )
            return Table(name_of(path), frame, tuple(frame.columns), layout=layout.describe())
        if kind == "parquet":
            frame = frames.read_parquet(path, max_bytes)
            return Table(name_of(path), frame, tuple(frame.columns))
        if kind == "npz":
            train, test = read_npz(path, max_bytes)
            rest = None if test is None else _of_npz(path, test, "x_test", "y_test")
            names = ("x", "y") if rest is None else ("x_train", "y_train")
            return _of_npz(path, train, *names, rest)
        return _of_idx(path, labels, max_bytes)
    except MemoryError as error:
        raise DataError(f"{path}: expected data that fit in memory: {error or 'there is not enough'}") from error


def name_of(path: str) -> str:
    """Return what a source is called in messages and results."""
    return "stdin" if path == frames.STDIN else os.path.basename(path)


def files_of(source: PathLike, labels: PathLike | None = None) -> list[str]:
    """List the files that `read` would read, as far as they exist."""
    if isinstance(source, str) and source in BUILT_IN:
        return []
    path = os.fspath(source)
    if path == frames.STDIN:
        path = os.path.realpath("/dev/stdin")  # the file that the shell has opened there, if it is one
    found = [path, *(_labels_candidates(path) if labels is None else [os.fspath(labels)])]
    return list(filter(os.path.exists, found))


def _refuse(source: str, what: str, options: Mapping[str, object]) -> None:
    for name, value in options.items():
        if value is not None:
            raise OptionError(f"{source}: {name}={value!r} does not apply to {what}")


def _kind_of_file(path: str) -> str:
    """Tell "text", "npz", "parquet" or "idx" by the name, else by the content."""
    if not os.path.exists(path):
        raise UnknownSourceError(
            f"{unknown_name('data set', path, BUILT_IN)} As a path it was looked for at {os.path.abspath(path)},"
            " where there is no file."
        )
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise FileFormatError(f"{path}: expected a file, found a folder")
    if stat.S_ISCHR(mode):  # /dev/zero never ends
        raise FileFormatError(f"{path}: expected a file, found a device; - reads what is piped in")
    stem, extension = os.path.splitext(path.lower())
    extension = os.path.splitext(stem)[1] if extension == ".gz" else extension
    if extension in _EXTENSIONS:
        return _EXTENSIONS[extension]
    if stat.S_ISFIFO(mode):
        return "text"
    with open(path, "rb") as file:
        start = file.read(4)
        if start[:2] == GZIP_MAGIC:
            file.seek(0)
            start = _start_unpacked(file) or start
    for magic, kind in ((_ZIP_MAGIC, "npz"), (_PARQUET_MAGIC, "parquet"), (b"\0\0", "idx"), (GZIP_MAGIC, "idx")):
        if start.startswith(magic):
            return kind
    if "-ubyte" in os.path.basename(path):  # a damaged IDX file is known by its name
        return "idx"
    raise FileFormatError(
        f"{path}: expected a .csv, .tsv, .txt, .parquet, .npz or IDX file, found a name that ends in {extension!r} and"
        f" content that starts with {start!r}"
    )


def _start_unpacked(file: Any) -> bytes:
    try:
        return gzip.GzipFile(fileobj=file).read(4)
    except (EOFError, OSError, zlib.error):
        return b""


def _built_in(name: str) -> Table:
    try:
        sets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise missing_extra("scikit-learn", f"the data set {name!r}", "cli") from error
    bunch: Any = getattr(sets, f"load_{name}")()
    x = np.ascontiguousarray(bunch.data / _DIGITS_MAX_PIXEL if name == "digits" else bunch.data)
    classes = tuple(map(str, bunch.get("target_names", ())))
    y = np.array(classes)[bunch.target] if classes else bunch.target
    return Table(name, x, tuple(map(str, bunch.feature_names)), y, "target", classes)


def _of_npz(path: str, pair: Pair, name: str, name_y: str, test: Table | None = None) -> Table:
    x, y = pair
    for array_name, array in ((name, x), (name_y, y)):
        if array is not None and array.dtype.kind not in ("biuf" if array_name == name else "biufSU"):
            wanted = "real numbers" if array_name == name else "real numbers or texts"
            raise DataError(f"{path}, array {array_name!r}: expected {wanted}, found dtype {array.dtype}")
    x = checked_samples(x, f"{path}, array {name!r}")
    if y is not None:
        y = _checked_targets(y, f"{path}, array {name_y!r}")
        if len(x) != len(y):
            raise DataError(f"{path}: expected {name} and {name_y} of one length, found {len(x)} and {len(y)} rows")
    return Table(name_of(path), x, (), y, "y", test=test)


def _checked_targets(y: np.ndarray, where: str) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind == "S":
        y = np.char.decode(y, "utf-8", "replace")
    several = y.ndim == 2 and y.dtype.kind == "f"
    if y.size == 0 or not (y.ndim == 1 or several):
        raise DataError(f"{where}: expected shape (N,), or (N, outputs) of floats for a regression, found {y.shape}")
    return _checked_numbers(y, where) if y.dtype.kind == "f" else y


def _of_idx(path: str, labels: PathLike | None, max_bytes: int | None) -> Table:
    images = read_idx(path, max_bytes=max_bytes)
    if images.ndim < 2:
        raise FileFormatError(
            f"{path}, byte 3: expected images, with at least 2 dimensions, found {images.ndim} (a file of labels?)"
        )
    x = checked_samples(images, path)
    if images.dtype == np.uint8:
        x /= np.float32(255)
    beside = [name for name in _labels_candidates(path) if os.path.exists(name)]
    if labels is None and not beside:
        return Table(name_of(path), x, target_name="label")
    labels_path = beside[0] if labels is None else os.fspath(labels)
    y = read_idx(labels_path, max_bytes=max_bytes)
    if y.ndim != 1 or y.dtype.kind == "f":
        raise FileFormatError(
            f"{labels_path}, byte 2: expected labels, whole numbers in 1 dimension, found {y.dtype} in {y.ndim}"
        )
    if len(images) != len(y):
        raise DataError(
            f"expected a label for each image, found {len(images)} images in {path}, {len(y)} in {labels_path}"
        )
    return Table(name_of(path), x, (), y, "label")


def _labels_candidates(path: str) -> list[str]:
    """train-images-idx3-ubyte → train-labels-idx1-ubyte, with a dot or a dash before "idx", with or without .gz."""
    folder, name = os.path.split(path)
    stem, found, _ = name.rpartition("images")
    ends = itertools.product("-.", ("", ".gz")) if found else ()
    return [os.path.join(folder, f"{stem}labels{mark}idx1-ubyte{end}") for mark, end in ends]


def no_labels(path: str) -> str:
    """Say where the labels of IDX images were looked for."""
    candidates = _labels_candidates(path)
    looked_for = ", ".join(candidates) or "nothing, as the name does not follow MNIST's (train-images-idx3-ubyte)"
    return f"{path}: expected a file of labels beside the images; looked for {looked_for}. Name it: labels=…"


def checked_samples(array: np.ndarray, where: str) -> np.ndarray:
    """(N, …) real numbers → fresh (N, n_features), float32 where it holds the dtype's values, else float64."""
    if array.ndim < 2 or array.size == 0:
        raise DataError(f"{where}: expected samples of shape (N, n_features), none of them 0, found {array.shape}")
    return _checked_numbers(array.reshape(len(array), -1), where)


def _checked_numbers(array: np.ndarray, where: str) -> np.ndarray:
    wide = np.result_type(array.dtype, np.float32) != np.float32
    values = np.array(array, dtype=np.float64 if wide else np.float32, order="C")
    if np.isinf(values).any():
        first = tuple(int(i) for i in np.argwhere(np.isinf(values))[0])
        raise DataError(f"{where}, row {first[0]}: expected finite numbers, found {values[first]}")
    return values
