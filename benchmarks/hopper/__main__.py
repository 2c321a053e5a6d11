"""Check and time the kernels for Hopper beside those for any GPU and beside other libraries.

python -m benchmarks.hopper run PART [OPTIONS]      rows of a part
python -m benchmarks.hopper report LOG              the tables of what a log holds
python -m benchmarks.hopper profile LOG             Nsight Compute on the cases that are farthest from the roofline
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, help=__doc__.splitlines()[0], pretty_exceptions_enable=False)

Log = Annotated[Path, typer.Argument(metavar="LOG", help="A file of lines of JSON, one for each row.")]


@app.command()
def run(
    part: Annotated[str, typer.Argument(help="machine, ptx, checks, layers, networks, forward or knobs.")],
    log: Annotated[Path, typer.Option(help="A line of JSON is appended for each row.")] = Path("hopper.jsonl"),
    seconds: Annotated[
        float, typer.Option(envvar="PART_SECONDS", help="All rows may take so long; later ones are left out.")
    ] = 300.0,
) -> None:
    """Run a part's rows, each in a process that may hang or die. The exit status is 1 if one failed."""
    from benchmarks.harness.run import stop
    from benchmarks.hopper.rows import PARTS
    from benchmarks.hopper.run import Runner

    if part not in PARTS:
        raise typer.BadParameter(f"expected one of {', '.join(PARTS)}, got {part!r}")
    signal.signal(signal.SIGTERM, stop)
    rows = PARTS[part]()
    failed = Runner(log, seconds).run(part, rows)
    print(f"{failed} of {len(rows)} rows failed")
    raise typer.Exit(failed > 0)


@app.command()
def report(log: Log) -> None:
    """Print the tables of a log, and write them beside it."""
    from benchmarks.hopper.tables import page
    from benchmarks.reports.report import write

    text = page(log)
    write(log.with_suffix(".md"), text)
    print(text)


@app.command()
def profile(
    log: Log,
    seconds: Annotated[
        float, typer.Option(envvar="PART_SECONDS", help="As long as this, one case after the other.")
    ] = 60.0,
) -> None:
    """Run Nsight Compute on the cases of gpuback that are farthest from the roofline, into LOG's folder."""
    from benchmarks.hopper.profile import profile

    raise typer.Exit(profile(log, seconds))


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.hopper")
