"""gpuback.datasets.Schema: what columns become, what comes back, what is refused, and what files hold."""

from __future__ import annotations

import datetime
import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gpuback import MLP
from gpuback._core import persistence
from gpuback.datasets import Schema, load
from gpuback.errors import DataError, FileFormatError, GpubackError, LabelError, OptionError, ShapeError

ROWS = 12
FRAME = pd.DataFrame(
    {
        "age": np.arange(ROWS) % 5 + 20.5,
        "member": [i % 3 == 0 for i in range(ROWS)],
        "colour": ["red", "green", "blue"] * 4,
        "species": ["rose", "violet"] * 6,
    }
)


def frame(**columns: Any) -> pd.DataFrame:
    return FRAME.assign(**columns)


def test_columns_become_inputs() -> None:
    schema = Schema.fit(FRAME)
    names = ("age", "member", "colour=blue", "colour=green", "colour=red", "colour=(other)")
    assert schema.input_names == names
    assert (schema.n_inputs, schema.n_outputs, schema.task, schema.classes) == (
        *(6, 2, "classification", ("rose", "violet")),
    )
    x, y = schema.transform(FRAME, dtype=np.float64)
    np.testing.assert_allclose(x[:, :2].mean(axis=0), 0, atol=1e-15)
    np.testing.assert_allclose(x[:, :2].std(axis=0), 1, atol=1e-15)
    assert (x[:, 2:5] == [[colour == name for name in ("blue", "green", "red")] for colour in FRAME.colour]).all()
    assert (x[:, 5] == 0).all()
    np.testing.assert_array_equal(y, [0, 1] * 6)
    assert schema.transform(FRAME)[0].dtype == np.float32


def test_columns_are_found_by_name_in_any_order() -> None:
    schema = Schema.fit(FRAME)
    other = frame(price="?")[["price", "colour", "age", "member"]]
    np.testing.assert_array_equal(schema.inputs(other), schema.transform(FRAME)[0])
    with pytest.raises(DataError, match="expected 3 columns by name, found none called 'age', 'member'; there"):
        schema.inputs(other[["colour", "price"]])
    with pytest.raises(DataError, match="expected a target 'species', found none"):
        schema.transform(other)


def test_a_text_that_training_did_not_have_is_none_of_the_known() -> None:
    schema = Schema.fit(FRAME)
    x = schema.inputs(frame(colour="pink"))
    assert (x[:, 2:] == 0).all()  # the input of all others, never trained, has no effect
    assert (Schema.fit(FRAME, rows=np.arange(ROWS)).columns[2].encode(pd.Series(["pink"])) == [[0, 0, 0, 1]]).all()


def test_a_column_that_never_varies_has_no_effect() -> None:
    schema = Schema.fit(frame(age=7.0))
    assert (schema.inputs(frame(age=1e9))[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([1, 2, 3] * 4, (1, 2, 3)),
        ([-1, 1] * 6, (-1, 1)),
        ([1.0, 0.0] * 6, (0, 1)),
        ([True, False] * 6, (False, True)),
        (["b", "a"] * 6, ("a", "b")),
        (pd.Categorical(["x", "y", "z"] * 4), ("x", "y", "z")),
        (pd.array([5, 9] * 6, dtype="Int64"), (5, 9)),
        (pd.array([True, False] * 6, dtype="boolean"), (False, True)),
    ],
)
def test_labels_come_back_as_they_were(labels: Any, classes: tuple[Any, ...]) -> None:
    data = frame(species=labels)
    schema = Schema.fit(data)
    assert schema.classes == classes
    assert {type(value) for value in schema.classes} == {type(classes[0])}
    _, y = schema.transform(data)
    assert schema.answers(np.eye(len(classes))[y]).tolist() == list(labels)
    if len(classes) == 2:
        assert schema.answers(y[:, None].astype(float)).tolist() == list(labels)


def test_labels_that_are_no_class_are_named() -> None:
    schema = Schema.fit(FRAME)
    with pytest.raises(LabelError, match="target 'species': expected one of 2 classes .*, found 'tulip'"):
        schema.transform(frame(species="tulip"))


@pytest.mark.parametrize(
    ("target", "task", "reason"),
    [
        (np.arange(ROWS), "regression", "12 different whole numbers in 12 rows, too many for classes"),
        (np.arange(ROWS) % 6, "classification", "6 different whole numbers in 12 rows"),
        (np.arange(ROWS) + 0.5, "regression", "its numbers are not whole"),
    ],
)
def test_the_task_is_found_out_and_the_reason_told(target: Any, task: str, reason: str) -> None:
    schema = Schema.fit(frame(species=target))
    assert (schema.task, schema.target.reason) == (task, reason)


def test_the_task_can_be_set() -> None:
    whole = frame(species=np.arange(ROWS))
    assert Schema.fit(whole, task="classification").n_outputs == ROWS
    assert Schema.fit(frame(species=[0, 1] * 6), task="regression").task == "regression"
    with pytest.raises(DataError, match="expected texts or whole numbers for a classification, found .* such as 0.5"):
        Schema.fit(frame(species=np.arange(ROWS) + 0.5), task="classification")
    with pytest.raises(DataError, match="expected numbers for a regression, found texts such as 'rose'"):
        Schema.fit(FRAME, task="regression")
    with pytest.raises(OptionError, match="task: expected 'classification' or 'regression', got 'ranking'"):
        Schema.fit(FRAME, task="ranking")


def test_a_far_target_keeps_its_digits() -> None:
    """float32 has steps of 128 there."""
    price = 1.7e9 + 30 * np.sin(np.arange(ROWS))
    schema = Schema.fit(frame(species=price))
    _, y = schema.transform(frame(species=price))
    np.testing.assert_allclose((y.mean(), y.std()), (0, 1), atol=1e-7)
    np.testing.assert_allclose(schema.answers(y.astype(np.float32))[:, 0], price, rtol=0, atol=1e-5)
    as_it_is = Schema.fit(frame(species=price), standardize_target=False)
    np.testing.assert_array_equal(as_it_is.transform(frame(species=price))[1][:, 0], price)


# --- missing cells

GAPS = frame(age=[np.nan, 21, 22, 23] * 3, colour=["red", None, "red", "blue", "red", "red"] * 2)


def test_missing_cells_are_counted_by_column() -> None:
    with pytest.raises(DataError, match=r"of 12 rows: 'age' 3, 'colour' 2. Remedies: missing='mean' .*drop=\['age'"):
        Schema.fit(GAPS)
    with pytest.raises(DataError, match="of 12 rows: 'age' 3, 'colour' 2"):
        Schema.fit(FRAME).inputs(GAPS)
    with pytest.raises(DataError, match="target 'species': 1 of 12 cells are missing. Remedy: missing='drop'"):
        Schema.fit(frame(species=["rose", None, *["violet"] * 10]), missing="mean")


def test_missing_cells_are_filled_in_with_means() -> None:
    schema = Schema.fit(GAPS, missing="mean")
    x = schema.inputs(GAPS, dtype=np.float64)
    np.testing.assert_allclose(x[GAPS.age.isna(), 0], 0, atol=1e-14)
    np.testing.assert_allclose(x[GAPS.colour.isna(), 2:], [[0.2, 0.8, 0]] * 2)
    assert len(x) == ROWS


def test_rows_with_missing_cells_are_left_out() -> None:
    schema = Schema.fit(GAPS, missing="drop")
    whole = GAPS.dropna()
    x, y = schema.transform(GAPS)
    assert len(x) == len(y) == len(whole) == 7
    np.testing.assert_array_equal(x, Schema.fit(whole).transform(whole)[0])
    with pytest.raises(DataError, match="every row has a missing cell"):
        Schema.fit(frame(age=np.nan), missing="drop")


# --- columns that cannot be used


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        (pd.date_range("2024-01-01", periods=30), "holds dates or times"),
        (["3.1.2024", "17.12.2023"] * 15, "holds dates, such as '3.1.2024'"),
        ([datetime.date(2024, 1, day + 1).isoformat() for day in range(30)], "holds dates, such as"),
        ([f"customer {i}" for i in range(30)], "holds 30 different texts in 30 rows, such as 'customer 0'"),
        (["1,5", "2,25"] * 15, "holds numbers with decimal commas, such as '1,5' (decimal=',')"),
        ([*map(str, range(29)), "?"], "holds numbers, but also 1 cell such as '?'"),
        ([np.inf, 1.0] * 15, "holds 15 infinite numbers"),
        ([None] * 30, "is empty"),
        ([[1], [2]] * 15, "holds cells that are neither numbers nor texts"),
        ([1j, 2j] * 15, "holds complex numbers"),
    ],
)
def test_columns_that_cannot_be_used_are_named_with_the_remedy(cells: Any, why: str) -> None:
    data = pd.DataFrame({"a": np.arange(30.0), "b": cells, "y": [0, 1] * 15})
    with pytest.raises(DataError) as caught:
        Schema.fit(data)
    assert f"column 'b' {why}" in str(caught.value)
    assert str(caught.value).endswith("Remedy: drop=['b']")
    assert Schema.fit(data, drop=["b"]).input_names == ("a",)


def test_too_many_texts() -> None:
    data = pd.DataFrame({"b": [f"{i % 150}!" for i in range(600)], "y": [0, 1] * 300})
    with pytest.raises(DataError, match="150 different texts, such as '0!', and 100 can be categories"):
        Schema.fit(data)


def test_options_that_do_not_fit() -> None:
    with pytest.raises(OptionError, match="unknown column of the data 'colur'. Did you mean 'colour'?"):
        Schema.fit(FRAME, drop=["colur"])
    with pytest.raises(OptionError, match=r"drop=\['species'\] leaves out the target"):
        Schema.fit(FRAME, target="species", drop=["species"])
    assert Schema.fit(FRAME, drop=["species"]).target.name == "colour"
    with pytest.raises(OptionError, match="missing: expected 'mean' or 'drop', got 'zero'"):
        Schema.fit(FRAME, missing="zero")
    with pytest.raises(OptionError, match="data: expected a path, a DataFrame, an array or"):
        Schema.fit(3)
    with pytest.raises(DataError, match="column 'age': expected numbers, as in the training data: 'old' is no number"):
        Schema.fit(FRAME).inputs(frame(age="old"))
    with pytest.raises(DataError, match="column 'member': expected truth values, .* 'maybe' is neither"):
        Schema.fit(FRAME).inputs(frame(member="maybe"))


# --- arrays


def test_arrays_are_taken_by_position() -> None:
    x = np.random.default_rng(0).normal(5, 2, (20, 3))
    schema = Schema.fit((x, x[:, 0] > 5))
    assert (schema.input_names, schema.classes) == ((), (False, True))
    np.testing.assert_array_equal(schema.inputs(x), schema.inputs(pd.DataFrame(x, columns=list("cab"))))
    with pytest.raises(ShapeError, match="expected 3 features, which the model takes, found 2"):
        schema.inputs(x[:, :2])
    with pytest.raises(DataError, match="expected columns with names, as some hold texts"):
        Schema.fit(FRAME).inputs(x)


# --- files


def written(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "\ufeffx, z ,kind\n1.5,2,a\n2.5,-3,b\n3,4,a\n"),
        ("a.csv", '"x";"z";kind\r\n1,5;2;a\r\n2,5;-3;b\r\n3;4;a\r\n\r\n'),
        ("a.tsv", "x\tz\tkind\n1.5\t2\ta\n2.5\t-3\tb\n3\t4\ta\n"),
        ("a.txt", "x|z|kind\n1.5|2|a\n2.5|-3|b\n3|4|a\n"),
        ("a.csv.gz", "x,z,kind\n1.5,2,a\n2.5,-3,b\n3,4,a\n"),
    ],
)
def test_text_files_are_found_out(tmp_path: Path, name: str, content: str) -> None:
    data = load(written(tmp_path, name, content))
    assert (data.feature_names, data.target_names) == (("x", "z"), ("a", "b"))
    np.testing.assert_array_equal(data.x, [[1.5, 2], [2.5, -3], [3, 4]])
    np.testing.assert_array_equal(data.y, [0, 1, 0])


def test_separator_and_decimal_can_be_set(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "x;z:kind\n1;2:a\n2;3:b\n")
    assert load(path, separator=":").feature_names == ("x;z=1;2", "x;z=2;3", "x;z=(other)")
    path = written(tmp_path, "b.csv", "x;kind\n1,234;a\n2,345;b\n")
    np.testing.assert_array_equal(load(path).x[:, 0], [1.234, 2.345])
    path = written(tmp_path, "c.csv", "x;kind;\n1.234,5;a;\n-2.000,25;b;\n3,5;a;\n")
    np.testing.assert_array_equal(load(path).x[:, 0], [1234.5, -2000.25, 3.5])
    for options in ({"separator": ",,"}, {"decimal": ";"}):
        with pytest.raises(OptionError, match=f"{next(iter(options))}: expected"):
            load(path, **options)


def test_texts_of_a_schema_are_read_as_they_are_written(tmp_path: Path) -> None:
    """A column of codes is text in the training data; there may be only digits in later data."""
    train = written(tmp_path, "train.csv", "code,a,y\n007,1,no\nA1,2,yes\n007,3,no\nA1,4,yes\n")
    later = written(tmp_path, "later.csv", "a,code\n1,007\n2,007\n")
    schema = Schema.fit(train)
    np.testing.assert_array_equal(schema.inputs(later)[:, :3], [[1, 0, 0], [1, 0, 0]])


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    FRAME.to_parquet(tmp_path / "a.parquet")
    schema = Schema.fit(tmp_path / "a.parquet")
    np.testing.assert_array_equal(schema.transform(FRAME)[0], Schema.fit(FRAME).transform(FRAME)[0])
    with pytest.raises(DataError, match="unpack to at most 100 bytes, found more; max_bytes="):
        load(tmp_path / "a.parquet", max_bytes=100)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(FileFormatError, match="b.parquet: expected a whole Parquet file"):
        load(tmp_path / "b.parquet")


@pytest.mark.parametrize("data", [FRAME, frame(species=np.arange(ROWS) / 7), frame(species=[3, 8] * 6)])
def test_a_model_file_holds_the_schema(tmp_path: Path, data: pd.DataFrame) -> None:
    schema = Schema.fit(data, missing="mean")
    net = MLP([schema.n_inputs, schema.n_outputs], loss="squared_error", seed=0)
    net.save(tmp_path / "net", schema=schema)
    loaded = Schema.load(tmp_path / "net")
    assert loaded is not None
    assert (loaded.columns, loaded.target, loaded.missing) == (schema.columns, schema.target, "mean")
    for again, before in zip(loaded.transform(data), schema.transform(data), strict=True):
        np.testing.assert_array_equal(again, before)
    outputs = net.forward(loaded.inputs(data))
    np.testing.assert_array_equal(loaded.answers(outputs), schema.answers(outputs))
    assert (MLP.load(tmp_path / "net").theta == net.theta).all()
    net.save(tmp_path / "plain")
    assert Schema.load(tmp_path / "plain") is None


FORGED: dict[str, Any] = {
    "columns": [
        [["age", "number"]],
        [["age", "number", []]] * 2,
        [["a", "category", []]],
        [["a", "price", []]],
        {},
        [],
    ],
    "named": [1, None],
    "target": [None, 3],
    "task": ["ranking", None],
    "classes": [["rose"], ["rose", "rose"], ["rose", 1], [[]], {}, []],
    "width": [0, -1, "1", True],
    "missing": ["zero", 0],
    "standardized_target": [True, None],
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_fields_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "net"
    MLP([6, 2], seed=0).save(path, schema=Schema.fit(FRAME))
    arrays, metadata = persistence.read(path, kind="model")
    for value in FORGED[name]:
        schema = metadata["schema"] | {name: value}
        persistence.write(path, arrays, metadata | {"schema": schema}, kind="model")
        with pytest.raises(FileFormatError, match="net"):
            Schema.load(path)
    lacking = {key: value for key, value in metadata["schema"].items() if key != name}
    persistence.write(path, arrays, metadata | {"schema": lacking}, kind="model")
    with pytest.raises(FileFormatError, match=f"one without '{name}'"):
        Schema.load(path)


@pytest.mark.parametrize("name", ["schema.mean", "schema.scale", "schema.fill"])
def test_forged_arrays_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "net"
    MLP([6, 2], seed=0).save(path, schema=Schema.fit(FRAME))
    arrays, metadata = persistence.read(path, kind="model")
    bad = np.full(6, np.nan), np.ones(5), np.ones((6, 1)), np.ones(6, np.float32)
    for array in (*bad, *([np.zeros(6)] if name == "schema.scale" else [])):
        persistence.write(path, arrays | {name: array}, metadata, kind="model")
        with pytest.raises(GpubackError, match=name):
            Schema.load(path)


def test_a_schema_can_be_changed_by_hand() -> None:
    schema = replace(Schema.fit(FRAME), missing="mean")
    assert schema.inputs(GAPS).shape == (ROWS, 6)
