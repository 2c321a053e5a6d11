"""Results in a line: a row's while a run goes on, and a run's at its end."""

from __future__ import annotations

from benchmarks.reports.markdown import described, number, quantity
from benchmarks.reports.results import OURS, Results, Row, best_peer, median, ratio, roofline


def line(row: Row, ceilings: dict[str, float]) -> str:
    """List a row's medians, gpuback's first."""
    order = sorted(row.contestants, key=lambda name: name != OURS)
    parts = [f"{name} {quantity(median(row.contestants[name]), row.unit)}" for name in order]
    quotient, fraction = ratio(row), roofline(row, ceilings)
    if quotient is not None:
        parts.append(f"best peer ÷ gpuback {number(quotient)} ({best_peer(row)})")
    if fraction is not None:
        parts.append(f"{fraction:.0%} of the roofline")
    return f"{row.family:<14}{described(row)}, {row.dtype}: " + ("; ".join(parts) or "nothing measured")


def in_short(results: Results) -> str:
    """Say how many times as long as gpuback the best peer takes, by family and dtype."""
    ratios: dict[str, list[str]] = {}
    for row in results.rows:
        quotient = ratio(row)
        if row.unit == "s" and quotient is not None:
            ratios.setdefault(f"{row.family} {row.dtype}", []).append(number(quotient))
    if not ratios:
        return "no row has gpuback and a peer"
    return "best peer ÷ gpuback: " + "; ".join(f"{name} {' '.join(numbers)}" for name, numbers in ratios.items())
