"""What the command line lets through to a terminal, a pipe or a log, from files whose names and contents are odd."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure

import gpuback
from gpuback._cli import BROKEN_PIPE, USAGE
from gpuback._cli import main as cli
from gpuback._text import MOST_IN_MESSAGE

ROWS = "".join(f"{i / 7},{i * i % 11},{i % 2}\n" for i in range(40))
ODD_NAMES = [
    "$a$ \\frac{",
    "\x1b[31mred",
    "one\ntwo",
    "\udcff\udcfe",
    "[red]a[bold]",
    "日本",
    "txt.\u202egpj",
    "x" * 200,
]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in an empty folder of its own, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return (cli.main([str(argument) for argument in arguments]), *capsys.readouterr())

    return run


def write_table(name: str, header: str = "a,b,y") -> str:
    path = f"{name}.csv"
    try:
        Path(path).write_text(f"{header}\n{ROWS}")
    except (OSError, UnicodeError):
        pytest.skip("the file system has no such names")
    return path


@pytest.mark.thorough
@pytest.mark.parametrize("name", ODD_NAMES, ids=range(8))
def test_odd_names_of_files_are_plotted_and_shown(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # no name is to be taken for TeX
    path = write_table(name, 'a\x1b[2J,[red]b,"y\n\x9b"')
    code, out, err = run("train", path, "--epochs", 1)
    assert (code, err) == (0, "")
    assert Path(f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert name.isprintable() == (name in out)
    code, _, err = run("train", path, "--epochs", 1, "--target", "c\x1b[2J", "--no-plot")
    assert code == USAGE
    assert all(column in err for column in ("a\\x1b[2J", "[red]b", "y\\n\\x9b", "c\\x1b[2J"))
    model, report = f"{name}.safetensors", run("train", path, "--epochs", 1, "--json", "--no-plot")[1]
    assert json.loads(report)["files"]["model"] == model
    for text in (out, err, report, *run("predict", path, path), *run("predict", model, path + "?")):
        if isinstance(text, str):
            assert all(line.isprintable() for line in text.removesuffix("\n").split("\n"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "iris", "--\x1b[2J"),
        ("train", "iris", "--activation", "\x1b[2J\n"),
        ("train", "\x1b[2J\n" * 10_000),
        ("train", "iris", "--hidden", "\x1b[2J\n" * 10_000),
        ("predict", "\x1b[2J\n", "iris"),
        ("\x1b[2J",),
    ],
    ids=range(6),
)
def test_odd_options_are_shown_in_one_short_line(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (USAGE, "")
    assert err.removesuffix("\n").isprintable()
    assert "\\x1b[2J" in err
    assert len(err) < MOST_IN_MESSAGE + 20


LONG = "x" * 100_000
ODD_TABLES = {
    "many columns": ",".join(f"column{i}" for i in range(9_000)) + "\n" + 5 * (",".join(["1"] * 9_000) + "\n"),
    "long name": f"{LONG},b,y\n1,2,0\n3,4,1\n",
    "name beyond the csv module": f"{2 * LONG},b,y\n1,2,0\n3,4,1\n",
    "long cell": f"a,b,y\n1,2,0\n{LONG},4,1\n",
    "long target": f"a,b,y\n1,2,0\n3,4,{LONG}\n",
    "long row": "a,b,y\n1,2,0\n" + "1," * 50_000 + "1\n",
    "many texts": "a,b,y\n" + "".join(f"t\x1b{i},1,0\n" for i in range(5_000)),
    "one line": LONG,
    "one long header": ",".join(f"column{i}" for i in range(9_000)),
}


@pytest.mark.thorough
@pytest.mark.parametrize("table", ODD_TABLES)
@pytest.mark.parametrize("target", ["missing", LONG, "b"], ids=["missing", "long", "b"])
def test_messages_about_odd_tables_are_short(run: Run, table: str, target: str) -> None:
    Path("odd.csv").write_text(ODD_TABLES[table])
    code, out, err = run("train", "odd.csv", "--epochs", 1, "--hidden", "none", "--no-plot", "--target", target)
    assert code == (USAGE if err else 0)
    assert all(line.isprintable() and len(line) < MOST_IN_MESSAGE + 20 for line in (out + err).splitlines())
    if target == "missing":
        assert code == USAGE
    if (table, target) == ("many columns", "missing"):
        assert "… and 8,950 more." in err


def test_a_warning_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refused)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, err = run("train", "iris", "--epochs", 1, "--no-plot", "--model", "a\x1bb")
    assert code == 0
    assert err == "gpuback: a\\x1bb is written, but a power cut may still lose it (Invalid argument)\n"
    code, _, err = run("train", "iris", "--epochs", 1, "--no-plot")  # pytest's filters make it an error
    assert code == USAGE
    assert err == "gpuback: iris.safetensors is written, but a power cut may still lose it (Invalid argument)\n"


def test_on_a_terminal_predictions_are_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from gpuback._cli import show

    text = "label,p\n\x1b[2J,1\n"
    show.print_data(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show.print_data(text)
    assert capsys.readouterr().out == "label,p\n\\x1b[2J,1\n"


def test_matplotlib_that_cannot_be_imported_costs_the_plot_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def find_spec(self, name: str, *rest: object) -> None:
            if name.startswith("matplotlib"):
                raise ValueError("'x\x1b' is not a valid value for backend")

    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Failing(), *sys.meta_path])
    code, _, err = run("train", "iris", "--epochs", 1)
    assert code == 0
    assert err.startswith("gpuback: no learning curve is drawn: ")
    assert "x\\x1b" in err
    assert err.count("\n") == 1


def test_a_plot_that_cannot_be_drawn_is_one_line_after_the_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Figure, *arguments: object, **options: object) -> None:
        raise RuntimeError("no\x1bfont")

    monkeypatch.setattr(Figure, "savefig", fail)
    code, _, err = run("train", "iris", "--epochs", 1)
    assert code == USAGE
    assert err == "gpuback: iris.png: matplotlib cannot draw the learning curve: no\\x1bfont\n"
    assert os.listdir() == ["iris.safetensors"]


# --- streams


class Pipe(io.StringIO):
    """Which nobody reads, or which is full."""

    code = errno.EPIPE

    def write(self, text: str) -> int:
        raise OSError(self.code, os.strerror(self.code))


class Full(Pipe):
    code = errno.ENOSPC


@pytest.mark.parametrize("arguments", [["info"], ["--version"], ["train", "--help"], ["check"], ["train", "iris"]])
def test_a_stdout_that_fails_ends_quietly_or_in_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for stdout, expected, said in (
        (Pipe(), BROKEN_PIPE, ""),
        (Full(), USAGE, f"gpuback: stdout: {os.strerror(errno.ENOSPC)}\n"),
    ):
        err = io.StringIO()
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", err)
        assert cli.main([*arguments, *(["--epochs", "1", "--no-plot"] if "iris" in arguments else [])]) == expected
        assert err.getvalue() == said


@pytest.mark.parametrize("stream", [None, object(), Pipe(), Full()], ids=lambda stream: type(stream).__name__)
def test_stderr_may_be_anything(stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main(["train", "iris", "--epochs", "1", "--no-plot", "--progress"]) == 0
    assert cli.main(["train", "nothing"]) == USAGE
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["train", "iris", "--epochs", "1", "--no-plot"]) == 0
    assert cli.main(["--help"]) == 0
    assert cli.main(["info"]) == 0


@pytest.mark.parametrize("arguments", [["--help"], ["info"], ["check"]])
def test_help_and_tables_in_ascii(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Ascii(io.StringIO):
        encoding = "ascii"

        def write(self, text: str) -> int:
            return super().write(text.encode("ascii").decode())

    monkeypatch.setattr(sys, "stdout", Ascii())
    assert cli.main(arguments) == 0
    assert len(sys.stdout.getvalue()) > 200  # type: ignore[attr-defined]


@pytest.mark.thorough
@pytest.mark.skipif(os.name != "posix", reason="descriptors and pipes as POSIX has them")
@pytest.mark.parametrize(
    ("redirection", "code"),
    [
        (">&- 2>&- <&-", 0),
        ("2>/dev/full", 0),
        ("| true; exit ${PIPESTATUS[0]}", BROKEN_PIPE),
    ],
)
def test_redirections(redirection: str, code: int, tmp_path: Path) -> None:
    if "/dev/full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    command = f'"{sys.executable}" -m gpuback train iris --epochs 1 --no-plot --progress {redirection}'
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    root = str(Path(gpuback.__file__).parents[1])
    ran = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env={**environment, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert ran.returncode == code
    shown = "".join(line for line in ran.stderr.splitlines(keepends=True) if not line.startswith("training "))
    assert shown == ""
    gpuback.MLP.load(tmp_path / "iris.safetensors")
