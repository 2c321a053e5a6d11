"""The table of a family on the terminal, which fills while contestants take their turns."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from benchmarks.cases import DESCRIPTIONS
from benchmarks.markdown import names, number, quantity
from benchmarks.results import OURS, Row, best_peer, median, p20, p80, ratio, roofline


class Board:
    """A context in which one family is shown. On what is no terminal, the table comes once it is complete."""

    def __init__(self, console: Console, family: str, ceilings: dict[str, float]) -> None:
        self._console, self._family, self._ceilings = console, family, ceilings
        self._rows: list[Row] = []
        self._doing = ""
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> Board:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._doing = ""
        self._show()
        self._live.__exit__(kind, error, traceback)
        self._console.print()

    def add(self, *rows: Row) -> None:
        self._rows += rows

    def say(self, doing: str) -> None:
        """What is going on, below the table; the table as it now stands."""
        self._doing = doing
        if self._console.is_terminal:
            self._show()

    def _show(self) -> None:
        parts: list[Table | Text] = [self._table(), *(Text(line, "dim") for line in self._absences())]
        if self._doing:
            parts.append(Text(self._doing, "italic"))
        self._live.update(Group(*parts), refresh=True)

    def _table(self) -> Table:
        table = Table(title=f"{self._family}: {DESCRIPTIONS[self._family]}", title_justify="left", highlight=False)
        table.add_column("case")
        shown = names(self._rows)
        timed = any(roofline(row, self._ceilings) is not None for row in self._rows if _measured(row, OURS))
        compared = any(best_peer(row) for row in self._rows)
        for name in (*shown, *(["best peer ÷ gpuback"] if compared else []), *(["of the roofline"] if timed else [])):
            table.add_column(name, justify="right")
        for row in self._rows:
            cells = [f"{row.case}: {row.label}", *(self._cell(row, name) for name in shown)]
            if compared:
                quotient = ratio(row) if _measured(row, OURS) else None
                cells.append("–" if quotient is None else f"{number(quotient)}\n{best_peer(row)}")
            if timed:
                fraction = roofline(row, self._ceilings) if _measured(row, OURS) else None
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
