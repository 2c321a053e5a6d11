"""The table of a family on the terminal, which fills while contestants take their turns; elsewhere one line a row."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from benchmarks.cases import DESCRIPTIONS
from benchmarks.reports.markdown import names, number, quantity
from benchmarks.reports.results import OURS, Results, Row, best_peer, median, p20, p80, ratio, roofline
from benchmarks.reports.summary import line


class LiveTable:
    """A context in which the rows of one family are shown."""

    def __init__(self, console: Console, family: str, results: Results) -> None:
        self._console, self._family, self._results = console, family, results
        self._rows: list[Row] = []
        self._live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None

    def __enter__(self) -> LiveTable:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self.say("")
            self._live.__exit__(kind, error, traceback)
            self._console.print()

    def add(self, *rows: Row) -> None:
        self._rows += rows

    def say(self, doing: str) -> None:
        """Show what is going on, below the table as it now stands."""
        if self._live and self._rows:
            parts: list[Table | Text] = [self._table(), *(Text(absence, "dim") for absence in self._absences())]
            self._live.update(Group(*parts, *([Text(doing, "italic")] if doing else [])), refresh=True)

    def finish(self, *rows: Row) -> None:
        """Add rows that are complete. A missing contestant is named with the first row that lacks it."""
        if self._live:
            return
        known = {absence for row in self._results.rows if row not in rows for absence in row.absent.items()}
        for row in rows:
            self._console.print(line(row, self._results.ceilings), soft_wrap=True)
            for name, why in row.absent.items():
                if (name, why) not in known:
                    known.add((name, why))
                    self._console.print(f"    without {name}: {why}", soft_wrap=True)

    def _table(self) -> Table:
        table = Table(title=f"{self._family}: {DESCRIPTIONS[self._family]}", title_justify="left", highlight=False)
        table.add_column("case")
        shown = names(self._rows)
        timed = any(roofline(row, self._results.ceilings) is not None for row in self._rows if _measured(row, OURS))
        compared = any(best_peer(row) for row in self._rows)
        for name in (*shown, *(["best peer ÷ gpuback"] if compared else []), *(["of the roofline"] if timed else [])):
            table.add_column(name, justify="right")
        for row in self._rows:
            cells = [f"{row.case}: {row.label}", *(self._cell(row, name) for name in shown)]
            if compared:
                quotient = ratio(row) if _measured(row, OURS) else None
                cells.append("–" if quotient is None else f"{number(quotient)}\n{best_peer(row)}")
            if timed:
                fraction = roofline(row, self._results.ceilings) if _measured(row, OURS) else None
                cells.append("–" if fraction is None else f"{fraction:.0%}")
            table.add_row(*cells)
        return table

    def _cell(self, row: Row, name: str) -> str:
        if not _measured(row, name):
            return "–"
        one = row.contestants[name]
        low, high = quantity(p20(one), row.unit), quantity(p80(one), row.unit)
        number, _, unit = low.partition(" ")
        return f"{quantity(median(one), row.unit)}\n{number if high.endswith(unit) else low}–{high}"

    def _absences(self) -> list[str]:
        found: dict[tuple[str, str], list[str]] = {}
        for row in self._rows:
            for name, why in row.absent.items():
                found.setdefault((name, why), []).append(row.label)
        everywhere = len(self._rows)
        return [
            f"{name}: {why}" + ("" if len(labels) == everywhere else f" ({'; '.join(labels)})")
            for (name, why), labels in found.items()
        ]


def _measured(row: Row, name: str) -> bool:
    return name in row.contestants and bool(row.contestants[name].rounds)
