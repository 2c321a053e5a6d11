"""The roofline: rates that contestants attained, below the device's ceilings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.reports.markdown import names, rate, short_names, subject
from benchmarks.reports.plot_layout import Look, flops_text, grouped, inches, panels_of, plain_ticks, spread_out
from benchmarks.reports.results import OURS, Results, Row, median

OF_ROOF = "#595959"


def roofline(results: Results, look: Look) -> Figure | None:
    """Draw a panel a family and dtype, with a column of points a row: what each contestant attained, below the roof."""
    counted = [row for row in results.rows if row.unit == "s" and row.flops and row.bytes and row.contestants]
    if not counted or "copy" not in results.ceilings:
        return None
    panels = grouped(counted, lambda row: (row.family, row.dtype))
    figure, grid = panels_of(len(panels), width=4.4, height=3.0, margins=(0.85, 1.85, 0.65, 1.95))
    for axes, ((family, dtype), rows) in zip(grid, panels.items(), strict=True):
        axes.set_title(f"{subject(family)}, {dtype}", pad=118)
        _scatter(axes, rows, look)
        _roof(axes, rows, results.ceilings, dtype)
        _name_columns(axes, [(row.flops / row.bytes, name) for row, name in zip(rows, short_names(rows), strict=True)])
        axes.set_xlabel("least operations per least byte")
        axes.set_ylabel("attained, FLOP/s")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.04), handletextpad=0.1, borderpad=0.2)
    return figure


def _scatter(axes: Axes, rows: Sequence[Row], look: Look) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    order = names(rows)
    for depth, name in enumerate(order):  # gpuback is first in the legend and on top
        here = [row for row in rows if name in row.contestants]
        colour, marker = look[name]
        axes.plot(
            [row.flops / row.bytes for row in here],
            [row.flops / median(row.contestants[name]) for row in here],
            marker, color=colour, markersize=8 if name == OURS else 5.5, markeredgecolor="white", markeredgewidth=0.6,
            label=name, zorder=3 + len(order) - depth,
        )  # fmt: skip


def _roof(axes: Axes, rows: Sequence[Row], ceilings: dict[str, float], dtype: str) -> None:
    """Draw slopes for copies and levels for products, each with its figure. The axes hold the roof and all points."""
    attained = [row.flops / median(one) for row in rows for one in row.contestants.values()]
    intensities = [row.flops / row.bytes for row in rows]
    top = ceilings.get(dtype, 2 * max(attained))
    slopes = {name: ceilings[name] for name in ("copy", "cached copy") if name in ceilings}
    ridges = [top / slope for slope in slopes.values()]
    low, high = min(*intensities, *ridges) / 6, 2 * max(*intensities, *ridges)
    floor, ceiling = min(*attained, top / 8) / 1.5, 1.6 * max(*attained, top)
    axes.set_xlim(low, high)
    axes.set_ylim(floor, ceiling)
    width, height = inches(axes)
    steepness = math.degrees(math.atan2(height / math.log(ceiling / floor), width / math.log(high / low)))
    for (name, slope), ridge in zip(slopes.items(), ridges, strict=True):
        start = max(low, floor / slope)
        style = "-" if name == "copy" else (0, (4, 2))
        axes.plot([start, ridge], [start * slope, top], color=OF_ROOF, linewidth=1.2, linestyle=style)
        middle = math.sqrt(start * ridge)
        _annotate(axes, f"{name} {rate(slope, 'B/s')}", (middle, middle * slope), (-3.0, 3.0), "center", steepness)
    if dtype in ceilings:
        axes.plot([min(ridges), high], [top, top], color=OF_ROOF, linewidth=1.2)
        _annotate(axes, f"products {rate(top, 'FLOP/s')}", (min(ridges), top), (2.0, 3.0), "left")
    plain_ticks(axes.xaxis, high / low, lambda value: f"{value:g}")
    plain_ticks(axes.yaxis, ceiling / floor, flops_text)


def _annotate(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], side: str, angle: float = 0.0
) -> None:
    axes.annotate(
        text, at, xytext=offset, textcoords="offset points", ha=side, rotation=angle, rotation_mode="anchor",
        color=OF_ROOF, fontsize=7.5,
    )  # fmt: skip


def _name_columns(axes: Axes, columns: Sequence[tuple[float, str]]) -> None:
    """Write upright names above the panel, with a thin line down from each to its points."""
    low, high = map(math.log, axes.get_xlim())
    columns = sorted(columns)
    exact = [(math.log(x) - low) / (high - low) for x, _ in columns]
    for (_, name), at, place in zip(columns, exact, spread_out(exact, 11 / 72 / inches(axes)[0]), strict=True):
        axes.plot(
            [at, at, place], [0, 1, 1.05], transform=axes.transAxes, color="0.85", lw=0.7, zorder=0, clip_on=False
        )
        fitting = name if len(name) <= 24 else f"{name[:12]}…{name[-11:]}"
        axes.text(
            place, 1.06, fitting, transform=axes.transAxes, rotation=90, ha="center", va="bottom", fontsize=7,
            color="0.3",
        )  # fmt: skip
