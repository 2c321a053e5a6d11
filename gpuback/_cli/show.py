"""Output: tables, JSON, and the plot of a learning curve."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpuback._cli.tasks import Score
from gpuback._cli.train import Result
from gpuback._core.output_files import replacing
from gpuback._text import escaped
from gpuback.datasets.schema import Schema
from gpuback.errors import missing_extra, unknown_name


def print_table(
    rows: Iterable[Sequence[str]], *, title: str | None = None, header: Sequence[str] = (), right: Sequence[int] = ()
) -> None:
    """Print a table on stdout: with lines, and fitted to the window, on a terminal; plain elsewhere.

    Args:
        rows: the first column is the heading of its row.
        right: columns to align on the right, such as numbers.
    """
    rows = [tuple(row) for row in rows]
    terminal = sys.stdout.isatty()
    style = box.ROUNDED if terminal else None
    table = Table(
        title=title, title_justify="left", title_style="bold", box=style, show_header=bool(header), pad_edge=terminal
    )
    for column in range(len(rows[0])):
        table.add_column(
            header[column] if header else "",
            justify="right" if column in right else "left",
            style="cyan" if column == 0 else None,
            no_wrap=column == 0,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(escaped(cell)) for cell in row))
    if terminal:
        Console().print(table)
        return
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None).print(table)
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def print_json(document: dict[str, Any]) -> None:
    """Print `json_line` on stdout."""
    sys.stdout.write(json_line(document))


def json_line(document: dict[str, Any]) -> str:
    """Return one line of JSON. NaN and infinities become null."""
    return json.dumps(_finite(document), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_confusion(schema: Schema, score: Score) -> None:
    """Print how many samples of each class were given which, and the part of each class that was found."""
    if score.confusion is None:
        return
    names = [str(value) for value in schema.classes]
    rows = []
    for name, counts, right in zip(names, score.confusion, score.confusion.diagonal(), strict=True):
        recall = f"{100 * right / counts.sum():.1f} %" if counts.sum() else "–"
        rows.append((name, *(f"{count:,}" for count in counts), recall))
    header = ("true \\ answered", *names, "recall")
    print()
    print_table(rows, header=header, right=range(1, len(header)))


def score_text(score: Score) -> tuple[str, str]:
    """("accuracy", "97.8 %") or ("R²", "0.456")."""
    if score.value is None:
        return score.name, "undefined, as the targets are constant"
    return score.name, f"{100 * score.value:.1f} %" if score.name == "accuracy" else f"{score.value:.3f}"


def require_matplotlib(path: str) -> None:
    """Raise before training if `plot` could not draw after it.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: the path's ending names no format that matplotlib writes.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise missing_extra("matplotlib", "the learning curve's plot", "cli") from None
    _format_of(path)


def _format_of(path: str) -> str:
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    ending = os.path.splitext(path)[1][1:].lower()
    if ending and ending not in known:
        raise unknown_name("ending of --plot", ending, known)
    return ending or "png"


def plot(path: str, result: Result) -> None:
    """Write the learning curve to a file, as PNG or what its name ends in."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, MaxNLocator

    class PlainNumbers(LogFormatter):
        """Label the ticks that LogFormatter would, but with 0.6 for 6 × 10⁻¹."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    history = result.history
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    last = history.epochs
    for label, losses, color in (
        ("training", history.loss, "#1f6fb4"),
        ("validation", history.validation_loss, "#2a9d5c"),
        (result.samples.tested_on, result.test_curve, "#d1495b"),
    ):
        if losses:
            # A resumed run has no held-out losses of its earlier epochs.
            epochs = range(last - len(losses) + 1, last + 1)
            axes.plot(epochs, losses, label=label, color=color, linewidth=1.6, marker="." if len(losses) == 1 else None)
    if history.best_epoch is not None:
        axes.axvline(history.best_epoch + 1, color="0.6", linewidth=1, linestyle=":", label="best epoch, kept")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PlainNumbers())
    axes.yaxis.set_minor_formatter(PlainNumbers(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))
    axes.set_xlabel("epoch")
    targets = "" if result.samples.schema.outputs is None else ", standardized targets"
    axes.set_ylabel(f"{result.net.architecture.loss.replace('_', ' ')}{targets} (log scale)")
    test = result.samples.test
    scored = f"{len(result.samples.training):,} training" if test is None else f"{len(test):,} test"
    axes.set_title(f"{result.samples.name}: {' '.join(score_text(result.score))} on {scored} samples", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format=_format_of(path))
