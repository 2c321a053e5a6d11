"""What this machine can do: how fast it copies, in memory and within its caches, and how fast its products are."""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.field import Field
from benchmarks.peers import Entry, named
from benchmarks.processes import WorkerError

COPIED, COPIED_IN_CACHE = 128 << 20, 128 << 10
"""Bytes that each core copies: far beyond its caches; and, with the target, half of the smallest level-2 cache."""

REPEATS = 200
"""Copies within the cache that a thread makes, so that starting it does not count."""

PRODUCT = 1536
ROUNDS, SETTLE, SECONDS = 3, 0.1, 0.1


def ceilings(field: Field, cores: int) -> dict[str, float]:
    """Bytes and operations per second, the most that was seen, of whoever is best at it."""
    copies = Case("copy", "copy", (COPIED, 1), cores), Case("copy", "cached copy", (COPIED_IN_CACHE, REPEATS), cores)
    products = [Case("product", dtype, (PRODUCT,), 1, dtype) for dtype in ("float32", "float64")]
    bare, torch = named("bare products"), named("PyTorch eager")
    found = {case.name: _highest(field, [bare], case, 2 * case.sizes[0] * case.sizes[1] * cores) for case in copies}
    found |= {case.name: _highest(field, [bare, torch], case, 2 * PRODUCT**3) for case in products}
    return {name: rate for name, rate in found.items() if rate}


def _highest(field: Field, entries: list[Entry], case: Case, work: int) -> float:
    """0 if none of them can do it."""
    rates = [0.0]
    for one in entries:
        choices = field.prepare([one], case)[one.name]
        if isinstance(choices, str):
            continue
        try:
            rates += [work / field.turn(one, choice, SETTLE, SECONDS) for choice in choices for _ in range(ROUNDS)]
        except WorkerError:
            continue
        field.drop(one)
    return max(rates)
