"""What kernels did: bytes moved for each array, operations, bank conflicts."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emulator import structs
from emulator.kernel import Kernel, load_runtime


@dataclass(frozen=True)
class Counts:
    """Sums over launches.

    Attributes:
        bytes_read: of global memory, by the name of the kernel's parameter; asynchronous copies by their valid bytes.
        bytes_written: likewise.
        atomics: atomic operations on each array.
        barriers: times that a block passed __syncthreads.
        matrix_products: mma instructions of a warp.
        matrix_loads: ldmatrix instructions of a warp.
        asynchronous_copies: cp.async instructions of a thread.
        warpgroup_products: wgmma instructions of a warpgroup.
        bulk_loads: TMA copies to shared memory.
        bulk_stores: TMA copies from shared memory.
        extra_wavefronts_read: how often reads of shared memory were repeated for bank conflicts, ldmatrix included.
        extra_wavefronts_written: likewise for writes.
        conflicts_by_line: the same two numbers for each line of source that has any.
    """

    bytes_read: dict[str, int]
    bytes_written: dict[str, int]
    atomics: dict[str, int]
    barriers: int
    matrix_products: int
    matrix_loads: int
    asynchronous_copies: int
    warpgroup_products: int
    bulk_loads: int
    bulk_stores: int
    extra_wavefronts_read: int
    extra_wavefronts_written: int
    conflicts_by_line: dict[str, tuple[int, int]]


class Tally:
    """Adds up, launch by launch, what the runtime does not sum by itself."""

    def __init__(self) -> None:
        self._bytes_read: Counter[str] = Counter()
        self._bytes_written: Counter[str] = Counter()
        self._atomics: Counter[str] = Counter()
        self._sites: dict[Kernel, Counter[tuple[int, bool]]] = {}

    def add(self, kernel: Kernel, arguments: Sequence[Any], arrays: Sequence[structs.Array]) -> None:
        """What the latest launch did."""
        for parameter, argument, array in zip(kernel.parameters, arguments, arrays, strict=True):
            if parameter.takes_array and argument is not None:
                self._bytes_read[parameter.name] += array.bytes_read
                self._bytes_written[parameter.name] += array.bytes_written
                self._atomics[parameter.name] += array.atomics
        sites = ctypes.POINTER(structs.ConflictSite)()
        count = load_runtime().emulator_conflict_sites(ctypes.byref(sites))
        totals = self._sites.setdefault(kernel, Counter())
        for site in sites[:count]:
            totals[site.code, False] += site.extra_wavefronts_read
            totals[site.code, True] += site.extra_wavefronts_written

    def counts(self, counters: structs.Counters) -> Counts:
        return Counts(
            bytes_read=dict(self._bytes_read),
            bytes_written=dict(self._bytes_written),
            atomics=dict(self._atomics),
            conflicts_by_line=self._conflicts_by_line(),
            **{name: getattr(counters, name) for name, _ in counters._fields_},
        )

    def _conflicts_by_line(self) -> dict[str, tuple[int, int]]:
        by_line: dict[str, tuple[int, int]] = {}
        for kernel, totals in self._sites.items():
            codes = sorted({code for code, _ in totals})
            for code, line in zip(codes, kernel.lines(codes), strict=True):
                read, written = by_line.get(line, (0, 0))
                by_line[line] = read + totals[code, False], written + totals[code, True]
        return by_line
