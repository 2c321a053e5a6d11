"""Rates that this CPU reaches: of copies, in memory and within its caches, and of products."""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.harness.contestants import Contestants
from benchmarks.harness.processes import WorkerError
from benchmarks.peers import Entry, named

COPIED, COPIED_IN_CACHE = 128 << 20, 128 << 10
"""Bytes that each core copies: far beyond its caches, and with the target half of the smallest level-2 cache."""

REPEATS = 200
"""Copies within the cache that a thread makes: enough that starting it does not count."""

PRODUCT = 1536
ROUNDS, WARM_UP, SECONDS = 3, 0.1, 0.1


def ceilings(contestants: Contestants, cores: int) -> dict[str, float]:
    """Measure bytes and operations per second: the highest rate of NumPy, and of PyTorch where it takes part."""
    copies = Case("copy", "copy", (COPIED, 1), cores), Case("copy", "cached copy", (COPIED_IN_CACHE, REPEATS), cores)
    products = [Case("product", dtype, (PRODUCT,), 1, dtype) for dtype in ("float32", "float64")]
    bare = named("bare products")
    multiplying = [bare, *(one for one in contestants.entries if one.name == "PyTorch eager")]
    found = {
        case.name: _highest(contestants, [bare], case, 2 * case.sizes[0] * case.sizes[1] * cores) for case in copies
    }
    found |= {case.name: _highest(contestants, multiplying, case, 2 * PRODUCT**3) for case in products}
    return {name: rate for name, rate in found.items() if rate}


def _highest(contestants: Contestants, entries: list[Entry], case: Case, work: int) -> float:
    """Return the highest rate of a case, or 0 if no contestant can run it."""
    rates = [0.0]
    for one in entries:
        choices = contestants.prepare([one], case)[one.name]
        if isinstance(choices, str):
            continue
        try:
            rates += [
                work / contestants.turn(one, choice, WARM_UP, SECONDS) for choice in choices for _ in range(ROUNDS)
            ]
        except WorkerError:
            continue
        contestants.drop(one)
    return max(rates)
