"""Time gpuback beside other libraries, once each has been checked to compute the right results.

python -m benchmarks [OPTIONS]                          a run on the CPU or a GPU
python -m benchmarks report FILE.json [OPTIONS]         its tables, plots and the README's table
python -m benchmarks compare A.json B.json              what got slower from one run to another
python -m benchmarks compare --commits A B [OPTIONS]    what got slower from one commit to another
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cases import NETWORKS, Network, network
from benchmarks.cases.selection import FAMILIES, ON_REQUEST, Device, Job, dtypes_of, jobs

app = typer.Typer(
    add_completion=False,
    help=__doc__.splitlines()[0],
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JSON = {"cpu": Path("benchmark.json"), "cuda": Path("benchmark-gpu.json")}
WIDTH = 170
"""Columns of tables that go into a file."""


EVERY_FAMILY = "; ".join(f"{device}: {', '.join(names)}" for device, names in FAMILIES.items())

Families = Annotated[str | None, typer.Option(help="Kinds of work, with commas between them.")]
Sizes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WIDTHS:BATCH",
        help="Networks in place of the usual ones: widths and a batch size in samples, as in 784-256-10:512, or one of "
        f"{', '.join(NETWORKS)}. Repeatable; commas are allowed too.",
    ),
]
Dtypes = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPES",
        help="Dtypes of the operands of products. CPU: float32 (the default), float64. GPU: float32, tf32, "
        "bfloat16, by default each family's usual ones. Commas between them.",
    ),
]


@app.callback(
    invoke_without_command=True,
    epilog=f"Families, of which a run measures all by default but {' and '.join(ON_REQUEST)}. {EVERY_FAMILY}.",
)
def run(
    context: typer.Context,
    device: Annotated[Device, typer.Option(help="Where to run.")] = "cpu",
    sizes: Sizes = None,
    dtype: Dtypes = None,
    families: Families = None,
    contestants: Annotated[
        str | None, typer.Option(help="Names of contestants that take part, with commas; by default all installed.")
    ] = None,
    without: Annotated[str | None, typer.Option(help="Names of contestants to leave out, with commas.")] = None,
    contestant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE[:VARIANT]",
            help="A contestant of your own: an importable module with a function contestant(case, variant); see "
            "benchmarks/README.md. Repeatable.",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Turns of each contestant in a row. Default: 12 on the CPU, 15 on a GPU."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="The run may take this many seconds; rows that do not fit are left out, the least important "
            "ones first. Default: no limit on the CPU, 500 on a GPU.",
        ),
    ] = None,
    busy: Annotated[
        int | None, typer.Option(min=1, help="Busy processes in the family busy. Default: as many as cores.")
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="COUNTS", help="Numbers of threads in the family threads, with commas. Default: 1, 2, 4, … cores."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="5 rounds, nothing that PyTorch compiles; on a GPU only the first rows.")
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option(
            help="File for every round's figures, in seconds a call or bytes; tables go beside it, as .md. "
            f"Default: {JSON['cpu']}, for a GPU {JSON['cuda']}."
        ),
    ] = None,
) -> None:
    """Time gpuback beside other libraries, once each has been checked to compute the right results.

    Every contestant's results are checked against float64 first. Then all take turns, round by round. Figures are
    written after each row, so that a run may be stopped at any time. The exit status is 1 if gpuback failed in a row.
    """
    if context.invoked_subcommand is not None:
        return
    from benchmarks import peers
    from benchmarks.harness import run as harness

    known = list(dict.fromkeys(one.name for one in harness.ENTRIES[device]))
    options = harness.Options(
        device=device,
        names=_some_of(known, contestants),
        without=_some_of(known, without) or (),
        outside=[_parsed(lambda text: peers.from_outside(text, device), text) for text in contestant or ()],
        rounds=rounds,
        seconds=seconds,
        quick=quick,
    )
    steps = {"beside": busy, "threads": None if threads is None else _parsed(_counts, threads)}
    planned = _planned(device, FAMILIES[device], families, sizes, dtype, quick=quick, **steps)
    json = json or JSON[device]
    status = harness.run(planned, options, json, _console())
    if status != 2:
        print(f"Every round's figures: {json}; tables: {json.with_suffix('.md')}")
    raise typer.Exit(status)


@app.command()
def compare(
    files: Annotated[list[Path] | None, typer.Argument(metavar="[A.json B.json]", help="Files of two runs.")] = None,
    commits: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two commits to run instead, side by side; '.' is the working tree as it is."),
    ] = None,
    sizes: Sizes = None,
    dtype: Dtypes = None,
    families: Families = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each commit in a row. Default: 15.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for every round's figures of both commits.")] = None,
) -> None:
    """Print what of gpuback got slower or faster from A to B, beyond noise; exit status 1 if something got slower.

    With --commits, both take turns in one run on the CPU, with the same BLAS kernels and threads. Such a run has the
    families layer, step, fit, startup and memory; by default it measures step.
    """
    from benchmarks.reports.compare import compare as compare_files
    from benchmarks.reports.results import ResultsError

    if commits is None:
        if len(files or ()) != 2:
            raise typer.BadParameter("expected two files, or --commits A B")
        if any(option is not None for option in (dtype, families, rounds, json)) or sizes:
            raise typer.BadParameter("files are compared as they are: the other options belong to --commits")
        raise typer.Exit(compare_files(*files))
    if files:
        raise typer.BadParameter("expected two files or --commits A B, not both")
    from benchmarks.harness.commits import FAMILIES as PUBLIC
    from benchmarks.harness.commits import ROUNDS, CommitError, compare_commits

    planned = _planned("cpu", PUBLIC, families or "step", sizes, dtype)
    try:
        status = compare_commits(commits, planned, rounds or ROUNDS, json, _console())
    except (CommitError, ResultsError) as error:
        print(f"compare: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(status)


@app.command()
def report(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="A run's figures.")],
    plots: Annotated[Path | None, typer.Option(help="A folder for plots (PNG); none are drawn without.")] = None,
    readme: Annotated[Path | None, typer.Option(help="A page whose table between its markers is replaced.")] = None,
) -> None:
    """Write FILE.md beside FILE.json, with tables of all figures; on request also plots, and the table of a README."""
    from benchmarks.reports.report import MarkerError, report
    from benchmarks.reports.results import ResultsError

    try:
        report(file, plots, readme)
    except (OSError, ImportError, ResultsError, MarkerError) as error:
        print(f"report: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def _planned(
    device: Device,
    known: Sequence[str],
    families: str | None,
    sizes: Sequence[str] | None,
    dtype: str | None,
    **options: Any,
) -> list[Job]:
    """List the rows that options ask for; at least one."""
    chosen = _some_of(known, families) or [name for name in known if name not in ON_REQUEST]
    dtypes = _some_of(list(dict.fromkeys(d for family in chosen for d in dtypes_of(device, family))), dtype)
    networks: list[Network] = [_parsed(network, text.strip()) for texts in sizes or () for text in texts.split(",")]
    planned = jobs(device, chosen, networks or None, dtypes, **options)
    if not planned:
        raise typer.BadParameter("no row has all of this; without --quick or with --sizes there may be one")
    return planned


def _some_of(known: Sequence[str], text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"expected some of {', '.join(known)}, got {name!r}")
    return names


def _counts(text: str) -> list[int]:
    """Parse "1,2,4"."""
    counts = [part.strip() for part in text.split(",")]
    if not all(one.isascii() and one.isdecimal() and int(one) for one in counts) or len({*counts}) < len(counts):
        raise ValueError(f"expected different numbers of threads as in 1,2,4, got {text!r}")
    return [int(one) for one in counts]


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
