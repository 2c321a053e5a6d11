"""Results with made-up figures."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import Role
from benchmarks.reports.results import Environment, Figures, Results, Row

ROLES: dict[str, Role] = {
    "gpuback": "ours", "bare products": "floor", "plain NumPy": "peer", "A": "peer", "B": "peer", "exact": "mode",
}  # fmt: skip


def results(rows: list[Row], **environment: Any) -> Results:
    fields: dict[str, Any] = {
        "device": "A CPU", "kind": "cpu", "cores": 2, "commit": "abc1234", "date": "2026-01-02T03:04:05+00:00",
        "versions": {"numpy": "2.4", "gpuback": "0.1"}, "blas": "OpenBLAS",
    }  # fmt: skip
    return Results(Environment(**fields | environment), {"copy": 1e10, "float32": 1e11}, rows)


def row(medians: dict[str, float], **fields: Any) -> Row:
    """Three rounds a contestant, a tenth about its median."""
    usual: dict[str, Any] = {
        "family": "step", "case": "small", "label": "64-32-10, B = 128, Adam", "sizes": [64, 32, 10],
        "batch_size": 128, "dtype": "float32", "flops": 2_000_000, "bytes": 100_000, "unit": "s",
    }  # fmt: skip
    contestants = {
        name: Figures([0.9 * value, value, 1.1 * value], "2 threads", ROLES[name]) for name, value in medians.items()
    }
    return Row(**usual | {"contestants": contestants} | fields)
