"""`python -m gpuback._gates`: compiles the kernels for every GPU, without one, and says what each takes.

A kernel that spills registers, keeps anything on a stack, or claims tensor cores but has no matrix instruction fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from gpuback._cuda.compiler import Resources, choices, compile_variant
from gpuback._cuda.launch import Variant
from gpuback._gates.disassembly import matrix_instructions
from gpuback._gates.occupancy import Occupancy, occupancy
from gpuback.errors import GpubackError

FULL_ARCHS = ("sm_80", "sm_90a")
SAMPLED_ARCHS = ("sm_86", "sm_89", "sm_90", "sm_100a", "sm_120")
ARCHS = (*FULL_ARCHS, *SAMPLED_ARCHS)
_HEADINGS = (
    "kernel", "arch", "threads", "registers", "shared", "blocks/SM", "warps", "spills", "stack", "matrix", "faults",
)  # fmt: skip


class Case(Protocol):
    """A variant as the plans launch it: with so many threads and bytes of dynamic shared memory to a block."""

    @property
    def variant(self) -> Variant: ...
    @property
    def block(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def tensor_cores(self) -> bool: ...


class Row(NamedTuple):
    """One variant, compiled for one architecture.

    Attributes:
        variant, arch: what was compiled, and for which architecture.
        block: threads of a block.
        shared_bytes: static and dynamic shared memory of a block.
        resources: as ptxas reports them.
        occupancy: of a multiprocessor; None for an architecture whose limits are not known here.
        matrix: how often each matrix instruction stands in it, if it is a tensor-core kernel.
        warnings: the compiler's.
        faults: what is wrong with it; empty for a sound kernel.
    """

    variant: Variant
    arch: str
    block: int
    shared_bytes: int
    resources: Resources
    occupancy: Occupancy | None
    matrix: dict[str, int]
    warnings: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def name(self) -> str:
        return " ".join((self.variant.entry, *choices(self.variant)))


def check(cases: Iterable[Case], archs: Iterable[str], *, folder: Path | None = None) -> list[Row]:
    """Compiles every case for every architecture, on all cores, and looks at what came out.

    Args:
        cases: what to compile; see `gpuback._gates.variants.every_kernel`.
        archs: architectures as NVRTC names them.
        folder: where the sources lie; gpuback's kernels by default.

    Returns:
        A row for each case and architecture: the cases in their order, and the architectures within.

    Raises:
        BackendError: NVRTC or the disassembler is missing, or a kernel does not compile.
    """
    archs = tuple(archs)
    return _check_pairs([(case, arch) for case in cases for arch in archs], folder)


def sample(cases: Iterable[Case]) -> list[Case]:
    """Of each kernel the first case and the last."""
    by_kernel: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        by_kernel.setdefault((case.variant.source, case.variant.entry), []).append(case)
    return [case for group in by_kernel.values() for case in (group[0], *group[1:][-1:])]


def _check_pairs(pairs: Sequence[tuple[Case, str]], folder: Path | None) -> list[Row]:
    # NVRTC compiles outside Python's lock, and the disassembler is a process of its own: threads use all cores.
    # Kernels of one file and one set of macros are compiled together, so one thread takes them one after the other.
    groups: dict[tuple[str, tuple[str, ...], str], list[int]] = {}
    for index, (case, arch) in enumerate(pairs):
        groups.setdefault((case.variant.source, case.variant.defines, arch), []).append(index)

    def rows_of(group: list[int]) -> list[tuple[int, Row]]:
        return [(index, _row(pairs[index][0], pairs[index][1], folder)) for index in group]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = dict(pair for group in pool.map(rows_of, groups.values()) for pair in group)
    return [rows[index] for index in range(len(pairs))]


def _row(case: Case, arch: str, folder: Path | None) -> Row:
    compiled = compile_variant(case.variant, arch, folder=folder)
    resources = compiled.resources
    shared_bytes = resources.shared_bytes + case.shared_bytes
    # Only kernels that ask for these instructions get them; taking the others apart would take as long as compiling.
    matrix = matrix_instructions(compiled.path).get(case.variant.entry, {}) if case.tensor_cores else {}
    return Row(
        variant=case.variant,
        arch=arch,
        block=case.block,
        shared_bytes=shared_bytes,
        resources=resources,
        occupancy=occupancy(arch, resources.registers, case.block, shared_bytes),
        matrix=matrix,
        warnings=compiled.warnings,
        faults=tuple(_faults(case, resources, matrix)),
    )


def _faults(case: Case, resources: Resources, matrix: dict[str, int]) -> Iterator[str]:
    if resources.spill_store_bytes or resources.spill_load_bytes:
        yield f"spills {resources.spill_store_bytes} bytes and loads {resources.spill_load_bytes}"
    if resources.stack_bytes:
        yield f"keeps {resources.stack_bytes} bytes on the stack"
    if case.tensor_cores and not matrix:
        yield "has no matrix instruction"


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


def _print_table(rows: Sequence[Row]) -> None:
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
    # A log that is no terminal has no width to keep to.
    console = Console()
    Console(width=console.width if console.is_terminal else 200).print(table)


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] | None = None) -> int:
    """The command. Returns its exit status: 0 if every kernel is sound."""
    parser = argparse.ArgumentParser(prog="python -m gpuback._gates", description=(__doc__ or "").split("\n\n")[1])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--arch", help=f"only these architectures, separated by commas; known: {','.join(ARCHS)}")
    which.add_argument(
        "--all",
        action="store_true",
        help=f"every variant for every architecture; by default {','.join(SAMPLED_ARCHS)} get two of each kernel",
    )
    options = parser.parse_args(arguments)
    if cases is None:
        from gpuback._gates.variants import every_kernel

        cases = every_kernel()
    if options.arch or options.all:
        pairs = [(case, arch) for case in cases for arch in (options.arch.split(",") if options.arch else ARCHS)]
    else:
        pairs = [(case, arch) for case in cases for arch in FULL_ARCHS]
        pairs += [(case, arch) for case in sample(cases) for arch in SAMPLED_ARCHS]
    try:
        rows = _check_pairs(pairs, None)
    except GpubackError as error:
        print(error, file=sys.stderr)
        return 1
    _print_table(rows)
    for row in rows:
        for warning in row.warnings:
            print(f"{row.name} {row.arch}: {warning}")
    faulty = [row for row in rows if row.faults]
    for row in faulty:
        print(f"{row.name} {row.arch}: {'; '.join(row.faults)}", file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(faulty)} with faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
