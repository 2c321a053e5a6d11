"""Print what checks found, one line for each kernel and architecture."""

from __future__ import annotations

from collections.abc import Sequence

from gpuback._gates.checks import Row

_HEADINGS = (
    "kernel", "arch", "threads", "registers", "shared", "blocks/SM", "warps", "spills", "stack", "matrix", "faults",
)  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    blocks, warps = ("?", "?") if row.occupancy is None else (str(row.occupancy.blocks), f"{row.occupancy.warps:.0%}")
    if blocks == "0":
        blocks, warps = "none fits", "–"
    return (
        row.name,
        row.arch,
        str(row.block),
        str(row.resources.registers),
        f"{row.shared_bytes / 1024:.1f} KB",
        blocks,
        warps,
        str(row.resources.spill_store_bytes + row.resources.spill_load_bytes),
        str(row.resources.stack_bytes),
        " ".join(f"{count} {name}" for name, count in row.matrix.items()) or "–",
        "; ".join(row.faults),
    )


def print_table(rows: Sequence[Row]) -> None:
    """Print a line for each row; with rich, if it is installed."""
    cells = [_cells(row) for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [_HEADINGS, *cells]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table()
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in ("kernel", "arch", "matrix", "faults") else "right")
    for row, line in zip(rows, cells, strict=True):
        table.add_row(*line, style="red" if row.faults else None)
    # Outside a terminal there is no width to fit.
    console = Console()
    Console(width=console.width if console.is_terminal else 200).print(table)
