"""gpuback.datasets: real sets come as documented, files come back as written, defects are named with their place."""

from __future__ import annotations

import gzip
import io
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpuback.datasets import BUILT_IN, Dataset, load, read_idx, unpacking, write_idx
from gpuback.errors import (
    DataError,
    DtypeError,
    FileFormatError,
    GpubackError,
    MissingExtraError,
    OptionError,
    ShapeError,
    UnknownSourceError,
)

IDX_DTYPES = ["uint8", "int8", "int16", "int32", "float32", "float64"]
IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4) * 10
LABELS = np.array([1, 0], np.uint8)


def csv_file(folder: Path, content: str | bytes) -> Path:
    path = folder / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def npz_file(folder: Path, **arrays: object) -> Path:
    path = folder / "arrays.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def idx_files(folder: Path, images: np.ndarray = IMAGES, labels: np.ndarray = LABELS) -> Path:
    path = folder / "train-images-idx3-ubyte"
    write_idx(path, images)
    write_idx(folder / "train-labels-idx1-ubyte", labels)
    return path


# --- built in


@pytest.mark.parametrize(
    ("name", "shape", "n_classes", "target_names"),
    [
        ("digits", (1797, 64), 10, tuple("0123456789")),
        ("iris", (150, 4), 3, ("setosa", "versicolor", "virginica")),
        ("wine", (178, 13), 3, ("class_0", "class_1", "class_2")),
        ("breast_cancer", (569, 30), 2, ("malignant", "benign")),
    ],
)
def test_built_in_classification(
    name: str, shape: tuple[int, int], n_classes: int, target_names: tuple[str, ...]
) -> None:
    pytest.importorskip("sklearn")
    data = load(name)
    assert (data.name, data.task, data.n_classes, data.target_names) == (
        name,
        "classification",
        n_classes,
        target_names,
    )
    assert data.x.shape == shape and data.x.dtype == np.float64 and data.x.flags.c_contiguous
    assert data.y.shape == shape[:1] and data.y.dtype == np.int64
    assert len(data.feature_names) == shape[1]
    assert all(type(text) is str for text in data.feature_names + data.target_names)


def test_diabetes_is_regression() -> None:
    pytest.importorskip("sklearn")
    data = load("diabetes")
    assert (data.task, data.x.shape, data.y.shape, data.y.dtype) == (
        "regression",
        (442, 10),
        (442,),
        np.dtype("float64"),
    )
    with pytest.raises(DataError, match="diabetes: expected labels"):
        _ = data.n_classes


def test_digits_are_divided_by_16_and_the_rest_is_raw() -> None:
    sets = pytest.importorskip("sklearn.datasets")
    digits = load("digits").x
    assert (digits.min(), digits.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(digits * 16, sets.load_digits().data)
    for name in set(BUILT_IN) - {"digits"}:
        np.testing.assert_array_equal(load(name).x, getattr(sets, f"load_{name}")().data)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"'iris' needs scikit-learn.*\.\[cli\]"):
        load("iris")


def test_importing_loads_no_scikit_learn() -> None:
    code = "import sys, gpuback.datasets, gpuback._core.persistence; sys.exit('sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# --- what is loaded


def test_an_unknown_source_suggests_a_name_and_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(UnknownSourceError, match="Did you mean 'digits'") as caught:
        load("digit")
    assert os.path.abspath("digit") in str(caught.value)
    assert isinstance(caught.value, OptionError) and isinstance(caught.value, FileNotFoundError)
    with pytest.raises(UnknownSourceError, match="looked for at .*absent.csv"):
        load(tmp_path / "absent.csv")


def test_a_path_object_is_never_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownSourceError):
        load(Path("iris"))


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="found a folder"):
        load(tmp_path)
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(
        FileFormatError, match="notes.md: expected a .csv, .tsv, .txt, .parquet, .npz or IDX file.*'.md'.*b'hell'"
    ):
        load(tmp_path / "notes.md")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no devices here")
def test_a_device_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zeros.csv").symlink_to("/dev/zero")
    for path in (tmp_path / "zeros.csv", "/dev/zero"):
        with pytest.raises(FileFormatError, match="expected a file, found a device"):
            load(path)


def test_options_that_cannot_apply_are_refused(tmp_path: Path) -> None:
    table, images, arrays = (
        csv_file(tmp_path, "a,y\n1,0\n2,1\n"),
        idx_files(tmp_path),
        npz_file(tmp_path, x=[[1.0]], y=[0]),
    )
    with pytest.raises(OptionError, match="target='species' applies to tables"):
        load("iris", target="species")
    with pytest.raises(OptionError, match="labels=.* does not apply to a table"):
        load(table, labels=images)
    with pytest.raises(OptionError, match="target='y' applies to tables"):
        load(arrays, target="y")
    with pytest.raises(OptionError, match="target='y' applies to tables"):
        load(images, target="y")


def test_npz_labels_may_be_texts_and_test_arrays_are_left(tmp_path: Path) -> None:
    y = np.array(["b", "a", "b"])
    data = load(npz_file(tmp_path, x_train=ONES, y_train=y, x_test=ONES, y_test=y))
    assert data.target_names == ("a", "b")
    np.testing.assert_array_equal(data.y, [1, 0, 1])


def test_integers_of_any_width_mean_classification() -> None:
    assert Dataset("own", np.zeros((2, 1)), np.array([0, 4], np.uint8)).task == "classification"
    assert Dataset("own", np.zeros((2, 1)), np.array([0, 4], np.uint8)).n_classes == 5


# --- csv


def test_csv_classification(tmp_path: Path) -> None:
    data = load(csv_file(tmp_path, 'width,"height, cm",kind\n1,2.5,0\n-1e3, 4 ,"2"\n'))
    assert (data.name, data.task, data.n_classes) == ("table.csv", "classification", 2)
    assert (data.feature_names, data.target_names) == (("width", "height, cm"), ("0", "2"))
    np.testing.assert_array_equal(data.x, [[1, 2.5], [-1000, 4]])
    np.testing.assert_array_equal(data.y, [0, 1])
    assert data.x.dtype == np.float64 and data.x.flags.c_contiguous and data.y.dtype == np.int64


def test_csv_target_by_name(tmp_path: Path) -> None:
    data = load(csv_file(tmp_path, "a,price,b\n1,1.5,3\n4,2,6\n"), target="price")
    assert (data.task, data.feature_names, data.target_names) == ("regression", ("a", "b"), ("price",))
    np.testing.assert_array_equal(data.x, [[1, 3], [4, 6]])
    np.testing.assert_array_equal(data.y, [1.5, 2])


@pytest.mark.parametrize(
    ("cells", "task"),
    [
        *((["0", "1"], "classification"), (["0.0", "1.0"], "classification"), (["-1", "1"], "classification")),
        *((["True", "False"], "classification"), (["no", "yes"], "classification"), (["0.5", "1"], "regression")),
        ([str(i % 10) for i in range(20)], "classification"),
        ([str(i) for i in range(20)], "regression"),
    ],
)
def test_csv_task_follows_from_the_target(tmp_path: Path, cells: list[str], task: str) -> None:
    assert load(csv_file(tmp_path, "a,y\n" + "".join(f"1,{cell}\n" for cell in cells))).task == task


def test_csv_with_byte_order_mark_windows_lines_and_blank_end(tmp_path: Path) -> None:
    data = load(csv_file(tmp_path, "\ufeffå,y\r\n1,0\r\n2,1\r\n\r\n  \r\n"))
    assert data.feature_names == ("å",)
    np.testing.assert_array_equal(data.x, [[1], [2]])


def test_csv_of_many_rows(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(1500, 3))
    rows = "".join(f"{a!r},{b!r},{c!r},{i % 7}\n" for i, (a, b, c) in enumerate(x.tolist()))
    data = load(csv_file(tmp_path, "a,b,c,y\n" + rows))
    np.testing.assert_allclose(data.x, x, rtol=1e-15)  # pandas may miss the nearest number by one
    np.testing.assert_array_equal(data.y, np.arange(1500) % 7)
    with pytest.raises(DataError, match="column 'b' holds numbers, but also 1 cell such as 'x'"):
        load(csv_file(tmp_path, 'a,"b","c\nd",y\n' + rows + "1,x,2,0\n"))
    with pytest.raises(FileFormatError, match="line 1502: expected 4 cells, as in the header, found 5"):
        load(csv_file(tmp_path, "a,b,c,y\n" + rows + "1,1,1,1,1\n"))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("", FileFormatError, "line 1: expected a header row, found no bytes"),
        ("\na,y\n1,0\n", FileFormatError, "line 1: expected a header row, found a blank line"),
        ("a,y\n", DataError, "expected rows below the header, found none"),
        ("1.5,0\n2.5,1\n", FileFormatError, "line 1: expected a header row of column names, found numbers"),
        ("a\n1\n2\n", DataError, "expected a feature and a target, found 'a'"),
        ("y,y\n1,2\n", FileFormatError, "line 1: expected a name of its own for every column, found 2 named 'y'"),
        (",a,y\n0,1,0\n1,1,1\n", DataError, r"column 'Unnamed: 0' has no name \(an index\?\). Remedy: drop="),
        ("a,y\n1,setosa\n", DataError, "target 'y': expected two classes or more, found 'setosa' in every row"),
        ("a,y\n1,7\n2,7\n", DataError, "target 'y': expected two classes or more, found 7 in every row"),
        ("a,b,y\n1,2,0\n,5,1\n2,,0\n,1,1\n", DataError, "cells are missing, of 4 rows: 'a' 2, 'b' 1. Remedies"),
        ("a,y\n1,0\n2,\n3,1\n", DataError, "target 'y': 1 of 3 cells are missing. Remedy: missing='drop'"),
        ("a,y\n2020-01-03,0\n2020-01-04,1\n", DataError, "column 'a' holds dates, such as '2020-01-03'. Remedy: drop="),
        ("a,y\n1,0\n2,1,5\n", FileFormatError, "line 3: expected 2 cells, as in the header, found 3"),
        ("a,y\n1,0\n-inf,1\n", DataError, "column 'a' holds 1 infinite number. Remedy: drop="),
        ("a,y\n1,1e999\n", DataError, "target 'y': expected finite numbers"),
        (b"a,y\n1,0\n\xff,1\n", FileFormatError, "line 3: expected UTF-8, found byte 0xff; save"),
        ("a,y\n1,0\n".encode("utf-16"), FileFormatError, "line 1: expected UTF-8, found byte 0xff"),
        ('a,y\n"1,0\n2,1\n', FileFormatError, "expected rows of cells: .*EOF inside string"),
    ],
)  # fmt: skip
def test_csv_defects(tmp_path: Path, content: str | bytes, error: type[GpubackError], message: str) -> None:
    with pytest.raises(error, match=f"table.csv.*{message}"):
        load(csv_file(tmp_path, content))


def test_csv_target_that_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="unknown column of table.csv 'pric'. Did you mean 'price'?"):
        load(csv_file(tmp_path, "size,price\n1,2\n"), target="pric")


# --- npz


@pytest.mark.parametrize(
    ("dtype", "loaded"),
    [
        ("bool", "float32"),
        ("uint8", "float32"),
        ("float16", "float32"),
        (">f4", "float32"),
        ("float32", "float32"),
        ("int64", "float64"),
        ("float64", "float64"),
    ],
)
def test_npz_samples(tmp_path: Path, dtype: str, loaded: str) -> None:
    x = np.asfortranarray(np.array([[0, 1, 1], [1, 0, 1]], dtype))
    data = load(npz_file(tmp_path, x=x, y=np.array([3, 0], np.uint16)))
    assert (data.name, data.n_classes, data.x.dtype, data.y.dtype) == (
        "arrays.npz",
        2,
        np.dtype(loaded),
        np.dtype("int64"),
    )
    assert data.x.flags.c_contiguous
    np.testing.assert_array_equal(data.x, x)


def test_npz_images_are_flattened(tmp_path: Path) -> None:
    x = np.arange(48.0).reshape(2, 2, 3, 4)
    np.testing.assert_array_equal(load(npz_file(tmp_path, x=x, y=[0, 1])).x, x.reshape(2, 24))


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 3)])
def test_npz_float_targets_are_regression(tmp_path: Path, shape: tuple[int, ...]) -> None:
    y = np.full(shape, 0.5, np.float32)
    data = load(npz_file(tmp_path, x=np.ones((2, 2)), y=y))
    assert (data.task, data.y.dtype) == ("regression", np.dtype("float32"))
    np.testing.assert_array_equal(data.y, y[:, 0] if shape == (2, 1) else y)


def test_npz_column_of_labels_and_other_arrays(tmp_path: Path) -> None:
    data = load(npz_file(tmp_path, x=np.ones((2, 2)), y=np.array([[1], [0]]), feature_names=np.array(["a", "b"])))
    np.testing.assert_array_equal(data.y, [1, 0])


def test_npz_is_known_by_its_content(tmp_path: Path) -> None:
    path = npz_file(tmp_path, x=np.ones((2, 2)), y=[0, 1]).rename(tmp_path / "data")
    assert load(path).x.shape == (2, 2)


ONES = np.ones((3, 2))


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"a": ONES, "y": ONES}, FileFormatError, "expected an array named x, and one named y, .* found a, y"),
        ({"x": ONES}, DataError, "expected targets to learn, found none"),
        ({"x": np.array([[None]]), "y": [0]}, FileFormatError, "array 'x': expected numbers, found Python objects"),
        ({"x": ONES, "y": [0, 1]}, DataError, "expected x and y of one length, found 3 and 2 rows"),
        ({"x": np.ones(3), "y": [0, 1, 2]}, DataError, r"'x': expected samples of shape \(N, n_features\).*\(3,\)"),
        ({"x": np.ones((0, 2)), "y": np.ones(0)}, DataError, r"'x': expected samples .*found \(0, 2\)"),
        ({"x": ONES * 1j, "y": [0, 1, 2]}, DataError, "'x': expected real numbers, found dtype complex128"),
        ({"x": ONES, "y": np.ones(3) * 1j}, DataError, "'y': expected real numbers or texts, found dtype complex128"),
        ({"x": [[1.0], [np.nan]], "y": [0, 1]}, DataError, "cells are missing, of 2 rows: '0' 1. Remedies: missing="),
        ({"x": [[1.0], [np.inf]], "y": [0, 1]}, DataError, "'x', row 1: expected finite numbers, found inf"),
        ({"x": ONES, "y": [0.5, 1, -np.inf]}, DataError, "'y', row 2: expected finite numbers, found -inf"),
        ({"x": ONES, "y": np.ones((3, 2, 2))}, DataError, r"'y': expected shape \(N,\), or \(N, outputs\)"),
        ({"x": ONES, "y": np.eye(3, dtype=int)}, DataError, r"'y': expected shape \(N,\), or"),
        ({"x": ONES, "y": [4, 4, 4]}, DataError, "target 'y': expected two classes or more, found 4 in every row"),
    ],
)  # fmt: skip
def test_npz_defects(tmp_path: Path, arrays: dict[str, object], error: type[GpubackError], message: str) -> None:
    with pytest.raises(error, match=f"arrays.npz.*{message}"):
        load(npz_file(tmp_path, **arrays))


def test_no_flipped_bit_of_an_npz_changes_the_arrays(tmp_path: Path) -> None:
    """Its CRC is held against a member only where that is read to its end, beyond what a changed header says.

    The array is larger than what zipfile reads at once.
    """
    x, y = np.arange(3600.0).reshape(40, 90), np.arange(40) % 2
    path = npz_file(tmp_path, x=x, y=y)
    whole = path.read_bytes()
    header = whole.index(b"{'descr'")
    for position in range(header, whole.index(b"\n", header)):
        for bit in (1, 8):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            with pytest.raises(FileFormatError, match="arrays.npz, array 'x'"):
                load(path)


def npz_of(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(shape: object, content: bytes, descr: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy((3, 2), bytes(7)), "expected 6 bytes for shape \\(3, 2\\) of uint8, found more"),
        (npy((3, 2), bytes(5)), "expected 6 bytes for shape \\(3, 2\\) of uint8, found 5 bytes"),
        (npy((10**12, 10**12), bytes(5)), "expected 1000000000000000000000000 bytes .* found 5 bytes"),
        (npy((-3, 2), bytes(6)), r"expected the shape of an array, found \(-3, 2\)"),
        (npy((3, 2), b"", "|V0"), "expected numbers in a whole .npz file"),
        (b"\x93NUMPY\x09\x00", "expected version 1.0 or 2.0 of .npy, found 9.0"),
    ],
)
def test_npz_members_that_contradict_themselves(tmp_path: Path, member: bytes, message: str) -> None:
    with pytest.raises(FileFormatError, match=f"arrays.npz, array 'x': {message}"):
        load(npz_of(tmp_path / "arrays.npz", x=member, y=npy((3,), bytes(3))))


def test_npz_in_fortran_order_and_version_2(tmp_path: Path) -> None:
    x = np.arange(6.0).reshape(2, 3)
    content = io.BytesIO()
    np.lib.format.write_array(content, np.asfortranarray(x), version=(2, 0))
    data = load(npz_of(tmp_path / "arrays.npz", x=content.getvalue(), y=npy((2,), b"\0\1")))
    np.testing.assert_array_equal(data.x, x)


# --- what unpacks to too much


def test_an_npz_may_unpack_to_a_limit(tmp_path: Path) -> None:
    path = npz_of(tmp_path / "arrays.npz", x=npy((500, 4), bytes(2000)), y=npy((500,), bytes(499) + b"\1"))
    load(path, max_bytes=2500)
    for limit in (1999, 2499):
        with pytest.raises(DataError, match="array '[xy]': expected to unpack to at most .* found more; max_bytes="):
            load(path, max_bytes=limit)
    with pytest.raises(OptionError, match="max_bytes: expected an integer"):
        load(path, max_bytes=0)


def test_a_gzipped_idx_file_may_unpack_to_a_limit(tmp_path: Path) -> None:
    write_idx(tmp_path / "images", IMAGES)
    write_idx(tmp_path / "images.gz", IMAGES)
    np.testing.assert_array_equal(read_idx(tmp_path / "images.gz", max_bytes=24), IMAGES)
    np.testing.assert_array_equal(read_idx(tmp_path / "images", max_bytes=1), IMAGES)  # is what it is
    with pytest.raises(DataError, match="images.gz .unzipped.: expected to unpack to at most 23 bytes, found more"):
        read_idx(tmp_path / "images.gz", max_bytes=23)


def test_the_limit_follows_the_files_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "ALWAYS_ALLOWED", 1000)
    write_idx(tmp_path / "zeros.gz", np.zeros(100_000, np.uint8))
    with pytest.raises(DataError, match="found more"):
        read_idx(tmp_path / "zeros.gz")
    numbers = np.random.default_rng(0).integers(256, size=100_000).astype(np.uint8)
    write_idx(tmp_path / "numbers.gz", numbers)
    np.testing.assert_array_equal(read_idx(tmp_path / "numbers.gz"), numbers)
    assert read_idx(tmp_path / "zeros.gz", max_bytes=10**6).shape == (100_000,)


def test_too_little_memory_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("gpuback.datasets.sources._checked_numbers", full)
    with pytest.raises(DataError, match=r"arrays.npz: expected data that fit in memory"):
        load(npz_file(tmp_path, x=np.ones((2, 2)), y=[0, 1]))


def test_npz_cut_short_or_not_a_zip(tmp_path: Path) -> None:
    path = npz_file(tmp_path, x=np.ones((2, 2)), y=[0, 1])
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            FileFormatError, match=r"arrays.npz: expected numbers in a whole .npz file, a zip of arrays"
        ):
            load(path)


# --- IDX


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("idx")


@pytest.mark.parametrize("name", ["file", "file.gz"])
@settings(deadline=None, max_examples=50)
@given(
    array=st.sampled_from(IDX_DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    )
)
def test_idx_round_trip(scratch: Path, name: str, array: np.ndarray) -> None:
    path = scratch / name
    for written in (array, array.T, array.astype(array.dtype.newbyteorder())):
        write_idx(path, written)
        read = read_idx(path)
        assert (read.dtype, read.dtype.isnative, read.shape) == (array.dtype, True, written.shape)
        np.testing.assert_array_equal(read, written)
        assert read.flags.c_contiguous and read.flags.writeable
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")


def test_idx_bytes_are_as_the_format_says(tmp_path: Path) -> None:
    write_idx(tmp_path / "file", np.array([[1, -2]], np.int16))
    assert (tmp_path / "file").read_bytes() == bytes.fromhex("00000b02 00000001 00000002 0001 fffe")


@pytest.mark.parametrize("zipped", [False, True])
def test_every_truncated_idx_file_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / ("images.gz" if zipped else "images")
    write_idx(path, IMAGES)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="images.*: expected "):
            read_idx(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected IDX, which starts with 4 bytes, found 0 bytes"),
        (b"RIFFabcd", "byte 0: expected an IDX magic number, .* found 0x52494646"),
        (bytes([0, 0, 0x0A, 1]), r"byte 2: expected an element type \(0x08 uint8.*0x0e float64\), found 0x0a"),
        (bytes([0, 0, 8, 200]), "byte 3: expected at most 32 dimensions, found 200"),
        (bytes([0, 0, 8, 3, 0, 0]), "byte 4: expected 3 dimensions in 12 bytes, found 2 bytes"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 3, 7]), r"byte 8: expected 3 bytes for shape \(3,\) of uint8, found 1 bytes"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 1, 7, 7]), r"byte 8: expected 1 bytes for shape \(1,\) of uint8, found more"),
        (bytes([0, 0, 14, 4]) + b"\xff" * 16, "byte 20: expected 272225893.* bytes .* of float64, found 0 bytes"),
        (bytes([0, 0, 8, 4]) + bytes(4) + b"\xff" * 12, r"byte 4: expected dimensions of an array, found \(0, 429"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_defects(tmp_path: Path, content: bytes, message: str, zipped: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(FileFormatError, match=f"file.*{message}"):
        read_idx(path)


def test_no_flipped_byte_of_a_gzip_changes_the_array(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    write_idx(path, IMAGES)
    whole = path.read_bytes()
    harmless = 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            np.testing.assert_array_equal(read_idx(path), IMAGES)
            harmless += 1
        except FileFormatError as error:
            assert str(path) in str(error)
    assert (
        harmless <= 8
    )  # time (4 bytes), system, compression level, a flag without meaning, bits that pad the last block


def test_write_idx_refuses_what_idx_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(DtypeError, match="IDX holds uint8, int8, int16, int32, float32, float64, not int64"):
        write_idx(tmp_path / "file", np.zeros(2, np.int64))
    with pytest.raises(ShapeError, match="IDX holds 32 axes"):
        write_idx(tmp_path / "file", np.zeros((1,) * 33, np.uint8))
    assert os.listdir(tmp_path) == []


def test_write_idx_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    path = tmp_path / "file"
    write_idx(path, IMAGES)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_idx(path, LABELS)
    np.testing.assert_array_equal(read_idx(path), IMAGES)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"),
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
    ],
)
def test_images_find_their_labels(tmp_path: Path, images: str, labels: str) -> None:
    write_idx(tmp_path / images, IMAGES)
    write_idx(tmp_path / labels, LABELS)
    data = load(tmp_path / images)
    assert (data.name, data.task, data.n_classes, data.x.dtype) == (images, "classification", 2, np.dtype("float32"))
    np.testing.assert_array_equal(data.x, IMAGES.reshape(2, 12).astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(data.y, LABELS)


def test_images_under_any_name_with_labels_given(tmp_path: Path) -> None:
    write_idx(tmp_path / "pixels", IMAGES)
    write_idx(tmp_path / "kinds.gz", LABELS.astype(np.int32))
    np.testing.assert_array_equal(load(tmp_path / "pixels", labels=tmp_path / "kinds.gz").y, LABELS)


@pytest.mark.parametrize(("dtype", "loaded"), [("int16", "float32"), ("int32", "float64"), ("float64", "float64")])
def test_images_of_other_types_are_not_scaled(tmp_path: Path, dtype: str, loaded: str) -> None:
    data = load(idx_files(tmp_path, IMAGES.astype(dtype)))
    assert data.x.dtype == np.dtype(loaded)
    np.testing.assert_array_equal(data.x, IMAGES.reshape(2, 12))


def test_missing_labels_say_which_names_were_looked_for(tmp_path: Path) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte", IMAGES)
    with pytest.raises(OptionError, match="expected a file of labels beside the images; looked for") as caught:
        load(tmp_path / "train-images-idx3-ubyte")
    for name in ("train-labels-idx1-ubyte,", "train-labels-idx1-ubyte.gz", "train-labels.idx1-ubyte"):
        assert str(tmp_path / name) in str(caught.value)
    write_idx(tmp_path / "pixels", IMAGES)
    with pytest.raises(OptionError, match="looked for nothing, as the name does not follow MNIST's"):
        load(tmp_path / "pixels")


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (IMAGES, np.zeros(3, np.uint8), DataError, "found 2 images in .*images.*, 3 in .*labels"),
        (LABELS, LABELS, FileFormatError, r"images.*, byte 3: expected images, .* found 1 \(a file of labels"),
        (IMAGES, IMAGES, FileFormatError, "labels.*, byte 2: expected labels, .* found uint8 in 3"),
        (IMAGES, np.zeros(2, np.float32), FileFormatError, "labels.*, byte 2: expected labels, .* found float32 in 1"),
        (
            np.full((2, 3, 4), np.inf, np.float32),
            LABELS,
            DataError,
            "images.*, row 0: expected finite numbers, found inf",
        ),
        (IMAGES, np.ones(2, np.uint8), DataError, "images.*, target 'label': expected two classes or more, found 1 in"),
        (IMAGES[:0], LABELS[:0], DataError, r"images.*: expected samples .* found \(0, 3, 4\)"),
    ],
)
def test_images_and_labels_that_do_not_fit(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, error: type[GpubackError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load(idx_files(tmp_path, images, labels))


def test_a_damaged_idx_file_is_known_by_its_name(tmp_path: Path) -> None:
    path = idx_files(tmp_path)
    path.write_bytes(struct.pack(">I", 0xDEADBEEF))
    with pytest.raises(FileFormatError, match="byte 0: expected an IDX magic number, .* found 0xdeadbeef"):
        load(path)
