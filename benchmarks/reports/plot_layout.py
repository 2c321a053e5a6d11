"""Layout that plots share: panels, ticks, and labels that keep their distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.reports.markdown import scale, si_prefix
from benchmarks.reports.results import Row

Look = dict[str, tuple[str, str]]
"""Contestant → colour and marker, the same in all plots of a file."""


def without_batch(row: Row) -> str:
    """Return a row's label without the batch size."""
    label = row.label.removeprefix(f"{row.batch_size} × ").replace("B × ", "")
    return label.replace(f", B = {row.batch_size}", "")


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Move ascending places within 0…1 until neighbours are a gap apart, or less where there is no room for that."""
    gap = min(gap, 1 / max(len(places) - 1, 1))
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    limit = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved


def plain_ticks(axis: Axis, span: float, text: Callable[[float], str]) -> None:
    """Label powers of ten; also twice and five times as much where the axis spans less than two of them."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 100 else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def flops_text(value: float) -> str:
    factor, prefix = si_prefix(value)
    return f"{value / factor:g} {prefix}"


def seconds_text(value: float) -> str:
    factor, unit = scale(value, "s")
    return f"{value / factor:g} {unit}"


def inches(axes: Axes) -> tuple[float, float]:
    return axes.bbox.width / axes.figure.dpi, axes.bbox.height / axes.figure.dpi


def grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def panels_of(
    count: int, *, width: float, height: float, margins: tuple[float, float, float, float]
) -> tuple[Figure, list[Axes]]:
    """Make panels of a size in inches, two side by side. Margins are each panel's: left, right, bottom, top."""
    left, right, bottom, top = margins
    columns = min(count, 2)
    lines = -(-count // columns)
    across, down = columns * (left + width + right), lines * (bottom + height + top)
    figure = Figure(figsize=(across, down))
    grid = []
    for index in range(count):
        x = index % columns * (left + width + right) + left
        y = (lines - 1 - index // columns) * (bottom + height + top) + bottom
        grid.append(figure.add_axes((x / across, y / down, width / across, height / down)))
    return figure, grid
