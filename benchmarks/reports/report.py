"""Pages and plots of a file of results: FILE.md beside it, PNG files in a folder, the table in README.md."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.reports.markdown import page, short_table
from benchmarks.reports.results import load
from gpuback._core.output_files import replacing

BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"


class MarkerError(ValueError):
    """A page does not have exactly one place for the table."""


def report(file: Path, plots: Path | None = None, readme: Path | None = None) -> None:
    """Write page, plots and table, and print where.

    Args:
        file: of results; the page with all figures is written beside it, as FILE.md.
        plots: the folder for plots; none are drawn without.
        readme: a page whose text between the markers is replaced by the short table.

    Raises:
        ResultsError: the file holds something else.
        MarkerError: the markers in `readme` are missing, doubled or the wrong way round; it stays as it was.
    """
    results, written = load(file), [file.with_suffix(".md")]
    changed = None if readme is None else with_table(readme, short_table(results))
    figures = []
    if plots is not None:
        from benchmarks.reports.plots import draw  # needs matplotlib

        figures = draw(results, plots, file.stem)
    addresses = [(title, Path(os.path.relpath(path, file.parent)).as_posix()) for title, path in figures]
    write(file.with_suffix(".md"), page(results, addresses))
    if readme is not None and changed is not None:
        write(readme, changed)
        written.append(readme)
    for path in (*written, *(path for _, path in figures)):
        print(path)


def with_table(readme: Path, table: str) -> str:
    """Replace the text between a page's markers."""
    text = readme.read_bytes().decode()  # line ends stay as they are
    begins, ends = text.count(BEGIN), text.count(END)
    if begins != 1 or ends != 1 or text.index(BEGIN) > text.index(END):
        raise MarkerError(f"{readme}: expected {BEGIN} and then {END}, once each, got {begins} and {ends}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table.strip()}\n{END}{rest.split(END)[1]}"


def write(path: Path, text: str) -> None:
    """Write beside `path`, then rename."""
    with replacing(path) as file:
        file.write(text.encode())
