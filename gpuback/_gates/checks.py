"""Compile kernels without a GPU and find their faults.

A kernel has a fault if it spills registers, keeps anything on a stack, claims tensor cores but has no matrix
instruction (a kernel for Hopper: no HGMMA), if ptxas has undone the overlap of its matrix products or its changes of
registers, or if it closes groups of products that may be empty.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from gpuback._cuda.compiler import UNDONE, Compiled, Resources, choices, compile_variant
from gpuback._cuda.launch import Variant
from gpuback._gates.disassembly import EMPTY_PRODUCT, MATRIX_INSTRUCTIONS, matrix_instructions
from gpuback._gates.occupancy import Occupancy, occupancy

FULL_ARCHS = ("sm_80", "sm_90a")
SAMPLED_ARCHS = ("sm_86", "sm_89", "sm_90", "sm_100a", "sm_120")
ARCHS = (*FULL_ARCHS, *SAMPLED_ARCHS)
HOPPER_ARCH = "sm_90a"


class Case(Protocol):
    """A variant as the plans launch it: with so many threads and bytes of dynamic shared memory to a block."""

    @property
    def variant(self) -> Variant: ...
    @property
    def block(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...


class Row(NamedTuple):
    """One variant, compiled for one architecture.

    Attributes:
        variant, arch: what was compiled, and for which architecture.
        block: threads of a block.
        shared_bytes: static and dynamic shared memory of a block.
        resources: as ptxas reports them.
        occupancy: of a multiprocessor; None for an architecture whose limits are not known here.
        matrix: how often each matrix instruction stands in it, if it is a tensor-core kernel; of one for Hopper also
            copies of boxes and changes of registers.
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
        return name_of(self.variant)


def name_of(variant: Variant) -> str:
    """Name the kernel and the macros that tell its variants apart, such as "layer_simt Accum=float TILE=64"."""
    return " ".join((variant.entry, *choices(variant)))


def exists_for(variant: Variant, arch: str) -> bool:
    """Whether the variant compiles for that architecture: one for Hopper does for sm_90a alone."""
    return arch == HOPPER_ARCH or not variant.wgmma


def check(cases: Iterable[Case], archs: Iterable[str], *, folder: Path | None = None) -> list[Row]:
    """Compile every case for every architecture, on all cores, and check what came out.

    Args:
        cases: what to compile; see `gpuback._gates.variants.every_kernel`.
        archs: architectures as NVRTC names them.
        folder: where the sources lie; gpuback's kernels by default.

    Returns:
        A row for each case and architecture that it exists for: the cases in their order, and the architectures within.

    Raises:
        BackendError: NVRTC or the disassembler is missing, or a kernel does not compile.
    """
    archs = tuple(archs)
    return check_pairs(pairs_of(cases, archs), folder=folder)


def pairs_of(cases: Iterable[Case], archs: Sequence[str]) -> list[tuple[Case, str]]:
    """Pair each case with each architecture that it exists for."""
    return [(case, arch) for case in cases for arch in archs if exists_for(case.variant, arch)]


def sample(cases: Iterable[Case]) -> list[Case]:
    """Choose the first case and the last of each kernel."""
    by_kernel: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        by_kernel.setdefault((case.variant.source, case.variant.entry), []).append(case)
    return [case for group in by_kernel.values() for case in (group[0], *group[1:][-1:])]


def check_pairs(pairs: Sequence[tuple[Case, str]], *, folder: Path | None = None) -> list[Row]:
    """Do what `check` does, for these pairs of a case and an architecture."""
    # NVRTC compiles outside Python's lock, and the disassembler is a process of its own: threads use all cores.
    # Kernels of one file and one set of macros are compiled together, so one thread takes them one after the other.
    groups: dict[tuple[str, tuple[str, ...], str], list[int]] = {}
    for index, (case, arch) in enumerate(pairs):
        groups.setdefault((case.variant.source, case.variant.defines, arch), []).append(index)

    def rows_of(group: list[int]) -> list[tuple[int, Row]]:
        return [(index, _row(pairs[index][0], pairs[index][1], folder)) for index in group]

    # Networks stand last and compile the longest. Start with them, so that none is left for one thread at the end.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = dict(pair for group in pool.map(rows_of, reversed(groups.values())) for pair in group)
    return [rows[index] for index in range(len(pairs))]


def _row(case: Case, arch: str, folder: Path | None) -> Row:
    compiled = compile_variant(case.variant, arch, folder=folder)
    resources = compiled.resources
    shared_bytes = resources.shared_bytes + case.shared_bytes
    # Only kernels that ask for these instructions get them; taking the others apart would take as long as compiling.
    asks = case.variant.tensor_cores or case.variant.wgmma
    matrix = matrix_instructions(compiled.path).get(case.variant.entry, {}) if asks else {}
    return Row(
        variant=case.variant,
        arch=arch,
        block=case.block,
        shared_bytes=shared_bytes,
        resources=resources,
        occupancy=occupancy(arch, resources.registers, case.block, shared_bytes),
        matrix=matrix,
        warnings=compiled.warnings,
        faults=tuple(_faults(case, compiled, matrix)),
    )


def _faults(case: Case, compiled: Compiled, matrix: dict[str, int]) -> Iterator[str]:
    resources = compiled.resources
    if resources.spill_store_bytes or resources.spill_load_bytes:
        yield f"spills {resources.spill_store_bytes} bytes and loads {resources.spill_load_bytes}"
    if resources.stack_bytes:
        yield f"keeps {resources.stack_bytes} bytes on the stack"
    if case.variant.wgmma and "HGMMA" not in matrix:
        yield "has no HGMMA"
    elif case.variant.tensor_cores and not matrix.keys() & set(MATRIX_INSTRUCTIONS):
        yield "has no matrix instruction"
    if EMPTY_PRODUCT in matrix:
        yield f"has {matrix[EMPTY_PRODUCT]} {EMPTY_PRODUCT}: a group of products may be empty, and waits count it"
    yield from filter(UNDONE.search, compiled.warnings)
