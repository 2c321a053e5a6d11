"""Results as pages: all figures of a run in Markdown, and the short table of README.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.cases import DESCRIPTIONS
from benchmarks.reports.results import (
    OURS,
    Environment,
    Figures,
    Results,
    ResultsError,
    Role,
    Row,
    best_peer,
    median,
    p20,
    p80,
    ratio,
    roofline,
)  # fmt: skip

NOTES = """Medians over rounds, with the 20th and 80th percentile in parentheses; contestants take turns within a round.
"Of the roofline" is the least time that the device's ceilings allow over the time taken: bytes at the rate of a copy,
or operations at that of a large product, whichever takes longer. "Best peer ÷ gpuback" is the median over rounds of
the quotient of times (or bytes): below 1, the other library is better.
"""

GPU_NOTES = """A layer's and a loss's contestants go through sets of buffers that together exceed the level-2 cache (at
most 200), a step's through copies of its batch. What runs in a CUDA graph is timed between events, launching left out;
"call after call" is by the wall clock, launching included; the settings below say which is whose. PyTorch and CuPy
round a 16-bit layer's dW to 16 bits; gpuback and JAX keep it in float32.
"""

BUSY_NOTES = """Beside busy processes ÷ in quiet: medians over rounds of the quotient of the medians of steps and, after
the semicolon, of that of their 95th percentiles.
"""

ORDER: tuple[Role, ...] = ("ours", "mode", "peer", "floor")
"""Of columns."""


# ---- The page of a file


def page(results: Results, figures: Sequence[tuple[str, str]] = ()) -> str:
    """Write the page with all figures of a run.

    Args:
        figures: title and address of plots to show.
    """
    parts = [f"# {results.environment.device}\n", heading(results) + "\n", NOTES]
    parts += [GPU_NOTES] if results.environment.kind == "gpu" else []
    parts += [f"{note}\n" for note in results.notes]
    parts += [f"![{title}]({address})\n" for title, address in figures]
    for family, dtype in dict.fromkeys((row.family, row.dtype) for row in results.rows):
        rows = [row for row in results.rows if (row.family, row.dtype) == (family, dtype)]
        title = _capital(DESCRIPTIONS.get(family, family))
        parts.append(f"## {title}, {dtype}\n" if dtype else f"## {title}\n")
        parts.append(table(family_table(rows, results.ceilings)))
        if family == "busy":
            parts += [BUSY_NOTES, table(busy_table(rows))]
    for title, lines in (("Settings", settings(results.rows)), ("Not measured", absent(results.rows))):
        if lines:
            parts.append(f"## {title}\n\n" + "".join(f"- {line}\n" for line in lines))
    return "\n".join(parts)


def subject(family: str) -> str:
    """Name a family in a few words."""
    return _capital(re.split("[:,]", DESCRIPTIONS.get(family, family))[0])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def heading(results: Results) -> str:
    """List machine, commit, versions and ceilings."""
    environment = results.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    ceilings = ", ".join(
        f"{name} {rate(value, 'B/s')}" if "copy" in name else f"{name} products {rate(value, 'FLOP/s')}"
        for name, value in results.ceilings.items()
    )
    lines = [
        f"{machine(environment)}; {environment.date}; commit {environment.commit or 'unknown'}.",
        f"{versions}; {environment.blas}.",
        *([f"Ceilings: {ceilings}."] if ceilings else []),
    ]
    return "  \n".join(lines)


def machine(environment: Environment) -> str:
    cores = "multiprocessors" if environment.kind == "gpu" else "core" if environment.cores == 1 else "cores"
    return f"{environment.device}, {environment.cores} {cores}"


def family_table(rows: Sequence[Row], ceilings: dict[str, float]) -> list[list[str]]:
    """Make the table of a family. Its first line is the heading; columns without a figure are left out."""
    others = [name for name in names(rows) if name != OURS]
    head = ["case", OURS, "FLOP/s", "B/s", "of the roofline", *others, "best peer ÷ gpuback"]
    lines = []
    for row in rows:
        ours = row.contestants.get(OURS)
        timed = ours is not None and row.unit == "s" and median(ours) > 0
        fraction, quotient = roofline(row, ceilings) if timed else None, ratio(row)
        lines.append(
            [
                described(row),
                spread(ours, row.unit),
                rate(row.flops / median(ours), "FLOP/s") if timed and ours and row.flops else "–",
                rate(row.bytes / median(ours), "B/s") if timed and ours and row.bytes else "–",
                "–" if fraction is None else f"{fraction:.0%}",
                *(spread(row.contestants.get(name), row.unit) for name in others),
                "–" if quotient is None else f"{number(quotient)} ({best_peer(row)})",
            ]
        )
    filled = [column for column in range(len(head)) if column < 2 or any(line[column] != "–" for line in lines)]
    return [[line[column] for column in filled] for line in (head, *lines)]


def busy_table(rows: Sequence[Row]) -> list[list[str]]:
    """Make the table of how many times as long steps take beside busy processes. Its first line is the heading."""
    found: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        step, beside, figure = row.label.rsplit(", ", 2)
        found.setdefault((row.case, step), {}).setdefault(beside, {})[figure] = row
    lines = [["case", *names(rows)]]
    for (case, step), by_load in found.items():
        quiet = by_load.pop("quiet", {})
        for beside, by_figure in by_load.items():
            cells = [
                "; ".join(_quotient(row, quiet.get(figure), name) for figure, row in by_figure.items())
                for name in names(rows)
            ]
            lines.append([f"{step}, {beside}" if ":" in case else f"{case}: {step}, {beside}", *cells])
    return lines


def _quotient(above: Row, below: Row | None, name: str) -> str:
    """Format the median over rounds of a contestant's quotient between two rows."""
    if below is None or name not in above.contestants or name not in below.contestants:
        return "–"
    pairs = zip(above.contestants[name].rounds, below.contestants[name].rounds, strict=False)
    quotients = [busy / quiet for busy, quiet in pairs if quiet > 0]
    return number(float(np.median(quotients))) if quotients else "–"


def settings(rows: Sequence[Row]) -> list[str]:
    """List each contestant's usual setting, and the cases in which it had another."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        for name, contestant in row.contestants.items():
            found.setdefault(name, {}).setdefault(contestant.setting or "–", []).append(row)
    lines = []
    for name, cases in found.items():
        usual, *others = sorted(cases, key=lambda setting: -len(cases[setting]))
        lines.append("; ".join([f"{name}: {usual}", *(f"{one} in {_where(cases[one], rows)}" for one in others)]))
    return lines


def absent(rows: Sequence[Row]) -> list[str]:
    """List contestants that were not measured and why, with the cases if they were measured in others."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        for name, why in row.absent.items():
            found.setdefault((name, why), []).append(row)
    return [
        f"{name}: {why}" + (f" ({_where(cases, rows)})" if any(name in row.contestants for row in rows) else "")
        for (name, why), cases in found.items()
    ]


def _where(cases: Sequence[Row], rows: Sequence[Row]) -> str:
    """Name some rows among all, or a family where all of its rows are meant."""
    words = []
    for family in dict.fromkeys(row.family for row in cases):
        of_family = [row for row in rows if row.family == family]
        meant = [name for row, name in zip(of_family, short_names(of_family), strict=True) if row in cases]
        words += [family] if len(meant) == len(of_family) else [f"{family} {name}" for name in meant]
    return ", ".join(words)


def short_names(rows: Sequence[Row]) -> list[str]:
    """Name cases, with what tells those of one name in a family apart: "tiny (Adam)", "64-64:256 (bfloat16)"."""
    seen: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        seen.setdefault((row.family, row.case), []).append(row)
    found = []
    for row in rows:
        same = seen[row.family, row.case]
        ends = [row.label.split(", ")[-1]] if len({one.label for one in same}) > 1 else []
        ends += [row.dtype] if len({one.dtype for one in same}) > 1 else []
        found.append(f"{row.case} ({', '.join(ends)})" if ends else row.case)
    return found


def described(row: Row) -> str:
    """Describe a case by name and label, or by the label alone where it says the name too."""
    named = ":" not in row.case and row.case not in row.label.split(", ")
    return f"{row.case}: {row.label}" if named else row.label


# ---- The short table of README.md


def short_table(results: Results) -> str:
    """Make the table of training steps: gpuback's median, and the others' times as multiples of it.

    A mode's multiple is that of the same step in the family "reproducible".

    Raises:
        ResultsError: there is no such row.
    """
    rows = [row for row in results.rows if row.family == "step" and OURS in row.contestants]
    if not rows:
        raise ResultsError("no training step of gpuback's was measured")
    modes = {(row.label, row.dtype): row for row in results.rows if row.family == "reproducible"}
    twins = [(row, modes.get((row.label, row.dtype))) for row in rows]
    shown = [row for pair in twins for row in pair if row is not None]
    others = [name for role in ("peer", "floor", "mode") for name in names(shown) if _role(shown, name) == role]
    dtypes = {row.dtype for row in rows}
    lines = [["network, batch", OURS, *others]]
    for row, twin in twins:
        multiples = [ratio(row, name) or (ratio(twin, name) if twin else None) for name in others]
        title = described(row) + (f", {row.dtype}" if len(dtypes) > 1 else "")
        lines.append([title, quantity(median(row.contestants[OURS]), row.unit), *map(_times, multiples)])
    environment = results.environment
    made = f"commit {environment.commit}, {environment.date[:10]}" if environment.commit else environment.date[:10]
    caption = f"{machine(environment)}; {environment.blas}; {made}. Medians; ×: times as long as {OURS}."
    return caption + "\n\n" + table(lines)


def _role(rows: Iterable[Row], name: str) -> Role | None:
    return next((row.contestants[name].role for row in rows if name in row.contestants), None)


def _times(quotient: float | None) -> str:
    return "–" if quotient is None else f"{number(quotient)} ×"


# ---- Cells


def table(lines: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table, with figures aligned on the right."""
    head, *rows = lines
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(_escaped(cell) for cell in line) + " |\n" for line in (head, marks, *rows))


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def names(rows: Sequence[Row]) -> list[str]:
    """List all contestants: gpuback first, then by role, then as they come."""
    roles = {name: contestant.role for row in rows for name, contestant in row.contestants.items()}
    return sorted(roles, key=lambda name: ORDER.index(roles[name]))


def spread(figures: Figures | None, unit: str) -> str:
    """Format the median (20th–80th percentile), in the median's unit. A single figure has no percentiles."""
    if figures is None:
        return "–"
    middle, low, high = median(figures), p20(figures), p80(figures)
    factor, name = scale(middle, unit)
    text = f"{digits(middle / factor)} {name}"
    return f"{text} ({digits(low / factor)}–{digits(high / factor)})" if len(figures.rounds) > 1 else text


def quantity(value: float, unit: str) -> str:
    factor, name = scale(value, unit)
    return f"{digits(value / factor)} {name}"


def rate(value: float, unit: str) -> str:
    """Format a rate: 1.2e11 FLOP/s is 120 GFLOP/s."""
    factor, prefix = si_prefix(value)
    return f"{digits(value / factor)} {prefix}{unit}"


def si_prefix(value: float) -> tuple[float, str]:
    prefixes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    return next((one for one in prefixes if value >= 0.9995 * one[0]), (1.0, ""))


def scale(value: float, unit: str) -> tuple[float, str]:
    """Choose the unit in which a figure has one to three digits before the point, and its size."""
    units = (
        ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
        if unit == "bytes"
        else ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
    )
    return next((one for one in units if value >= 0.9995 * one[0]), units[-1])


def digits(value: float) -> str:
    """Format three digits, without an exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def number(quotient: float) -> str:
    """Format two decimals near 1, where they say who wins, and fewer above."""
    return f"{quotient:.2f}" if quotient < 9.995 else f"{quotient:.1f}" if quotient < 99.95 else f"{quotient:.0f}"
