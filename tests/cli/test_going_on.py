"""`gpuback train --from`, and tables whose cells are easily read or written wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from gpuback._cli import USAGE
from gpuback._cli import main as cli
from gpuback.datasets import Schema

TINY = ("--epochs", 2, "--hidden", 4, "--no-plot", "--quiet")
AGAIN = ("--epochs", 2, "--no-plot", "--quiet")
ROWS = [f"{i % 7},{i % 5},{'ab'[i % 2]}" for i in range(40)]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in a folder with table.csv and a model of it; returns the exit code and what stderr got."""
    monkeypatch.chdir(tmp_path)
    write("table.csv", "h,w,species", *ROWS)

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        return cli.main([str(argument) for argument in arguments]), capsys.readouterr().err

    assert run("train", "table.csv", *TINY) == (0, "")
    return run


def write(name: str, *lines: str) -> None:
    Path(name).write_text("\n".join([*lines, ""]), encoding="utf-8")


@pytest.mark.parametrize("missing", [(), ("--missing", "drop")], ids=["", "drop"])
def test_a_table_that_lacks_columns_is_an_error_of_a_line(missing: tuple[str, ...], run: Run) -> None:
    write("feature.csv", "w,species", *(row.partition(",")[2] for row in ROWS))
    write("target.csv", "h,w", *(row.rpartition(",")[0] for row in ROWS))
    for name, said in (("feature", "none called 'h'"), ("target", "expected a target 'species', found none")):
        code, error = run("train", f"{name}.csv", "--from", "table.safetensors", *missing, *AGAIN)
        assert (code, error.count("\n")) == (USAGE, 1)
        assert said in error


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--drop", "w"), "leave out --drop"),
        (("--no-standardize",), "leave out --no-standardize"),
        (("--sample-weight", "w"), "a column that the model does not take as a feature"),
    ],
    ids=lambda value: value[0],
)
def test_what_would_be_ignored_is_refused(option: tuple[str, ...], said: str, run: Run) -> None:
    code, error = run("train", "table.csv", "--from", "table.safetensors", *option, *AGAIN)
    assert code == USAGE
    assert said in error


def test_class_names_with_line_breaks_are_quoted_cells(run: Run) -> None:
    names = '"two\nlines"', "one"
    write("odd.csv", "x,kind", *(f"{i},{names[i % 2]}" for i in range(20)))
    assert run("train", "odd.csv", *TINY)[0] == 0
    assert run("predict", "odd.safetensors", "odd.csv", "--proba", "-o", "out.csv")[0] == 0
    table = pd.read_csv("out.csv")
    assert (list(table), len(table)) == (["kind", "p_one", "p_two\nlines"], 20)
    assert set(table["kind"]) <= {"one", "two\nlines"}


@pytest.mark.thorough
def test_a_column_has_one_type_however_long_the_table_is(tmp_path: Path) -> None:
    """Read in parts, the label 01 would be the number 1 in some of them."""
    numbers = ",".join(["12345678901234"] * 20)
    rows = [f"{numbers},0{1 + i % 3}" for i in range(30_000)]
    header = ",".join([*(f"c{i}" for i in range(20)), "label"])
    file = tmp_path / "long.csv"
    file.write_text("\n".join([header, *rows, f"{numbers},XX", ""]), encoding="utf-8")
    assert Schema.fit(str(file)).target.classes == ("01", "02", "03", "XX")
