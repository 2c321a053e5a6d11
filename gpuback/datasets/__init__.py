"""Real data sets as NumPy arrays: scikit-learn's bundled ones by name, and .npz, .csv and IDX (MNIST's) files by path.

Loaded data can be trained on: they are finite, of equal lengths, with labels counted from 0. If a file's cannot, the
error names the line and column, the byte or the row.
"""

from __future__ import annotations

import importlib
import itertools
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuback._core.typing import PathLike
from gpuback._text import quoted
from gpuback.datasets.idx import GZIP_MAGIC, read_idx, write_idx
from gpuback.datasets.tables import read_csv, read_npz
from gpuback.errors import (
    DataError,
    FileFormatError,
    LabelError,
    OptionError,
    UnknownSourceError,
    missing_extra,
    unknown_name,
)

__all__ = ["BUILT_IN", "Dataset", "load", "read_idx", "write_idx"]

BUILT_IN = ("breast_cancer", "diabetes", "digits", "iris", "wine")

# Each class is an output of the network. ImageNet-21k, the largest set in common use, has 21,841; integers far beyond
# are identifiers or a regression target.
MAX_CLASSES = 100_000

_DIGITS_MAX_PIXEL = 16.0
_ZIP_MAGIC = b"PK"


@dataclass(frozen=True, eq=False)  # a comparison of arrays has no single truth value
class Dataset:
    """Samples and their targets.

    Attributes:
        name: the built-in name, or the file's.
        x: (N, n_features) float32 or float64, C-contiguous, finite.
        y: classification: (N,) int64, labels from 0 on. Regression: (N,) or (N, outputs), float32 or float64, finite.
        feature_names: one for each column of x, or empty.
        target_names: of the classes or outputs, or empty.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    feature_names: tuple[str, ...] = ()
    target_names: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """The task: "classification" if y holds integers, else "regression"."""
        return "classification" if self.y.dtype.kind in "iu" else "regression"

    @property
    def n_classes(self) -> int:
        """The largest label + 1.

        Raises:
            DataError: the data are for regression.
        """
        if self.task == "regression":
            raise DataError(
                f"{self.name}: expected labels to count classes, found a regression target ({self.y.dtype})"
            )
        return int(self.y.max()) + 1


def load(
    source: PathLike, *, target: str | None = None, labels: PathLike | None = None, max_bytes: int | None = None
) -> Dataset:
    """Load a data set.

    Args:
        source: a name (breast_cancer, diabetes, digits, iris, wine), or the path of
            an .npz file with arrays x (N, …) and y, whole numbers for classification, else floats;
            a .csv file with a header row (UTF-8, commas), where a target column written in whole numbers ("3", not
            "3.0") means classification;
            an IDX file of images, gzipped or not, under any name.
        target: .csv only: the name of the target's column; the last by default.
        labels: IDX only: the file of labels; by default it is looked for beside the images under MNIST's naming.
        max_bytes: how much a compressed file (.npz, gzipped IDX) may unpack to. None: 256 MiB or, if that is more, 20
            times the file's size.

    Returns:
        The data set. Values are as stored, but for digits (divided by 16) and IDX images of unsigned bytes (divided
        by 255, float32). x with more than two axes is flattened to (N, n_features).

    Raises:
        UnknownSourceError: no such name and no such file.
        OptionError: target or labels cannot apply, or name no column or file; max_bytes is no integer ≥ 1.
        FileFormatError: the file is malformed.
        DataError: the data cannot be trained on: not finite, no rows, lengths that differ, not real numbers, more than
            max_bytes, or more than there is memory for.
        LabelError: a label is negative or absurdly large.
        MissingExtraError: a built-in set was asked for without scikit-learn.
    """
    if isinstance(source, str) and source in BUILT_IN:
        _refuse(source, "a built-in data set", target=target, labels=labels)
        return _load_built_in(source)
    path = os.fspath(source)
    kind = _kind_of_file(path)
    try:
        if kind == "csv":
            _refuse(path, "a .csv file", labels=labels)
            return _load_csv(path, target)
        if kind == "npz":
            _refuse(path, "an .npz file", target=target, labels=labels)
            return _load_npz(path, max_bytes)
        _refuse(path, "an IDX file", target=target)
        return _load_idx(path, labels, max_bytes)
    except MemoryError as error:
        raise DataError(f"{path}: expected data that fit in memory: {error or 'there is not enough'}") from error


def _refuse(source: str, what: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise OptionError(f"{source}: {name}= does not apply to {what}, got {value!r}")


def _kind_of_file(path: str) -> str:
    """Tell "npz", "csv" or "idx" by the name if it ends in .npz or .csv, else by the content."""
    if not os.path.exists(path):
        raise UnknownSourceError(
            f"{unknown_name('data set', path, BUILT_IN)} As a path it was looked for at {os.path.abspath(path)},"
            " where there is no file."
        )
    if os.path.isdir(path):
        raise FileFormatError(f"{path}: expected a file, found a folder")
    if stat.S_ISCHR(os.stat(path).st_mode):  # /dev/zero never ends
        raise FileFormatError(f"{path}: expected a file, found a device")
    extension = os.path.splitext(path)[1].lower()
    if extension in (".npz", ".csv"):
        return extension[1:]
    with open(path, "rb") as file:
        start = file.read(2)
    if start == _ZIP_MAGIC:
        return "npz"
    # A damaged IDX file is known by its name.
    if start in (b"\0\0", GZIP_MAGIC) or "-ubyte" in os.path.basename(path):
        return "idx"
    raise FileFormatError(
        f"{path}: expected an .npz, .csv or IDX file, found a name that ends in {extension!r} and content that starts"
        f" with {start!r}"
    )


def files_of(source: PathLike, labels: PathLike | None = None) -> list[str]:
    """List the files that `load` would read, as far as they exist."""
    if isinstance(source, str) and source in BUILT_IN:
        return []
    path = os.fspath(source)
    found = [path, *(_labels_candidates(path) if labels is None else [os.fspath(labels)])]
    return list(filter(os.path.exists, found))


def _load_built_in(name: str) -> Dataset:
    try:
        sets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise missing_extra("scikit-learn", f"the data set {name!r}", "cli") from error
    bunch: Any = getattr(sets, f"load_{name}")()
    x = bunch.data / _DIGITS_MAX_PIXEL if name == "digits" else bunch.data
    y = bunch.target if bunch.target.dtype.kind == "f" else bunch.target.astype(np.int64)
    names = tuple(str(target) for target in bunch.get("target_names", ()))
    return Dataset(name, np.ascontiguousarray(x), y, tuple(str(feature) for feature in bunch.feature_names), names)


def _load_csv(path: str, target: str | None) -> Dataset:
    table = read_csv(path, target)
    if not table.whole:
        return Dataset(os.path.basename(path), table.x, table.y, table.feature_names, (table.target_name,))
    y = _checked_labels(
        table.y,
        lambda row: f"{path}, line {table.lines[row]}, column {quoted(table.target_name)}",
        "; for regression, write every target with a decimal point",
    )
    return Dataset(os.path.basename(path), table.x, y, table.feature_names)


def _load_npz(path: str, max_bytes: int | None) -> Dataset:
    x, y = read_npz(path, max_bytes)
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind not in "biuf":
            raise DataError(f"{path}, array {name!r}: expected real numbers, found dtype {array.dtype}")
    x = _checked_samples(x, f"{path}, array 'x'")
    where_y = f"{path}, array 'y'"
    if y.dtype.kind == "f":
        if y.ndim not in (1, 2) or y.size == 0:
            raise DataError(f"{where_y}: expected shape (N,) or (N, outputs) for regression, found {y.shape}")
        y = _checked_floats(y, where_y)
    else:
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.ndim != 1:
            raise DataError(
                f"{where_y}: expected shape (N,) for whole numbers, which are class labels, found {y.shape}; targets of"
                " a regression have to be floats"
            )
        y = _checked_labels(y, lambda row: f"{where_y}, row {row}", "; for regression, store y as floats")
    if len(x) != len(y):
        raise DataError(f"{path}: expected x and y of one length, found {len(x)} and {len(y)} rows")
    return Dataset(os.path.basename(path), x, y)


def _load_idx(path: str, labels: PathLike | None, max_bytes: int | None) -> Dataset:
    images = read_idx(path, max_bytes=max_bytes)
    if images.ndim < 2:
        raise FileFormatError(
            f"{path}, byte 3: expected images, with at least 2 dimensions, found {images.ndim} (a file of labels?)"
        )
    labels_path = _labels_beside(path) if labels is None else os.fspath(labels)
    y = read_idx(labels_path, max_bytes=max_bytes)
    if y.ndim != 1 or y.dtype.kind == "f":
        raise FileFormatError(
            f"{labels_path}, byte 2: expected labels, whole numbers in 1 dimension, found {y.dtype} in {y.ndim}"
        )
    if len(images) != len(y):
        raise DataError(
            f"expected a label for each image, found {len(images)} images in {path}, {len(y)} in {labels_path}"
        )
    x = _checked_samples(images, path)
    if images.dtype == np.uint8:
        x /= np.float32(255)
    return Dataset(os.path.basename(path), x, _checked_labels(y, lambda row: f"{labels_path}, label {row}"))


def _labels_beside(path: str) -> str:
    """train-images-idx3-ubyte → train-labels-idx1-ubyte, with a dot or a dash before "idx", with or without .gz."""
    candidates = _labels_candidates(path)
    for candidate in candidates:
        if os.path.exists(candidate):
            return candidate
    looked_for = ", ".join(candidates) or "nothing, as the name does not follow MNIST's (train-images-idx3-ubyte)"
    raise OptionError(
        f"{path}: expected a file of labels beside the images; looked for {looked_for}. Name it: labels=…"
    )


def _labels_candidates(path: str) -> list[str]:
    folder, name = os.path.split(path)
    stem, found, _ = name.rpartition("images")
    ends = itertools.product("-.", ("", ".gz")) if found else ()
    return [os.path.join(folder, f"{stem}labels{mark}idx1-ubyte{end}") for mark, end in ends]


def _checked_samples(array: np.ndarray, where: str) -> np.ndarray:
    """(N, …) real numbers → fresh (N, n_features), finite, float32 where it holds the dtype's values, else float64."""
    if array.ndim < 2 or array.size == 0:
        raise DataError(f"{where}: expected samples of shape (N, n_features), none of them 0, found {array.shape}")
    return _checked_floats(array.reshape(len(array), -1), where)


def _checked_floats(array: np.ndarray, where: str) -> np.ndarray:
    wide = np.result_type(array.dtype, np.float32) != np.float32
    values = np.array(array, dtype=np.float64 if wide else np.float32, order="C")
    finite = np.isfinite(values)
    if not finite.all():
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise DataError(f"{where}, row {first[0]}: expected finite numbers, found {values[first]}")
    return values


def _checked_labels(labels: np.ndarray, where: Callable[[int], str], remedy: str = "") -> np.ndarray:
    """Whole numbers → (N,) int64 class labels.

    Args:
        labels: (N,), of any real dtype.
        where: row → the place to name.
        remedy: what else the numbers could be, for the message.
    """
    absurd = (labels < 0) | (labels >= MAX_CLASSES)
    if absurd.any():
        row = int(absurd.argmax())
        raise LabelError(
            f"{where(row)}: expected a class label from 0 to {MAX_CLASSES - 1}, found {int(labels[row])}{remedy}"
        )
    return labels.astype(np.int64)
