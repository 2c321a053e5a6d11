"""Plots of results: the roofline, the best peer's time at each size, and time against batch size.

On white, in Okabe and Ito's colours and with a marker for each contestant; the same rows give the same size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from benchmarks.reports.markdown import names, number, subject
from benchmarks.reports.plot_layout import (
    Look,
    grouped,
    inches,
    panels_of,
    plain_ticks,
    seconds_text,
    spread_out,
    without_batch,
)  # fmt: skip
from benchmarks.reports.results import OURS, Results, Row, best_peer, median, p20, p80, ratio
from benchmarks.reports.roofline_plot import roofline
from gpuback._core.output_files import replacing

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "legend.frameon": False,
}

OF_OURS, OF_MODES, OF_FLOORS = "#0072B2", "#56B4E9", "#666666"
OF_PEERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#A05A2C")
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
SIGNED = "PuOr"  # orange where the peer is faster, purple where gpuback is, white at 1

MAPPED = ("layer", "step")
"""Families whose cases lie in a plane of batch size and width."""


def draw(results: Results, folder: Path, stem: str) -> list[tuple[str, Path]]:
    """Write FOLDER/STEM-….png for each plot that has figures.

    Returns:
        Title and path of each.
    """
    plots: tuple[tuple[str, str, Callable[[Results, Look], Figure | None]], ...] = (
        ("roofline", "Operations per second against operations per byte, and the device's ceilings", roofline),
        ("best-peer", "The best peer's time over gpuback's, by network and batch size", best_peers),
        ("batch", "Time against batch size", time_against_batch),
    )
    look, drawn = looks(results.rows), []
    for name, title, plot in plots:
        with rc_context(STYLE):
            figure = plot(results, look)
            if figure is None:
                continue
            FigureCanvasAgg(figure)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{stem}-{name}.png"
            with replacing(path) as file:
                figure.savefig(file, format="png", metadata={"Software": None})
        drawn.append((title, path))
    return drawn


def looks(rows: Sequence[Row]) -> Look:
    roles = {name: one.role for row in rows for name, one in row.contestants.items()}
    fixed = {"ours": OF_OURS, "mode": OF_MODES, "floor": OF_FLOORS}
    peers = [name for name in roles if roles[name] == "peer"]
    others = [name for name in roles if name != OURS]
    return {
        name: (
            fixed.get(role) or OF_PEERS[peers.index(name) % len(OF_PEERS)],
            "o" if name == OURS else MARKERS[others.index(name) % len(MARKERS)],
        )
        for name, role in roles.items()
    }


# ---- The best peer


def best_peers(results: Results, look: Look) -> Figure | None:
    """Draw the best peer's time over gpuback's: a panel a family and dtype, a line a network, a column a batch size."""
    compared = [row for row in results.rows if row.family in MAPPED and row.unit == "s" and ratio(row) is not None]
    if not compared:
        return None
    panels = grouped(compared, lambda row: (row.family, row.dtype))
    across, down, left, top, bottom = 1.05, 0.42, 2.6, 0.45, 0.5  # inches: a cell, and what is around a panel
    marks = {key: (_networks(rows), sorted({row.batch_size for row in rows})) for key, rows in panels.items()}
    width = left + across * max(4, *(len(sizes) for _, sizes in marks.values())) + 0.2
    height = sum(top + down * len(networks) + bottom for networks, _ in marks.values())
    figure, y = Figure(figsize=(width, height)), height
    for (family, dtype), rows in panels.items():
        networks, sizes = marks[family, dtype]
        panel = across * len(sizes), down * len(networks)
        y -= top + panel[1]
        axes = figure.add_axes((left / width, y / height, panel[0] / width, panel[1] / height))
        y -= bottom
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.set_ylim(len(networks) - 0.5, -0.5)
        for row in rows:
            _cell(axes, sizes.index(row.batch_size), networks.index(without_batch(row)), row)
        title = f"{subject(family)}, {dtype}: best peer ÷ gpuback (above 1, gpuback is faster)"
        axes.set_title(title, x=(0.1 - left) / panel[0])
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_yticks(range(len(networks)), networks)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("batch size B")
    return figure


def _networks(rows: Sequence[Row]) -> list[str]:
    """Sort networks from narrow to wide."""
    found = {without_batch(row): (max(row.sizes[1:-1] or row.sizes), row.sizes) for row in rows}
    return sorted(found, key=found.__getitem__)


def _cell(axes: Axes, x: int, y: int, row: Row) -> None:
    quotient = ratio(row)
    assert quotient is not None
    octaves = max(-2.0, min(2.0, math.log2(quotient)))  # a factor of 4 has the strongest colour
    ink = "white" if abs(octaves) > 1.3 else "black"
    colour = colormaps[SIGNED](Normalize(-2, 2)(octaves))
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
    axes.text(x, y - 0.02, number(quotient), ha="center", va="bottom", fontsize=9, color=ink)
    axes.text(x, y + 0.1, best_peer(row) or "", ha="center", va="top", fontsize=6.5, color=ink)


# ---- Batch sizes


def time_against_batch(results: Results, look: Look) -> Figure | None:
    """Draw a panel for each case with three batch sizes or more: medians, and the 20th to 80th percentile shaded."""
    timed = [row for row in results.rows if row.unit == "s" and row.contestants]
    cases = grouped(timed, lambda row: (row.family, row.dtype, without_batch(row)))
    by_size = {key: {row.batch_size: row for row in rows} for key, rows in cases.items()}
    panels = {key: [rows[size] for size in sorted(rows)] for key, rows in by_size.items() if len(rows) > 2}
    if not panels:
        return None
    figure, grid = panels_of(len(panels), width=3.4, height=2.6, margins=(0.95, 1.7, 0.65, 0.6))
    for axes, ((family, dtype, case), rows) in zip(grid, panels.items(), strict=True):
        axes.set_title(f"{subject(family)}, {dtype}\n{case}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        ends = []
        for name in reversed(names(rows)):  # gpuback on top
            here = [(row.batch_size, row.contestants[name]) for row in rows if name in row.contestants]
            sizes, medians, (colour, marker) = [size for size, _ in here], [median(one) for _, one in here], look[name]
            low, high = [p20(one) for _, one in here], [p80(one) for _, one in here]
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(sizes, medians, marker=marker, color=colour, markersize=4, lw=2.2 if name == OURS else 1.2)
            ends.append((medians[-1], name, colour))
        _name_ends(axes, ends)
        axes.set_xticks([row.batch_size for row in rows], [str(row.batch_size) for row in rows])
        axes.xaxis.set_minor_locator(NullLocator())
        bottom, top = axes.get_ylim()
        plain_ticks(axes.yaxis, top / bottom, seconds_text)
        axes.grid(axis="y", color="0.92")
        axes.set_xlabel("batch size B")
        axes.set_ylabel("time")
    return figure


def _name_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write names at the right, each beside its line's last point or as near as there is room."""
    low, high = map(math.log, axes.get_ylim())
    ends = sorted(ends)
    exact = [(math.log(value) - low) / (high - low) for value, *_ in ends]
    for (_, name, colour), at, place in zip(ends, exact, spread_out(exact, 11 / 72 / inches(axes)[1]), strict=True):
        axes.plot([1.0, 1.04], [at, place], transform=axes.transAxes, color=colour, linewidth=0.8, clip_on=False)
        axes.text(1.05, place, name, transform=axes.transAxes, va="center", color=colour, fontsize=8)
