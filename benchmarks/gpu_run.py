"""gpuback beside other libraries on a GPU: checks each, then times them in turns.

    python -m benchmarks.gpu_run [--quick] [--families layer,step] [--without "JAX jit"] [--seconds 500] [--json FILE]

A line a row on stdout; every round's figures in FILE, written after each row; at the end FILE.md beside it, and plots
where matplotlib is installed. Rows come in the order of their importance, and one that no longer fits into the seconds
is left out. The exit status is 1 if gpuback failed in a row.
"""

from __future__ import annotations

import argparse
import faulthandler
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpuback
from benchmarks.budget import Budget
from benchmarks.cases import Case
from benchmarks.gpu_cases import FAMILIES, GUESSES, Job, jobs
from benchmarks.gpu_contest import Effort
from benchmarks.markdown import described, heading, number, quantity
from benchmarks.peers import GPU, GPU_STARTS
from benchmarks.report import report
from benchmarks.results import OURS, Results, Row, best_peer, median, ratio, roofline, save
from benchmarks.worker import reason

JSON = Path("benchmark-gpu.json")
SECONDS = 500.0

FULL, QUICK = Effort(15, 4.0), Effort(5, 1.0)

NAMES = tuple(dict.fromkeys(one.name for one in (*GPU, *GPU_STARTS)))

Measure = Callable[[tuple[Case, ...]], list[Row]]


class Stopped(SystemExit):
    """Somebody asked the run to end; what there is, is kept."""


def run(planned: Sequence[Job], measure: Measure, budget: Budget, results: Results, path: Path) -> list[Job]:
    """Measures one after the other, prints and keeps.

    Returns:
        Those for which there was no time.
    """
    left_out, told = [], set()
    for job in planned:
        if not budget.fits(job.family):
            left_out.append(job)
            continue
        with budget.spending(job.family):
            rows = measure(job.cases)
        results.rows += rows
        save(path, results)
        for row in rows:
            print(line(row, results.ceilings), flush=True)
            for name, why in row.absent.items():
                if (name, why) not in told:
                    told.add((name, why))
                    print(f"    without {name}: {why}", flush=True)
    for job in left_out:
        print(f"left out for lack of time: {title(job.cases[0])}", flush=True)
    return left_out


def title(case: Case) -> str:
    return f"{case.family} {case.label}, {case.dtype}"


def line(row: Row, ceilings: dict[str, float]) -> str:
    """A row in short."""
    order = sorted(row.contestants, key=lambda name: name != OURS)
    parts = [f"{name} {quantity(median(row.contestants[name]), row.unit)}" for name in order]
    quotient, fraction = ratio(row), roofline(row, ceilings)
    if quotient is not None:
        parts.append(f"best peer ÷ gpuback {number(quotient)} ({best_peer(row)})")
    if fraction is not None:
        parts.append(f"{fraction:.0%} of the roofline")
    return f"{row.family:<14}{described(row)}, {row.dtype}: " + ("; ".join(parts) or "nothing measured")


def in_short(results: Results) -> str:
    """How many times as long as gpuback the best peer takes, by family and dtype."""
    ratios: dict[str, list[str]] = {}
    for row in results.rows:
        quotient = ratio(row)
        if row.unit == "s" and quotient is not None:
            ratios.setdefault(f"{row.family} {row.dtype}", []).append(number(quotient))
    if not ratios:
        return "no row has gpuback and a peer"
    return "best peer ÷ gpuback: " + "; ".join(f"{name} {' '.join(numbers)}" for name, numbers in ratios.items())


def failures(results: Results) -> list[str]:
    """Where gpuback, or gpuback with an option, was to be measured and was not."""
    ours = {one.name for one in GPU if one.role != "peer"}
    return [
        f"{row.family} {described(row)}, {row.dtype}: {name}: {why}"
        for row in results.rows
        for name, why in row.absent.items()
        if name in ours and not why.startswith("left out")
    ]


def write_page(path: Path) -> None:
    """FILE.md, and plots if they can be drawn; a page without plots is one as well."""
    if find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
    else:
        try:
            return report(path, path.parent)
        except Exception as error:
            print(f"no plots: {reason(error)}")
    report(path)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rows and rounds, nothing compiled by PyTorch")
    parser.add_argument("--families", type=_some_of(FAMILIES), default=FAMILIES, help=f"some of {', '.join(FAMILIES)}")
    parser.add_argument("--without", type=_some_of(NAMES), default=(), help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"the run may take, by default {SECONDS:g}")
    parser.add_argument("--json", type=Path, default=JSON, help="where every round's figures go")
    return parser.parse_args(arguments)


def _some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {name!r}")
        return names

    return parse


def _stop(*_: Any) -> None:
    raise Stopped("stopped")


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    budget = Budget(chosen.seconds, GUESSES)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, _stop)
    status = gpuback.backends()["cupy"]
    if not status.available:
        print(status.reason, file=sys.stderr)
        return 2
    from benchmarks import environment, gpu_clock, gpu_measure  # need CuPy

    results = Results(environment.of_gpu(), gpu_clock.ceilings(), [])
    print(heading(results), flush=True)
    shared = gpu_measure.Run(budget, QUICK if chosen.quick else FULL, chosen.without, not chosen.quick)
    save(chosen.json, results)
    try:
        planned = jobs(chosen.families, quick=chosen.quick)
        run(planned, lambda cases: gpu_measure.rows_of(cases, shared), budget, results, chosen.json)
    finally:
        write_page(chosen.json)
        for failure in failures(results):
            print(f"FAILED: {failure}")
        print(in_short(results))
    return 1 if failures(results) else 0


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
