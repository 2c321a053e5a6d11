"""gpuback beside other libraries: checks each against float64, then times them in turns.

python -m benchmarks [OPTIONS]
python -m benchmarks compare A.json B.json
python -m benchmarks report FILE.json [--plots FOLDER] [--readme README.md]
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import cases
from benchmarks.peers import CPU
from benchmarks.results import ResultsError

app = typer.Typer(add_completion=False, help=__doc__.splitlines()[0], pretty_exceptions_enable=False)

JSON = Path("benchmark.json")
ROUNDS = 12
WIDTH = 170
"""Of tables that go into a file."""


class Dtype(enum.StrEnum):
    """Of the operands of products."""

    float32 = enum.auto()
    float64 = enum.auto()


def _some_of(known: Sequence[str], text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"expected some of {', '.join(known)}, got {name!r}")
    return names


def _networks(texts: list[str]) -> list[cases.Network] | None:
    try:
        return [cases.network(text) for text in texts] or None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    families: Annotated[str | None, typer.Option(help=f"Some of {', '.join(cases.FAMILIES)}; by default all.")] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="784-256-10:512",
            help="Widths and batch size, or one of the usual networks by name, in place of those. Repeatable.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each contestant has its turn.")] = ROUNDS,
    dtype: Annotated[Dtype, typer.Option(help="Of the operands of products.")] = Dtype.float32,
    contestants: Annotated[str | None, typer.Option(help=f"Some of {', '.join(one.name for one in CPU)}.")] = None,
    json: Annotated[Path, typer.Option(help="Where every round's figures go.")] = JSON,
) -> None:
    """Checks each contestant against float64, then times them in turns."""
    if context.invoked_subcommand is not None:
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    from benchmarks import cpu_run

    chosen = _some_of(cases.FAMILIES, families) if families else list(cases.FAMILIES)
    names = _some_of([one.name for one in CPU], contestants) if contestants else None
    cpu_run.run(cases.cases(chosen, _networks(sizes or []), dtype), rounds, names, json, console)
    console.print(f"Every round's figures: {json}")


@app.command()
def compare(a: Path, b: Path) -> None:
    """What of gpuback got slower or faster from A to B; exit status 1 if something got slower."""
    from benchmarks.compare import compare

    raise typer.Exit(compare(a, b))


@app.command()
def report(
    file: Path,
    plots: Annotated[Path | None, typer.Option(help="A folder for plots.")] = None,
    readme: Annotated[Path | None, typer.Option(help="A page whose table is replaced.")] = None,
) -> None:
    """Writes FILE.md beside FILE.json: tables of all figures; on request plots, and the table of a README."""
    from benchmarks.report import MarkerError, report

    try:
        report(file, plots, readme)
    except (OSError, ImportError, ResultsError, MarkerError) as error:
        print(f"report: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
