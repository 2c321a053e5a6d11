"""Two files of results, or two commits, side by side: a table of what got slower or faster."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.reports.changes import Change, Noise, changes_between, common_rows, key_of, pairs_of, title_of
from benchmarks.reports.markdown import quantity
from benchmarks.reports.results import Results, ResultsError, load
from gpuback.errors import missing_extra


def compare(a: Path, b: Path) -> int:
    """Print what changed from `a` to `b`.

    Returns:
        1 if something of gpuback got slower, needs more memory or no longer runs, else 0; 2 if the files cannot be
        compared.
    """
    try:
        before, after = load(a), load(b)
        _require_same_machine(before, after)
        return judge(before, after, names=(str(a), str(b)))
    except (OSError, ResultsError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2


def judge(before: Results, after: Results, noise: Noise | None = None, *, names: tuple[str, str]) -> int:
    """Print the table of changes, and what else differs.

    Args:
        before, after: two runs on one machine.
        noise: noise between them; see `changes_between`.
        names: names of the two, for people.

    Returns:
        1 if something of gpuback got slower, needs more memory or no longer runs, else 0.

    Raises:
        ResultsError: they have no row in common.
    """
    changes, lost = changes_between(before, after, noise), list(_lost(before, after))
    if not changes and not lost:
        raise ResultsError(f"{names[0]} and {names[1]} have no row of gpuback's in common")
    print_changes(changes, f"gpuback: from {names[0]} to {names[1]}")
    for line in (*lost, *_differences(before, after)):
        print(line)
    return int(bool(lost) or any(change.verdict == "slower" for change in changes))


def _require_same_machine(before: Results, after: Results) -> None:
    old, new = ((r.environment.device, r.environment.cores) for r in (before, after))
    if old != new:
        raise ResultsError(
            "figures of different machines cannot be compared: {} with {} cores and {} with {}".format(*old, *new)
        )


def _lost(before: Results, after: Results) -> Iterator[str]:
    """Yield contestants of gpuback that ran before and failed now."""
    for old, new in common_rows(before, after):
        for name, contestant in old.contestants.items():
            if contestant.role in ("ours", "mode") and name in new.absent:
                yield f"No longer runs: {name}, {title_of(new)}: {new.absent[name]}"


def _differences(before: Results, after: Results) -> Iterator[str]:
    """Yield rows and versions that only one of the runs has."""
    for which, one, other in (("first", before, after), ("second", after, before)):
        keys = {key_of(row) for row in other.rows}
        missing = [title_of(row) for row in one.rows if key_of(row) not in keys]
        if missing:
            yield f"Only in the {which} file: {'; '.join(missing)}"
    old, new = ({**r.environment.versions, "BLAS": r.environment.blas} for r in (before, after))
    for name in sorted({*old, *new} - {"gpuback"}):
        if old.get(name) != new.get(name):
            yield f"Not the same: {name} {old.get(name, 'missing')} and {new.get(name, 'missing')}"
    pairs = [(old.contestants[n], new.contestants[n], n) for old, new, n in pairs_of(before, after)]
    for first, second, name in dict.fromkeys((x.setting, y.setting, name) for x, y, name in pairs):
        if first != second:
            yield f"Not the same: {name} ran with {first or '–'} and {second or '–'}"


# ---- In words and tables


def print_changes(changes: Sequence[Change], title: str) -> None:
    """Print a table, and a line that sums it up.

    Raises:
        MissingExtraError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        raise missing_extra("rich", "the table of changes", "cli") from None

    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    table = Table("row", "contestant", title=title, title_justify="left")
    for heading in ("before", "after", "change", "counts from"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    table.add_column("against")
    colours = {"slower": "bold red", "faster": "green", "unknown": "yellow", "same": None}
    for change in changes:
        figures = ("" if math.isnan(x) else quantity(x, change.unit) for x in (change.before, change.after))
        percents = _percent(change.shift), _percent(change.margin).lstrip("+")
        cells = [change.title, change.name, *figures, *percents, _word(change), change.beside]
        table.add_row(*map(Text, cells), style=colours[change.verdict])
    console.print(table)
    counts = {verdict: sum(change.verdict == verdict for change in changes if change.unit) for verdict in colours}
    pace = float(np.median([change.pace for change in changes if not math.isnan(change.pace)] or [0.0]))
    console.print(
        f"{counts['slower']} slower or larger, {counts['faster']} faster or smaller, {counts['same']} unchanged, "
        f"{counts['unknown']} without a verdict. What ran beside took {math.exp(pace):.2f} × as long."
    )


def _word(change: Change) -> str:
    if change.verdict in ("same", "unknown"):
        return "" if change.verdict == "same" else "no verdict"
    if change.unit == "bytes":
        return {"slower": "larger", "faster": "smaller"}.get(change.verdict, change.verdict)
    return change.verdict


def _percent(logarithm: float) -> str:
    if math.isnan(logarithm):
        return "–"
    return f"{math.exp(logarithm):.0f} ×" if logarithm > math.log(4) else f"{100 * math.expm1(logarithm):+.0f} %"
