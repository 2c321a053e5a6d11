"""Tables from a log's lines, as far as it got: one of layers and steps, and what failed or was left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.harness import environment
from benchmarks.reports import markdown
from benchmarks.reports.results import (
    OURS,
    Environment,
    Figures,
    Results,
    Row,
    best_peer,
    median,
    ratio,
    roofline,
    row_of,
)  # fmt: skip

ANY_GPU = "gpuback, any GPU"
"""gpuback's kernels for any GPU, beside those for Hopper."""

Line = Mapping[str, Any]


def read(log: Path) -> list[Line]:
    """Read a log. A last line that was cut off does not count."""
    found: list[Line] = []
    for text in log.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            break
    return found


def results_of(lines: Iterable[Line]) -> Results:
    """Put the times of a log into rows. Of a contestant that was timed twice the later ones count."""
    rows: dict[Case, Row] = {}
    machine = Environment("unknown", "gpu", 0, environment.commit(), environment.now(), {}, "cuBLAS")
    ceilings: dict[str, float] = {}
    for line in lines:
        if "ceilings" in line:
            machine, ceilings = Environment(**line["environment"]), line["ceilings"]
        if "rounds" in line:
            case = Case.from_json(line["case"])
            ours = line["name"].startswith(OURS)
            name = (OURS if line["hopper"] else ANY_GPU) if ours else line["name"]
            role = ("ours" if line["hopper"] else "mode") if ours else line["role"]
            rows.setdefault(case, row_of(case)).contestants[name] = Figures(line["rounds"], line["setting"], role)
    return Results(machine, ceilings, list(rows.values()))


def layers_and_steps(results: Results) -> list[list[str]]:
    """Make the table: times in µs, and the least times of a case's bytes and operations."""
    others = [name for name in markdown.names(results.rows) if name not in (OURS, ANY_GPU)]
    head = ["case", "kernel", "Hopper", "any GPU", *others, "best peer ÷ Hopper", "bytes", "operations", "roofline"]
    found = [head]
    for row in results.rows:
        ours, quotient, share = row.contestants.get(OURS), ratio(row), roofline(row, results.ceilings)
        found.append(
            [
                row.label,
                ours.setting.removeprefix("CUDA graph, ") if ours else "–",
                *(_microseconds(row.contestants.get(name)) for name in (OURS, ANY_GPU, *others)),
                "–" if quotient is None else f"{markdown.number(quotient)} ({best_peer(row)})",
                _least(row.bytes, results.ceilings.get("copy")),
                _least(row.flops, results.ceilings.get(row.dtype)),
                "–" if share is None else f"{share:.0%}",
            ]
        )
    return found


def _microseconds(figures: Figures | None) -> str:
    return "–" if figures is None else markdown.digits(median(figures) * 1e6)


def _least(amount: int, ceiling: float | None) -> str:
    return "–" if ceiling is None else markdown.digits(amount / ceiling * 1e6)


def page(log: Path) -> str:
    """Write everything that a log says, times first."""
    lines = read(log)
    results = results_of(lines)
    parts = [f"{markdown.heading(results)}\n", markdown.table(layers_and_steps(results))]
    parts += [f"- {line['title']}: {line['said']}\n" for line in lines if "said" in line and "rounds" not in line]
    settings = "".join(f"- {line}\n" for line in markdown.settings(results.rows))
    return "\n".join([*parts[:2], settings, "".join(parts[2:]), *_without_figures(lines)])


def _without_figures(lines: Sequence[Line]) -> list[str]:
    return [
        f"{kind.upper()}:\n\n" + "".join(f"- {line['title']}: {line[kind]}\n" for line in lines if kind in line)
        for kind in ("failed", "left out")
        if any(kind in line for line in lines)
    ]
